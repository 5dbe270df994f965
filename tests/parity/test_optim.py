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


def steps_of_both(config, made_by, masks, per):
    """Parameters after each step, ours and PyTorch's; what is frozen in a step is a parameter without a gradient, as
    PyTorch's trainer leaves it.

    Args:
      config: ours.
      made_by: PyTorch's optimizer of parameters [out, in], as PyTorch has them: ours are [in, out].
      masks: [steps, 3, L], as of `prefix`.
      per: as of `prefix`.
    """
    steps, rng = len(masks), np.random.default_rng(0)
    params = {"attention": {"a": rng.normal(size=(L, *SHAPE)), "b": rng.normal(size=(L, 2, 5))},
              "mlp": {"a": rng.normal(size=(L, *SHAPE))}}
    optimizer = optim.layer_masked_optimizer(config, steps)
    state, update = optimizer.init(params), jax.jit(optimizer.update)

    torch_leaves = [[torch.tensor(leaf[i].T.copy(), requires_grad=True) for i in range(L)]
                    for leaf in jax.tree.leaves(params)]
    torch_params = [parameter for leaf in torch_leaves for parameter in leaf]
    theirs = made_by(torch_params)
    schedule = transformers.get_scheduler(config.schedule, theirs, math.ceil(steps * config.warmup_ratio), steps)
    for mask in masks:
        leaves, structure = jax.tree.flatten(params)
        grads = [rng.normal(size=leaf.shape) * on[:, None, None] for leaf, on in zip(leaves, mask, strict=True)]
        updates, state = update(structure.unflatten(grads), state, params, trainable=prefix(per, mask))
        params = optax.apply_updates(params, updates)
        for parameter, gradient, on in zip(torch_params, (g for leaf in grads for g in leaf), mask.flat, strict=True):
            parameter.grad = torch.tensor(gradient.T.copy()) if on else None
        if config.clip_norm and mask.any():
            torch.nn.utils.clip_grad_norm_(torch_params, config.clip_norm)
        theirs.step()
        schedule.step()
        yield jax.tree.leaves(params), [np.stack([p.detach().numpy().T for p in leaf]) for leaf in torch_leaves]


def frozen_masks(steps, frozen, per):
    masks = np.random.default_rng(1).random((steps, 3, L)) >= frozen
    masks[0], masks[1] = False, True
    if per == "layer":
        masks[:, 1:] = masks[:, :1]
    elif per == "block":
        masks[:, 1] = masks[:, 0]
    return masks


@pytest.mark.parametrize("clip_norm", [0.0, 0.7, 1e6])
@pytest.mark.parametrize("per, frozen", [("layer", 0.0), ("layer", 0.6), ("block", 0.6), ("leaf", 0.6)])
def test_adamw_with_frozen_parameters(clip_norm, per, frozen):
    config = optim.OptimizerConfig(1e-2, "cosine", warmup_ratio=0.1, weight_decay=0.1, clip_norm=clip_norm)
    for ours, theirs in steps_of_both(config, lambda of: torch.optim.AdamW(of, lr=1e-2, weight_decay=0.1),
                                      frozen_masks(20, frozen, per), per):
        for found, expected in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


def decoupled(optimizer, decay):
    """A PyTorch optimizer with decoupled decay, which SGD would add to the gradient; Adafactor scales by the weights as
    they were, which its own decay leaves it."""
    if isinstance(optimizer, torch.optim.Adafactor):
        optimizer.param_groups[0]["weight_decay"] = decay
        return optimizer

    def shrink(*_):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.mul_(1 - group["lr"] * decay)
    optimizer.register_step_pre_hook(shrink)
    return optimizer


def normalised(parameters):
    """SGD of g / (‖g‖ + 1e-7), the norm over all parameters that have a gradient."""
    sgd = torch.optim.SGD(parameters, lr=1e-2)

    def normalise(*_):
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = torch.sqrt(sum((g * g).sum() for g in grads)) if grads else None
        for gradient in grads:
            gradient.div_(norm + 1e-7)
    sgd.register_step_pre_hook(normalise)
    return sgd


OTHERS = {
    "sgd": lambda of: torch.optim.SGD(of, lr=1e-2),
    "momentum": lambda of: torch.optim.SGD(of, lr=1e-2, momentum=0.9),
    "normalised_sgd": normalised,
    "adafactor": lambda of: torch.optim.Adafactor(of, lr=1e-2),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_optimizers_with_frozen_parameters(kind):
    """As PyTorch's, with the decay decoupled. Optax has Adafactor's t^−0.8 in float32."""
    config = optim.OptimizerConfig(1e-2, "linear", 0.1, 0.1, 0.0 if kind == "normalised_sgd" else 0.7, kind)
    rtol = 1e-6 if kind == "adafactor" else 1e-12
    for ours, theirs in steps_of_both(config, lambda of: decoupled(OTHERS[kind](of), 0.1),
                                      frozen_masks(20, 0.6, "leaf"), "leaf"):
        for found, expected in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol / 100)


def test_muons_first_step():
    """Of PyTorch's, in bfloat16; from the second step on Optax corrects a bias that PyTorch leaves."""
    config = optim.OptimizerConfig(1e-2, weight_decay=0.1, clip_norm=0.0, kind="muon")
    (ours, theirs), = steps_of_both(config, lambda of: torch.optim.Muon(of, lr=1e-2, weight_decay=0.1),
                                    np.ones((1, 3, L), bool), "layer")
    rng = np.random.default_rng(0)
    before = [rng.normal(size=leaf.shape) for leaf in ours]
    for found, expected, start in zip(ours, theirs, before, strict=True):
        assert np.abs(found - start).min() > 0
        np.testing.assert_allclose(found, expected, atol=0.03 * 1e-2 * 2)


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
