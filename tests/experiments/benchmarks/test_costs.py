"""Counted costs against XLA's where it can count, and by hand; the benchmark at its smallest setting."""

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import costs, step
from jaxvaccine import defenses, llama
from jaxvaccine.experiment.methods import ALIGNMENT, Tar
from jaxvaccine.losses import causal_lm_loss
from tests import tiny
from tests.experiments import small

pytestmark = pytest.mark.usefixtures("quick_compile")

ROWS, LENGTH = 2, 8


def cost_of(model, defense):
    shapes = llama.tree_shapes(model)
    rows = {"alignment": ROWS, "harmful": ROWS, "harmless": ROWS, "user": ROWS,
            "adversary": Tar().inner_steps * ROWS}
    batches = {of: dict.fromkeys(("input_ids", "labels", "attention_mask"),
                                 jax.ShapeDtypeStruct((count, LENGTH), jnp.int32)) for of, count in rows.items()}
    return costs.count(
        defense.gradient, shapes["lora"], shapes["params"], jax.eval_shape(defense.init, shapes["lora"]), batches,
        jax.eval_shape(lambda: jax.random.key(0)), layers=tiny.CONFIG.num_layers)


def gradient_cost(defense, remat="none"):
    model = tiny.model(remat=remat)
    return cost_of(model, defense(causal_lm_loss(model, block=4)))


def test_products_are_xlas():
    def fn(x, y):
        return jnp.einsum("bij,bkj->bik", x, y).sum() + (x[0].T @ y[1]).sum()

    x, y = jnp.ones((2, 3, 5)), jnp.ones((2, 7, 5))
    always, due = costs.count(fn, x, y[:, :3], layers=4)
    assert always.flops == 2 * (2 * 3 * 3 * 5 + 5 * 3 * 5) and due == costs.Cost()
    # XLA counts sums too.
    assert always.flops == pytest.approx(jax.jit(fn).lower(x, y[:, :3]).cost_analysis()["flops"], rel=0.2)


def test_loops_branches_and_what_nothing_needs():
    w, x = jnp.ones((4, 3, 3)), jnp.ones(3)

    def layers(x):
        return jax.lax.scan(lambda c, w: (c @ w, None), x, w)[0]

    def fn(x, due):
        _ = layers(x)  # never used
        return jax.lax.cond(due, layers, lambda x: x, layers(x))

    always, due = costs.count(fn, x, True, layers=4)
    assert always == due == costs.Cost(4 * 2 * 9, 1, 0)
    always, _ = costs.count(jax.grad(lambda x: layers(x).sum()), x, layers=4)
    assert always == costs.Cost(4 * 2 * 9, 0, 1)  # linear: nothing of the forward pass is needed

    def blocks(x):
        return jax.lax.map(lambda row: jax.lax.cond(row[0] > 0, lambda r: r @ w[0], lambda r: r, row), x)

    always, due = costs.count(blocks, jnp.ones((4, 3)), layers=4, share_of_blocks=0.5)
    assert (always, due) == (costs.Cost(2 * 2 * 9), costs.Cost())


@pytest.mark.long
def test_passes_of_every_method():
    """TAR: four steps of the attack, the tampered model, the retained one, and the reference forward alone."""
    model = tiny.model()
    found = {name: cost_of(model, defense) for name, defense in step.methods(model).items()}
    assert {name: (always.forward, always.backward) for name, (always, _) in found.items()} == {
        "sft": (1, 1), "vaccine": (2, 2), "t_vaccine": (2, 2), "booster": (3, 3), "repnoise": (2, 2), "tar": (7, 6),
        "booster on vaccine": (4, 4), "booster on t_vaccine": (4, 4), "booster on repnoise": (4, 4),
        "booster on tar": (9, 8), "lisa, while fine-tuning": (1, 1), "ewc, while fine-tuning": (1, 1),
        "kl, while fine-tuning": (2, 1)}
    assert {name for name, (_, due) in found.items() if due != costs.Cost()} == {"t_vaccine", "booster on t_vaccine"}


def test_a_probe_falls_due():
    always, due = gradient_cost(lambda loss_fn: defenses.t_vaccine(loss_fn, layers=2))
    vaccine, _ = gradient_cost(defenses.vaccine)
    assert always == vaccine
    assert (due.forward, due.backward) == (1, 1) and 0 < due.flops < vaccine.flops / 2


def test_a_forward_pass_by_hand():
    config = tiny.CONFIG
    tokens, size, heads = ROWS * LENGTH, config.hidden_size, config.num_heads * config.head_dim
    kv, rank = config.num_kv_heads * config.head_dim, 4
    shapes = [(size, heads), (size, kv), (size, kv), (heads, size), *2 * [(size, config.intermediate_size)],
              (config.intermediate_size, size)]
    layer = sum(i * o + rank * (i + o) for i, o in shapes) + 2 * LENGTH * heads
    expected = 2 * tokens * (config.num_layers * layer + size * config.vocab_size)
    model = tiny.model(remat="none")
    shapes = llama.tree_shapes(model)
    batch = dict.fromkeys(("input_ids", "labels", "attention_mask"), jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32))
    always, _ = costs.count(lambda a, f: causal_lm_loss(model)(a, f, batch_of(batch))[0], shapes["lora"],
                            shapes["params"], layers=config.num_layers)
    assert always.flops == expected


def batch_of(shapes):
    return {name: jnp.ones(shape.shape, shape.dtype) for name, shape in shapes.items()}


def test_rematerialisation_costs_a_forward_pass():
    none, full = (gradient_cost(defenses.sft, remat)[0].flops for remat in ("none", "full"))
    assert 1.2 < full / none < 1.6


@pytest.mark.long
def test_the_benchmark(monkeypatch):
    monkeypatch.setattr(step, "named_architecture", lambda model: tiny.CONFIG)
    everything = step.variants(tiny.model())
    assert {*ALIGNMENT, "booster on repnoise", "lisa, while fine-tuning", "sft, remat=none"} <= set(everything)
    monkeypatch.setattr(step, "variants", lambda model: {
        name: defense for name, defense in step.methods(model).items() if name in ("sft", "t_vaccine")})
    config = step.BenchmarkConfig(rows=1, length=8, supervised=4, repeats=2, rank=2)
    found = step.benchmark(config)
    assert "| sft | 1.00 (1.00–1.00) | 1.00 | 1.00 | 1 + 1 |" in found
    assert "| t_vaccine | " in found
    assert "t_vaccine: a step in which its probe falls due costs" in found


def test_flags_are_checked():
    for flag, name in (("--rows=0", "rows"), ("--supervised=96", "supervised"), ("--repeats=0", "repeats")):
        with pytest.raises(SystemExit, match=f"--{name}: found"):
            small.call(step.VERB, flag)
