"""Dry runs: they say what a run would do, raise what it would raise, and leave nothing."""

import dataclasses

import pytest

from jaxvaccine.experiment import dry_run, stage
from jaxvaccine.experiment.align import align
from jaxvaccine.experiment.attack import attack
from jaxvaccine.experiment.attack_config import AttackConfig
from jaxvaccine.experiment.config import FieldError, change, make
from jaxvaccine.experiment.dry_run import DryRun
from jaxvaccine.experiment.evaluate import evaluate
from jaxvaccine.experiment.evaluate_config import EvaluateConfig
from jaxvaccine.experiment.runs import read_config
from tests.experiment.small_world import ATTACK, SCORES, align_config, world_model

DRY, CARD = DryRun(dry_run=True), DryRun(dry_run=True, card="rtx_4090")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return world_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def aligned(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "aligned"
    align(align_config(model_dir, folder))
    return folder


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("defense", ["sft", "t_vaccine", "booster", "repnoise", "tar"])
def test_an_alignment(model_dir, tmp_path, monkeypatch, defense):
    """Rows and steps are the run's; the length is that of the longest row, to the bucket. No weights are loaded."""
    monkeypatch.setattr(stage, "load_base", None)
    config = align_config(model_dir, tmp_path / "run", defense=defense)
    text = dry_run.of_alignment(config, CARD)
    assert text.startswith("3 steps, padded to at most 16 tokens: alignment 24 examples, 4 a step")
    assert ("harmful 12 examples, 2 a step" in text) == (defense != "sft")
    assert ("adversary" in text) == (defense == "tar")
    assert "GiB, with remat=none: weights 0.00, adapter 0.00" in text and "by the formula" in text
    assert "rtx_4090: of 23.0 GiB beside CUDA's own, it fits in the 17.6 that JAX takes when it starts" in text
    assert not list(tmp_path.iterdir())


def test_without_a_card_all_of_them(model_dir, tmp_path):
    lines = dry_run.of_alignment(align_config(model_dir, tmp_path / "run"), DRY).splitlines()
    assert [line.partition(":")[0] for line in lines[3:]] == list(dry_run.CARDS)


def test_what_does_not_fit(model_dir, tmp_path, monkeypatch):
    """The flag that helps is said with what the run then takes."""
    monkeypatch.setattr(dry_run.memory, "card", lambda name: dry_run.Target(name, dry_run.GIB // 2 + 2**20, 2**20))
    text = dry_run.of_alignment(align_config(model_dir, tmp_path / "run", batch_size=64), CARD)
    assert "too few; largest batches 0" in text and "which is not enough" in text.splitlines()[-1]


@pytest.mark.parametrize("given, message", [
    ({"layers": 4, "defense": "t_vaccine"}, "layers: found 4, expected at most the model's 3 layers"),
    ({"max_length": 2}, "max_length"), ({"alignment_data": "world_refusal@train[900:]"}, "world_refusal"),
    ({"model": "no/such"}, "no/such"),
])
def test_the_runs_errors(model_dir, tmp_path, given, message):
    config = change(align_config(model_dir, tmp_path / "run"), **given)
    errors = []
    for go in (lambda: dry_run.of_alignment(config, DRY), lambda: align(config)):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            go()
        errors.append(str(error.value))
    assert errors[0] == errors[1] and not list(tmp_path.iterdir())


def test_a_folder_of_another_run(model_dir, aligned):
    """It is compared, with --overwrite it is not, and stays as it is in either case."""
    before = files(aligned)
    other = align_config(model_dir, aligned, learning_rate=0.5)
    with pytest.raises(FileExistsError, match=r"learning_rate: found 0\.01, expected 0\.5"):
        dry_run.of_alignment(other, DRY)
    dry_run.of_alignment(change(other, overwrite=True), DRY)
    dry_run.of_alignment(align_config(model_dir, aligned), DRY)
    assert files(aligned) == before


@pytest.mark.parametrize("given, said", [
    ({}, "user 16 examples, 4 a step"),
    ({"defense": "ewc", "alignment_data": "world_refusal@train[0:8]"}, "user 16 examples, 4 a step\n"),
    ({"defense": "lisa", "alignment_data": "world_refusal@train[0:8]"}, "alignment 8 examples, 4 a step"),
    ({"objective": "meta"}, "harmful 20 examples, 4 a step"),
])
def test_an_attack(aligned, tmp_path, given, said):
    config = make(AttackConfig, given, {**ATTACK, "aligned": str(aligned), "run_dir": str(tmp_path / "run")})
    before = files(aligned)
    text = dry_run.of_attack(config, CARD)
    assert text.startswith("2 steps, padded to at most ") and said in text and "rtx_4090: " in text
    assert files(aligned) == before and not list(tmp_path.iterdir())
    with pytest.raises(FieldError, match="only_layers"):
        dry_run.of_attack(change(config, only_layers=("7",)), DRY)


def test_an_evaluation(model_dir, aligned, tmp_path):
    """Of each test: its prompts, the rows decoded together and their positions. Rows that are given are those."""
    config = make(EvaluateConfig, {}, {**SCORES, "trained": str(aligned), "run_dir": str(tmp_path / "run")})
    before = files(aligned)
    text = dry_run.of_evaluation(config, CARD)
    assert "harmful_score: 4 prompts, 4 together, 16 positions each" in text and "over_refusal: 4 prompts" in text
    assert "keys and values 0.00" in text and "largest --eval_batch_size" in text
    assert text.count("rtx_4090: ") == 3 and files(aligned) == before and not list(tmp_path.iterdir())
    open_rows = change(config, eval_batch_size=None)
    assert "4 prompts, 4 together" in dry_run.of_evaluation(open_rows, CARD), "no more than there are prompts"
    untrained = make(EvaluateConfig, {}, {**SCORES, "model": model_dir, "run_dir": str(tmp_path / "run")})
    assert "harmful_score: 4 prompts" in dry_run.of_evaluation(untrained, DRY)


def test_an_attack_on_a_new_adapter_is_evaluated_with_it(aligned, tmp_path):
    folder = tmp_path / "attacked"
    attack(make(AttackConfig, {"adapter": "new", "rank": 3}, {**ATTACK, "aligned": str(aligned),
                                                              "run_dir": str(folder)}))
    assert dry_run._trained_lora(str(folder)).rank == 3 and dry_run._trained_lora(str(aligned)).rank == 2


def test_nothing_of_it_is_recorded(model_dir, aligned):
    """A run's flags are what they were before there were dry runs, so that its folder goes on."""
    config = read_config(aligned)
    assert not {"dry_run", "card"} & {*config["flags"], *config["operational"]}
    assert align(align_config(model_dir, aligned)) == aligned


@pytest.mark.long
def test_the_number_of_rows_may_change(model_dir, tmp_path):
    """Answers do not depend on it: a folder of an evaluation with 32 rows goes on with as many as fit."""
    config = make(EvaluateConfig, {**SCORES, "eval_batch_size": 32, "model": model_dir, "run_dir": str(tmp_path / "s")})
    found = evaluate(config)
    assert evaluate(change(config, eval_batch_size=None)) == found
    with pytest.raises(FileExistsError, match="max_new_tokens"):
        evaluate(change(config, max_new_tokens=3))


def test_a_card_is_for_dry_runs():
    with pytest.raises(FieldError, match="card: found 'rtx_4090', expected --dry_run beside it"):
        DryRun(card="rtx_4090")
    assert [target.name for target in dataclasses.replace(DRY).targets()] == list(dry_run.CARDS)
