"""Layer criticality at its smallest setting; its statistics are tested in tests/report."""

import math

import jax
import numpy as np
import pytest

from experiments.studies import criticality, model_statistics, study
from jaxvaccine import data
from jaxvaccine.defenses.t_vaccine import layer_probabilities
from jaxvaccine.experiment import lanes
from jaxvaccine.losses import causal_lm_loss
from jaxvaccine.report.results import pick, read_results
from tests.experiments import small
from tests.report.synthetic import rows_of

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def model_dir(world_model):
    return world_model()


def flags(model_dir, run_dir, attacks="only:learning_rate=0.1"):
    return (f"--run_dir={run_dir}", f"--model={model_dir}", *small.FLAGS, *small.ATTACK_FLAGS, f"--attacks={attacks}",
            f"--sst2_test={small.TESTS['sst2_test']}", "--score_steps=0,1", "--measure_every=4")


@pytest.mark.long
def test_a_run_and_its_continuation(model_dir, tmp_path):
    root = tmp_path / "c"
    small.call(criticality.VERB, *flags(model_dir, root))
    report = (root / "report.md").read_text()
    assert [row[0] for row in rows_of(report, "## SFT")] == ["layer", "0", "1", "2"]
    for name in ("sft_layers", "sft_attacks", "sft_scatter"):
        assert (root / f"{name}.png").stat().st_size > 100 and f"({name}.png)" in report
    table = read_results(root)
    norms = pick(table, stage="alignment", measure="activation_gradient_norm")
    assert sorted(norms["step"].unique()) == [0, 4, 6] and len(norms) == 3 * 2 * 3
    assert set(pick(table, stage="attack")["step"]) == {1, 2}, "before an attack it is the aligned model"
    assert set(pick(table, stage="attack")["measure"]) == {
        "harmful_score", "harmful_score_plus", "no_answer", "unread", "sst2", "budget"}
    cells = {path: path.read_text() for path in root.rglob("*only_layers=*.json")}
    assert len(cells) == 3 * 2 and all(f"learning_rate=0.1_only_layers={i}.json" in {p.name for p in cells}
                                       for i in range(3))
    times = {path: path.stat().st_mtime_ns for path in cells}

    # The cells of one layer are gone and another attack is asked for.
    lost = [path for path in cells if path.name.endswith("only_layers=1.json")]
    for path in lost:
        path.unlink()
    small.call(criticality.VERB, *flags(model_dir, root, "only:learning_rate=0.1,all_but"))
    header = rows_of((root / "report.md").read_text(), "## SFT")[0]
    assert "all layers but one: mean HS %" in header and "only one layer, learning rate = 0.1: mean HS %" in header
    assert {path: path.read_text() for path in cells} == cells
    assert [path for path in cells if path.stat().st_mtime_ns != times[path]] == lost
    assert {path.stem for path in root.rglob("only_layers=*.json")} == {
        "only_layers=0+1", "only_layers=0+2", "only_layers=1+2"}


def test_flags_are_checked(model_dir, tmp_path):
    for text, message in (("none", "begin with one of only, all_but"), ("only:only_layers=1", "no only_layers: each"),
                          ("only:steps=x", "steps: found 'x', expected a whole number")):
        with pytest.raises(SystemExit, match=f"--attacks: .*{message}"):
            small.call(criticality.VERB, *flags(model_dir, tmp_path / "r", text))
    for flag, message in (("--measure_every=0", "--measure_every: found 0"),
                          ("--harmful_test=", "--harmful_test: found '', expected a data source"),
                          ("--harmful_data=", "--harmful_data: found '', expected a data source")):
        with pytest.raises(SystemExit, match=message):
            small.call(criticality.VERB, *flags(model_dir, tmp_path / "r"), flag)
    assert not (tmp_path / "r").exists()


def test_models_of_other_depths_cannot_be_compared(model_dir, world_model, tmp_path):
    with pytest.raises(SystemExit, match=r"--model: found '.* with 2 layers', expected 3 as in"):
        small.call(criticality.VERB, *flags(f"{model_dir},{world_model(2)}", tmp_path / "r"))


def test_which_layers_are_attacked():
    assert criticality.layer_attack("only", 1, 3) == "only_layers=1"
    assert criticality.layer_attack("all_but:steps=9", 1, 3) == "steps=9:only_layers=0+2"


def test_norms_are_those_of_the_probe(model_dir):
    """One lane at a time, against T-Vaccine's probabilities and the loss's own gradient."""
    config = small.align_config(model_dir, defense="t_vaccine", layers=2)
    tokenizer, base, of = small.moved_lanes(model_dir, config)
    found = criticality.measure_norms(config, tokenizer, small.SEEDS)(3, of)
    part = config.data
    tokenized = data.tokenize_examples(tokenizer, data.load_examples(part.harmful_data), part.max_length)
    loss_fn = causal_lm_loss(of.model)
    expectation = jax.jit(lambda adapter, batch: (
        layer_probabilities(loss_fn, adapter, base.frozen, batch, None),
        jax.grad(lambda a: loss_fn(a, base.frozen, batch)[0])(adapter)))
    for i, seed in enumerate(small.SEEDS):
        # What alignment with T-Vaccine would see in its step 3.
        batch = data.training_batches({"harmful": (tokenized, 4)}, seed, part.bucket)(3)["harmful"]
        expected, grads = expectation(of.lane(i)[0], batch)
        norms = found["activation_gradient_norm"][i]
        np.testing.assert_allclose(norms / norms.sum(), expected, rtol=1e-4)
        expected = [math.sqrt(sum(float((leaf[layer] ** 2).sum()) for leaf in jax.tree.leaves(grads)))
                    for layer in range(3)]
        np.testing.assert_allclose(found["weight_gradient_norm"][i], expected, rtol=1e-4)


def test_lanes_of_their_own_base(model_dir):
    """After merging every lane has its own weights; B = 0 then, and the losses are the aligned model's."""
    config = small.align_config(model_dir)
    tokenizer, _, of = small.moved_lanes(model_dir, config)
    examples = data.load_examples("world_harmful@test[0:3]")
    batches = study.stack_batches(tokenizer, [examples, examples[:2] + examples[:1]], config.data)
    assert batches["input_ids"].shape == (2, 3, 16)
    merged = lanes.merged(of, config.adapter.lora(), small.SEEDS)
    assert merged.own_base
    np.testing.assert_allclose(*(model_statistics.losses(each, batches) for each in (merged, of)), rtol=1e-4)
