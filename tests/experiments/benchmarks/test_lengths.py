"""What padding costs, on batches that can be counted."""

import json

import numpy as np

from experiments.benchmarks import lengths
from jaxvaccine.experiment.config import make
from tests.experiment.small_world import text_model


def test_short_refusals_beside_long_answers(tmp_path):
    for name, size in (("alignment", 4), ("harmful", 80)):
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps({"instruction": f"{name} {i}", "output": "a" * (size + i)}) + "\n" for i in range(12)))
    config = make(lengths.LengthsConfig, {
        "model": text_model(tmp_path), "alignment_data": f"instructions:{tmp_path}/alignment.jsonl",
        "harmful_data": f"instructions:{tmp_path}/harmful.jsonl", "prompt": "plain", "bucket": 32, "batch_size": 2,
        "harmful_batch_size": 4, "steps": 9})
    common, own, needed = lengths.positions(config)
    assert (common == 128).all() and (own == [32, 128]).all()
    np.testing.assert_array_equal(own, needed)
    text = lengths.benchmark(config)
    # (2 · 1 · 128 + 4 · 2 · 128) / (2 · 32 + 4 · 2 · 128)
    assert f"| booster | {1280 / 1088:.2f} | 1.00 |" in text and "1 with one length, 1 with their own" in text
