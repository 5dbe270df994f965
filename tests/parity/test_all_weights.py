"""Full-parameter fine-tuning against transformers' models under torch.optim.AdamW."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
import transformers

from experiments.parity import pytorch_reference
from experiments.parity.steps import TINY, tiny_batch
from jaxvaccine import llama, optim, training
from jaxvaccine.attacks import all_weights
from jaxvaccine.checkpoints.hugging_face import load_model, save_model
from jaxvaccine.checkpoints.tensor_names import tensor_sites
from jaxvaccine.experiment.attack import estimator
from jaxvaccine.experiment.methods import Undefended
from jaxvaccine.experiment.objectives import Plain
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compile", "one_torch_thread")

STEPS = 5
OPTIMIZER = optim.OptimizerConfig(5e-3, "linear", warmup_ratio=0.2, weight_decay=0.1, clip_norm=0.5)


def named(config, tree):
    """{Hugging Face's name: its tensor} of the model's weights."""
    leaves = {tuple(key.key for key in path): np.asarray(leaf)
              for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    found = {}
    for name, site in tensor_sites(config).items():
        leaf = leaves[site.path] if site.layer is None else leaves[site.path][site.layer]
        found[name] = leaf.T if site.transposed else leaf
    return found


def torch_loss(base, batch):
    tensors = pytorch_reference.tensors_of(batch)
    logits = base(input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"]).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tensors["labels"][:, 1:].flatten())


def close(found, expected, tolerance, what):
    for name, theirs in expected.items():
        difference = np.linalg.norm(found[name] - theirs) / np.linalg.norm(theirs)
        assert difference <= tolerance, f"{what}: {name}: {difference:.2g}"


@pytest.mark.parametrize("family, dtype, first, later", [
    pytest.param("llama", "float32", 1e-5, 1e-3, marks=pytest.mark.long), ("qwen2", "float64", 1e-11, 1e-9),
    pytest.param("llama", "float64", 1e-11, 1e-9, marks=pytest.mark.long)])
def test_steps(family, dtype, first, later, tmp_path):
    """Gradients of all weights, clipped by their common norm, and what AdamW makes of them; tied heads, biases."""
    config = tiny.FAMILIES.get(family, TINY)
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        source = llama.Llama(config)
        drawn = llama.init_frozen(source, jax.random.key(0))
        # Biases that are not zero, norms that are not one, and layers that differ visibly.
        noise = np.random.default_rng(1)
        drawn = jax.tree.map(lambda x: jnp.asarray(
            (8 * x if x.ndim == 3 else x) + 0.1 * noise.normal(size=x.shape), x.dtype), drawn)
        save_model(source, drawn, tmp_path / "model")
        model, frozen = load_model(tmp_path / "model", dtype=dtype)
        base = pytorch_reference.load_base(str(tmp_path / "model"), dtype)
        parameters = dict(base.named_parameters())
        adamw = torch.optim.AdamW(base.parameters(), lr=OPTIMIZER.learning_rate, weight_decay=OPTIMIZER.weight_decay)
        schedule = transformers.get_scheduler("linear", adamw, 1, STEPS)
        remember = optax.GradientTransformation(lambda w: w, lambda updates, state, params=None: (updates, updates))
        optimizer = optax.chain(remember, optim.layer_masked_adamw(OPTIMIZER, STEPS))
        defense = estimator(Plain(), Undefended(), model, STEPS, None, None)
        state = training.init_train_state(all_weights.to_train(frozen), defense, optimizer)
        step = training.make_train_step(defense, optimizer)
        rng = np.random.default_rng(0)
        for i in range(STEPS):
            batch = tiny_batch(rng, 4, 16)
            state, metrics = step(state, {}, {"user": batch}, jax.random.key(0))
            adamw.zero_grad()
            loss = torch_loss(base, batch)
            loss.backward()
            gradients = {name: p.grad.numpy().copy() for name, p in parameters.items()}
            norm = torch.nn.utils.clip_grad_norm_(base.parameters(), OPTIMIZER.clip_norm)
            adamw.step()
            schedule.step()
            assert float(norm) > OPTIMIZER.clip_norm, "clipping is not at work"
            np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=later)
            np.testing.assert_allclose(metrics["gradient_norm"], norm.item(), rtol=later)
            close(named(config, all_weights.unstacked(state.optimizer[0])), gradients, later if i else first,
                  f"gradient of step {i}")
        found = named(config, all_weights.to_model(model, state.adapter))
        assert set(found) == set(parameters)
        close(found, {name: p.detach().numpy() for name, p in parameters.items()}, later, "weights")
        start = named(config, frozen)
        assert all(np.abs(found[name] - start[name]).max() > 1e-3 for name in found), "something did not move"
