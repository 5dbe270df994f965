"""The optimizer's parts against torch.optim, torch's clipping and transformers' schedules, in float64."""

import math

import jax
import numpy as np
import optax
import pytest

from jaxvaccine import optim

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("float64", "quick_compile")

L, SHAPE = 4, (3, 2)


def prefix(per, drawn):
    """What is given as trainable, from masks [3, L] of the leaves attention.a, attention.b and mlp.a."""
    if per == "layer":
        return drawn[0]
    if per == "block":
        return {"attention": drawn[0], "mlp": drawn[2]}
    return {"attention": {"a": drawn[0], "b": drawn[1]}, "mlp": {"a": drawn[2]}}


@pytest.mark.parametrize("clip_norm", [0.0, 0.7, 1e6])
@pytest.mark.parametrize("per, frozen", [("layer", 0.0), ("layer", 0.6), ("block", 0.6), ("leaf", 0.6)])
def test_adamw_with_frozen_parameters(clip_norm, per, frozen):
    """Twenty steps; what is frozen in a step is a parameter without a gradient, as PyTorch's trainer leaves it."""
    steps, rng = 20, np.random.default_rng(0)
    masks = rng.random((steps, 3, L)) >= frozen
    masks[0], masks[1] = False, True
    if per == "layer":
        masks[:, 1:] = masks[:, :1]
    elif per == "block":
        masks[:, 1] = masks[:, 0]
    params = {"attention": {"a": rng.normal(size=(L, *SHAPE)), "b": rng.normal(size=(L, 2, 5))},
              "mlp": {"a": rng.normal(size=(L, *SHAPE))}}
    config = optim.OptimizerConfig(1e-2, "cosine", warmup_ratio=0.1, weight_decay=0.1, clip_norm=clip_norm)
    optimizer = optim.layer_masked_adamw(config, steps)
    state, update = optimizer.init(params), jax.jit(optimizer.update)

    torch_leaves = [[torch.tensor(leaf[i], requires_grad=True) for i in range(L)] for leaf in jax.tree.leaves(params)]
    torch_params = [parameter for leaf in torch_leaves for parameter in leaf]
    adamw = torch.optim.AdamW(torch_params, lr=1e-2, weight_decay=0.1)
    schedule = transformers.get_scheduler("cosine", adamw, 2, steps)
    for mask in masks:
        leaves, structure = jax.tree.flatten(params)
        grads = [rng.normal(size=leaf.shape) * on[:, None, None] for leaf, on in zip(leaves, mask, strict=True)]
        updates, state = update(structure.unflatten(grads), state, params, trainable=prefix(per, mask))
        params = optax.apply_updates(params, updates)
        for parameter, gradient, on in zip(torch_params, (g for leaf in grads for g in leaf), mask.flat, strict=True):
            parameter.grad = torch.tensor(gradient) if on else None
        if clip_norm and mask.any():
            torch.nn.utils.clip_grad_norm_(torch_params, clip_norm)
        adamw.step()
        schedule.step()
        for found, expected in zip(jax.tree.leaves(params), torch_leaves, strict=True):
            np.testing.assert_allclose(found, [p.detach().numpy() for p in expected], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("factor", [0.0, 1e-4, 0.1, 1.0, 50.0])
def test_clip(factor):
    rng = np.random.default_rng(0)
    grads = {"a": factor * rng.normal(size=(L, 3)), "b": factor * rng.normal(size=(L,))}
    found, _ = optim.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
    tensors = [torch.tensor(g, requires_grad=True) for g in grads.values()]
    for tensor in tensors:
        tensor.grad = tensor.detach().clone()
    torch.nn.utils.clip_grad_norm_(tensors, 1.0)
    for ours, theirs in zip(found.values(), tensors, strict=True):
        np.testing.assert_allclose(ours, theirs.grad, rtol=1e-12)


@pytest.mark.parametrize("steps, ratio", [(1, 0.0), (1, 1.0), (7, 0.0), (7, 0.1), (30, 0.1), (30, 0.5), (7, 1.0)])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedule(name, steps, ratio):
    warmup = math.ceil(steps * ratio)
    adamw = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=3e-3)
    theirs = transformers.get_scheduler("constant_with_warmup" if name == "constant" else name, adamw, warmup, steps)
    expected = []
    for _ in range(steps):
        expected.append(theirs.get_last_lr()[0])
        adamw.step()
        theirs.step()
    ours = optim.learning_rate_schedule(optim.OptimizerConfig(3e-3, name, ratio), steps)
    np.testing.assert_allclose([float(ours(np.int32(step))) for step in range(steps)], expected, rtol=1e-6, atol=1e-15)
