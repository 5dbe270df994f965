"""The loss against transformers' LlamaForCausalLM(labels=...).loss, float32."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from experiments.parity import pytorch_reference
from jaxvaccine.checkpoints import hugging_face
from jaxvaccine.losses import causal_lm_loss
from tests import rounding
from tests.parity import suite

pytestmark = pytest.mark.usefixtures("quick_compile", "one_torch_thread")


def test_loss(tiny_dir):
    import torch

    problem = suite.tiny_problem(tiny_dir, "sft", steps=1, targets=("q_proj",), max_length=20)
    lora = problem.config.adapter.lora()
    model, frozen = hugging_face.load_model(tiny_dir, lora=lora, remat="none")
    loss_fn = jax.jit(causal_lm_loss(model, block=8))
    reference = pytorch_reference.TorchModel(
        pytorch_reference.load_base(tiny_dir, "float32"), lora, problem.adapter)
    batch = problem.batches[0]["alignment"]
    full = batch | {"labels": np.where(batch["attention_mask"] == 1, batch["input_ids"], -100).astype(np.int32)}
    row_without = batch | {"labels": np.where(np.arange(4)[:, None] == 1, -100, batch["labels"]).astype(np.int32)}
    for one in (batch, full, row_without):
        tensors = {name: torch.tensor(value, dtype=torch.long) for name, value in one.items()}
        theirs = reference.adapted(**tensors)
        expected = theirs.loss.item()
        # log softmax moves by at most twice what the logits do, and so does its mean.
        tolerance = 2 * rounding.forward(model.config, theirs.logits.detach().numpy())
        assert tolerance < 1e-3 * expected
        assert abs(float(loss_fn(problem.adapter, frozen, one)[0]) - expected) < tolerance
        assert abs(reference.loss(one).item() - expected) < tolerance
