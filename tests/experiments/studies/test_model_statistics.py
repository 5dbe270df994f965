"""Model statistics at their smallest setting."""

import jax
import numpy as np
import pytest

from experiments.studies import model_statistics
from jaxvaccine import data, defenses
from jaxvaccine.experiment.config import make
from jaxvaccine.json_files import read_json
from jaxvaccine.losses import causal_lm_loss
from jaxvaccine.report.results import pick, read_results
from tests.experiments import small

pytestmark = pytest.mark.usefixtures("quick_compile")

# Four harmful examples wherever some are measured compile faster.
PROBE = "world_harmful@harmful[0:4]"


@pytest.fixture(scope="module")
def model_dir(world_model):
    return world_model()


def flags(model_dir, run_dir, *more):
    return (f"--run_dir={run_dir}", f"--model={model_dir}", *small.FLAGS, *small.ATTACK_FLAGS, "--defenses=sft",
            "--attacks=poison_ratio=0.2", "--score_steps=0", "--measure_every=4", f"--harmful_probe={PROBE}", *more)


@pytest.mark.long
def test_a_run_and_its_continuation(model_dir, tmp_path):
    root = tmp_path / "s"
    small.call(model_statistics.VERB, *flags(model_dir, root))
    report = (root / "report.md").read_text()
    # Start, middle and end of the alignment, and four measures along the attack.
    assert report.count("| SFT |") == 3 + 4 and report.count("| method | step 0 | step 2 |") == 4
    assert (root / "statistics.png").stat().st_size > (root / "report.md").stat().st_size > 100
    table = read_results(root)
    for measure in model_statistics.ALIGNMENT:
        rows = pick(table, stage="alignment", measure=measure)
        assert sorted(zip(rows["step"], rows["seed"], strict=True)) == [(step, seed) for step in (0, 4, 6)
                                                                        for seed in small.SEEDS]
    for measure in (*model_statistics.ATTACK, "harmful_score"):
        rows = pick(table, stage="attack", measure=measure)
        # HS before the attack is that of the aligned model.
        steps = (2,) if measure == "harmful_score" else (0, 2)
        assert sorted(zip(rows["step"], rows["seed"], strict=True)) == [(step, seed) for step in steps
                                                                        for seed in small.SEEDS]
    cells = {path: path.read_text() for path in root.rglob("*.json") if path.parent != root}
    lost = [path for path in cells if path.name == "poison_ratio=0.2.json"]
    assert len(lost) == 2 and read_json(lost[0])["answers"].keys() == {"2"}

    for path in lost:
        path.unlink()
    small.call(model_statistics.VERB, *flags(model_dir, root))
    assert (root / "report.md").read_text() == report
    assert {path: path.read_text() for path in cells} == cells


@pytest.mark.long
def test_booster_has_measures_of_its_own(model_dir, tmp_path):
    """h(w) of the probe is another number than that of a training step's batch, and that of --loss_data another."""
    root = tmp_path / "s"
    small.call(model_statistics.VERB, *flags(
        model_dir, root, "--defenses=booster", "--measure_every=5", "--loss_data=world_harmful@test[0:2]"))
    rows = pick(read_results(root), stage="alignment", seed=0)
    found = {measure: pick(rows, measure=measure)["step"].tolist() for measure in (
        "harmful_probe_loss", "batch_harmful_loss", "harmful_loss")}
    assert found == {"harmful_probe_loss": [0, 5, 6], "batch_harmful_loss": [0, 5], "harmful_loss": [6]}


@pytest.mark.long
def test_what_is_measured(model_dir):
    """Against the loss of every lane by itself, and Booster's metrics."""
    aligned, attacked = small.align_config(model_dir), small.attack_config(poison_ratio=0.2, prompt="alpaca")
    tokenizer, base, of = small.moved_lanes(model_dir, aligned)
    config = make(model_statistics.StatisticsConfig, {
        "run_dir": "r", "model": (model_dir,), "harmful_probe": PROBE, "step_length": 0.3})
    probes = model_statistics.make_probes(config)
    attacking = probes.attack(aligned, attacked, tokenizer, small.SEEDS)(0, of)
    aligning = probes.alignment(aligned, tokenizer, small.SEEDS)(0, of)
    booster = defenses.booster(causal_lm_loss(of.model), alpha=0.3)
    gradient = jax.jit(lambda adapter, batch: booster.gradient(
        adapter, base.frozen, (), {"alignment": batch, "harmful": batch}, None)[2])

    def metrics(examples):
        tokenized = data.tokenize_examples(tokenizer, examples, 16)
        return gradient(of.lane(i)[0], data.collate(tokenized, range(len(tokenized.input_ids)), 16))

    part = attacked.data
    user, harmful = (data.load_examples(source) for source in (part.user_data, part.harmful_data))
    for i, seed in enumerate(small.SEEDS):
        poisoned = data.poison(user, harmful, part.n, 0.2, seed)
        found = metrics([example for example in poisoned if example in harmful])
        assert attacking["harmful_training_loss"][i] == pytest.approx(float(found["harmful_loss"]), rel=1e-4)
        assert attacking["harmful_gradient_norm"][i] == pytest.approx(float(found["harmful_gradient_norm"]), rel=1e-4)
        found = metrics(data.load_examples(part.test_data))
        assert attacking["harmful_test_loss"][i] == pytest.approx(float(found["harmful_loss"]), rel=1e-4)
        found = metrics(data.load_examples(PROBE))
        assert aligning["harmful_probe_loss"][i] == pytest.approx(float(found["harmful_loss"]), rel=1e-4)
        reduction = float(found["harmful_loss"] - found["perturbed_harmful_loss"])
        assert aligning["reduction"][i] == pytest.approx(reduction, rel=1e-3)
    assert not np.allclose(*attacking["harmful_training_loss"], rtol=1e-3)


def test_the_length_of_a_step_is_boosters():
    """Its alpha; of a method without one, the flag's."""
    config = make(model_statistics.StatisticsConfig, {"run_dir": "r", "step_length": 0.3})
    for defense, expected in ((("sft", {}), 0.3), (("booster", {"alpha": 0.7}), 0.7)):
        aligned = small.align_config(defense=defense[0], **defense[1])
        assert model_statistics.step_length(config, aligned) == expected


def test_flags_are_checked(model_dir, tmp_path):
    for flag, message in (
            ("--measure_every=0", "--measure_every: found 0"), ("--harmful_probe=", "--harmful_probe: found ''"),
            ("--harmful_probe=nonsense@x", "--harmful_probe: "), ("--step_length=0", "--step_length: found 0.0"),
            ("--harmful_test=", "--harmful_test: found '', expected"),
            ("--attacks=poison_ratio=0",
             "--attacks: found 'poison_ratio=0', expected an attack with harmful examples")):
        with pytest.raises(SystemExit, match=message):
            small.call(model_statistics.VERB, *flags(model_dir, tmp_path / "r", flag))
    assert not (tmp_path / "r").exists()
