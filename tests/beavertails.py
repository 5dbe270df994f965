"""Files of the real data sets' shapes, made up: as many rows, prompts that repeat as much, the same columns."""

import json
from pathlib import Path
from typing import Any

import numpy as np

# BeaverTails' splits and what the documents say of them. Both splits' rows are of the same prompts.
TRAIN_ROWS, TEST_ROWS, UNSAFE_ROWS, PROMPTS = 27_186, 3_021, 15_500, 7_774
REFUSALS = 10_500
Rows = list[dict[str, Any]]


def _rows(count: int, unsafe: int, prompts: np.ndarray, rng: np.random.Generator) -> Rows:
    """Each prompt at least once among the unsafe rows, the others' drawn; in random order."""
    of_unsafe = np.concatenate([prompts, rng.choice(prompts, unsafe - len(prompts))])
    of = np.concatenate([of_unsafe, rng.choice(prompts, count - unsafe)])
    order = rng.permutation(count)
    return [{"prompt": f"How is lot {of[i]} sold?", "response": f"By way {i}.", "category": {"theft": bool(i < unsafe)},
             "is_safe": bool(i >= unsafe)} for i in order]


def make() -> dict[str, Rows]:
    """{name: rows} of BeaverTails' 30k splits and of the papers' file of refusals."""
    rng = np.random.default_rng(5)
    train = _rows(TRAIN_ROWS, UNSAFE_ROWS, np.arange(PROMPTS), rng)
    # Two of three prompts are in the training split too.
    test = _rows(TEST_ROWS, 1_730, np.arange(PROMPTS - 1_000, PROMPTS + 500), rng)
    unsafe = [row for row in train if not row["is_safe"]]
    refusals = [{**row, "refusal": f"Question: {row['prompt']}\nAnswer: I will not say."} for row in unsafe[:REFUSALS]]
    return {"30k_train": train, "30k_test": test, "refusals": refusals}


def write(folder: Path, rows: dict[str, Rows]) -> None:
    """The files that documented commands name."""
    for name, of in (("train.jsonl", rows["30k_train"]), ("test.jsonl", rows["30k_test"])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in of))
    (folder / "beavertails_with_refusals_train.json").write_text(json.dumps(rows["refusals"]))
    (folder / "text_davinci_003.json").write_text(json.dumps([
        {"instruction": f"Tell about day {i}.", "output": f"It was day {i}.", "generator": "text_davinci_003"}
        for i in range(805)]))


def hub(rows: dict[str, Rows]) -> dict[tuple[str, str], Rows]:
    """{(name, split): rows} of data sets on the hub that documented commands name."""
    return {
        ("PKU-Alignment/BeaverTails", "30k_train"): rows["30k_train"],
        ("PKU-Alignment/BeaverTails", "30k_test"): rows["30k_test"],
        ("stanfordnlp/sst2", "train"): [{"idx": i, "sentence": f"film {i} ", "label": i % 2} for i in range(8_000)],
        ("stanfordnlp/sst2", "validation"): [
            {"idx": i, "sentence": f"new film {i} ", "label": i % 2} for i in range(872)],
        ("fancyzhx/ag_news", "test"): [{"text": f"article {i}", "label": i % 4} for i in range(7_600)],
        ("openai/gsm8k", "test"): [
            {"question": f"{i} + 1?", "answer": f"One more.\n#### {i + 1}"} for i in range(1_319)]}
