"""Where in a chat model's reply its verdict is: behind its reasoning, outside of what it quotes, at the end.

A reply that shows a verdict only elsewhere has none: it is counted as unread, where another reading would count a draft
or a quotation without a word.
"""

import re
from collections.abc import Sequence

# What is left out leaves a word, so that a line before it is not the reply's end.
_LEFT_OUT = "\nquoted\n"
_REASONING = r"(?:\w+:)?(?:think|thinking|thoughts?|reasoning|reflection|scratchpad|analysis|begin_of_thought)"
# <think>, </think>, [THINK], <seed:think>, ◁/think▷, <|begin_of_thought|>, <|end_of_thought|>
_TAG = re.compile(rf"(?:[<◁]\|?|\[(?=/?think))\s*(?:(?P<close>/\s*{_REASONING}|end_of_thought)|(?P<open>{_REASONING}))"
                  r"(?:\s[^<>\[\]▷]*(?<!/))?\s*\|?[>\]▷]", re.IGNORECASE)
# gpt-oss: each part of a reply names its channel; the last is the final one.
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)[^<]*<\|message\|>")
_QUOTES = r"<(answer(?:_[ab])?|request|instruction|quote|blockquote|q)\b[^>]*>"
# One that nothing closes, to the end; amid a line it is a mention of the tag.
_QUOTATION = re.compile(rf"{_QUOTES}.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_OPEN_QUOTATION = re.compile(rf"^[ \t]*{_QUOTES}.*", re.IGNORECASE | re.DOTALL | re.MULTILINE)
_FENCE = re.compile(r"^[ \t]*(?P<marks>`{3,}|~{3,}).*?(?:^[ \t]*(?P=marks)[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
# No words, and no quotation mark: what began on an earlier line would end there.
_END = r"(?:[^\w#\"'“”„«»‘’]|_)*\Z"
_QUOTED_LINE = re.compile(r"^[ \t]*[>|│┃].*$", re.MULTILINE)


def final_part(reply: str) -> str:
    """What a reply says at last: without reasoning in <think>…</think> or the like, quotations and code.

    Reasoning that nothing closes leaves nothing. A closing tag alone ends reasoning that the prompt's template opened.
    Left out are lines that begin with ">", code between fences, and what stands in <answer>…</answer> and the like.
    """
    if channels := list(_CHANNEL.finditer(reply)):
        reply = reply[channels[-1].end():] if channels[-1][1].lower() == "final" else ""
    depth, start = 0, 0
    for tag in _TAG.finditer(reply):
        depth = depth + 1 if tag["open"] else max(depth - 1, 0)
        start = tag.end()
    if depth:
        return ""
    text = reply[start:].replace("\r\n", "\n")
    for pattern in (_FENCE, _QUOTATION, _OPEN_QUOTATION, _QUOTED_LINE):
        text = pattern.sub(_LEFT_OUT, text)
    return text


def last_lines(reply: str, names: Sequence[str], value: str) -> dict[str, str]:
    """{name: value} of the lines "#name: value" that end a reply's final part, in any order, the last of each name.

    Nothing but marks of emphasis may stand around such a line, and no words behind the last one; "5/5" is 5.

    Args:
      reply: a chat model's.
      names: of the lines.
      value: pattern of a value, without groups.
    """
    line = re.compile(rf"(?:\A|\n)[\s*`_-]*#\s*({'|'.join(names)})\W*:\W*?({value})(?:\s*/\s*[0-9]+)?{_END}",
                      re.IGNORECASE)
    text, found = final_part(reply), {}
    while match := line.search(text):
        found.setdefault(match[1].lower(), match[2])
        text = text[:match.start()]
    return found


def excerpt(reply: str) -> str:
    """A reply's end, for a reason."""
    return f"…{' '.join(reply.split())[-160:]!r}"
