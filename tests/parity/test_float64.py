"""Every method against plain PyTorch in float64, where differences of meaning can't hide behind rounding."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from experiments.parity import pytorch_reference
from experiments.parity import steps as parity
from tests import rounding
from tests.parity import suite

pytestmark = pytest.mark.usefixtures("float64", "quick_compile", "one_torch_thread")


# One that stands on another method says what the others would.
ON_ANOTHER = [name for name, values in parity.METHODS.items() if "base_defense" in values]
LONG = {name: pytest.mark.long for name in {*ON_ANOTHER, "t_vaccine_released", "t_vaccine", "tar"} - {
    "t_vaccine_booster"}}


@pytest.mark.parametrize("method", [pytest.param(name, marks=LONG.get(name, ())) for name in parity.METHODS])
def test_steps(method, tiny_dir):
    suite.check(suite.tiny_problem(tiny_dir, method, "float64"), suite.FLOAT64)


@pytest.mark.long
def test_released_freezing_in_a_deep_model(tmp_path):
    """More than 26 layers, where the MLP adapters of one layer more train."""
    deep = dataclasses.replace(parity.TINY, num_layers=28, hidden_size=16, intermediate_size=24)
    problem = suite.tiny_problem(
        tmp_path / "model", "t_vaccine_released", "float64", deep, steps=4, sample_every=1, layers=3,
        targets=("v_proj", "up_proj"))
    records = suite.check(problem, suite.FLOAT64)
    for record in records:
        first = record.active_layers.argmax()
        trained = np.abs(record.gradient["layers"]["mlp"]["up_proj"]["a"]).max(axis=(1, 2)) > 0
        np.testing.assert_array_equal(trained, np.arange(28) >= first - 1)
    assert any(record.active_layers.argmax() > 1 for record in records), "nothing was lost"


def test_the_float64_reference_is_transformers(tiny_dir):
    """What was replaced for float64 computes what transformers computes in float32."""
    import torch

    problem = suite.tiny_problem(tiny_dir, "sft", steps=1)
    batch = problem.batches[0]["alignment"]
    ids, mask = (torch.tensor(batch[name], dtype=torch.long) for name in ("input_ids", "attention_mask"))
    exact, usual = (pytorch_reference.load_base(tiny_dir, dtype)(input_ids=ids, attention_mask=mask).logits.detach()
                    for dtype in ("float64", "float32"))
    assert exact.dtype == torch.float64
    supervised = batch["attention_mask"].astype(bool)
    difference = np.abs(exact.numpy() - usual.numpy())[supervised].max()
    assert 1e-9 < difference < rounding.forward(parity.TINY, exact.numpy()[supervised])
