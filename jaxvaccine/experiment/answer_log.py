"""A model's answers on disk, written as they come, so that an evaluation that is killed keeps them."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jaxvaccine.json_files import decode_utf8


def read_answers(path: Path) -> dict[int, str]:
    """{number of the example: answer} of a file of lines {"row", "answer"}; none if there is no file.

    A last line that is not whole, as a kill leaves it, does not count.

    Raises:
      ValueError: another line is damaged.
    """
    if not path.is_file():
        return {}
    answers = {}
    *lines, _ = decode_utf8(path.read_bytes(), path).split("\n")
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            answers[int(entry["row"])] = str(entry["answer"])
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: found {line!r:.80}, expected an object with row and answer; "
                             "remove the file to answer again") from error
    return answers


@contextmanager
def answer_log(path: Path, answered: Mapping[int, str]) -> Iterator[Callable[[Mapping[int, str]], None]]:
    """Writes what has been answered, and gives a function that appends more, each time at once."""
    def lines(answers: Mapping[int, str]) -> str:
        # ASCII: a kill within a character would leave a file that is no UTF-8.
        return "".join(json.dumps({"row": row, "answer": answer}) + "\n" for row, answer in answers.items())

    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(lines(answered), encoding="utf-8")
    temporary.replace(path)
    with path.open("a", encoding="utf-8") as opened:
        def append(answers: Mapping[int, str]) -> None:
            opened.write(lines(answers))
            opened.flush()

        yield append
