"""The benchmark of generation at its smallest: all ways give the same answers, and the ratios are the speeds'."""

import pytest

from experiments.benchmarks import generation
from tests.experiments import small

pytest.importorskip("torch")


@pytest.mark.long
def test_compare(model_dir):
    text = generation.compare(model_dir, "embedded_benign@test", count=3, singles=2, max_new_tokens=4,
                                        batch_sizes=[2], rows=[2], dtype="float32", repeats=1)
    assert text.startswith("3 prompts of embedded_benign@test (2 of them one at a time)") and "median of 1" in text
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    rows = {row[0]: row[1:] for row in table[2:]}
    assert list(rows) == [generation.ONE, "transformers, batches of 2", "jaxvaccine, 2 rows"]
    assert all(row[-1] == "2/2" for row in rows.values()), "other answers than one at a time"
    one, batches, ours = (float(row[0]) for row in rows.values())
    assert float(rows["jaxvaccine, 2 rows"][1]) == pytest.approx(ours / one, rel=0.05, abs=0.06)
    assert float(rows["jaxvaccine, 2 rows"][2]) == pytest.approx(ours / batches, rel=0.05, abs=0.006)
    assert rows["transformers, batches of 2"][2] == "1.00"


def test_more_prompts_than_there_are(model_dir):
    with pytest.raises(ValueError, match=r"--prompts: found 100000, expected at most the \d+ of embedded_benign@test"):
        generation.compare(model_dir, "embedded_benign@test", 100000, 1, 4, [2], [2], "float32", 1)


def test_flags_are_checked():
    for flag in ("prompts", "repeats", "max_new_tokens", "single_prompts"):
        with pytest.raises(SystemExit, match=f"--{flag}: found 0, expected at least 1"):
            small.call(generation.VERB, f"--{flag}=0")


def test_timing():
    timing = generation.Timing([[1, 2, 3], [4]], seconds=2.0, cpu_seconds=8.0)
    assert (timing.per_second(), timing.per_second(cpu=True)) == (2.0, 0.5)
