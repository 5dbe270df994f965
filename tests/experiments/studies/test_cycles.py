"""Cycles of fine-tuning at their smallest: a chain of lanes against the same chain of run folders, and the report
against numbers by hand."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.studies import cycles as study
from experiments.studies.cycles import CyclesConfig
from jaxvaccine import data
from jaxvaccine.experiment import cycles as engine
from jaxvaccine.experiment import lanes
from jaxvaccine.experiment.align import align
from jaxvaccine.experiment.attack import attack
from jaxvaccine.experiment.config import change, make
from jaxvaccine.experiment.cycles import seed_of
from jaxvaccine.experiment.evaluate import evaluate
from jaxvaccine.experiment.evaluate_config import LOSS
from jaxvaccine.experiment.plans import cell_configs
from jaxvaccine.experiment.results import Cell
from jaxvaccine.experiment.run import make_settings
from jaxvaccine.report.results import pick, read_results
from tests.experiments import small
from tests.report import synthetic
from tests.report.synthetic import rows_of

pytestmark = pytest.mark.usefixtures("quick_compile")

SEED = 5


def flags(model_dir, root, *more):
    return (f"--run_dir={root}", f"--model={model_dir}", *small.FLAGS, *small.ATTACK_FLAGS, "--again_steps=3",
            "--layers=1", "--cycles=3", f"--sst2_test={small.TESTS['sst2_test']}", "--benign_test=", *more)


def chain_of_runs(model_dir, root, adapter):
    """{(stage, cycle): loss on harmful answers} of two users and an alignment between, each in a folder."""
    config = make(CyclesConfig, {"run_dir": "-", "model": (model_dir,), "recipe": "world", "seeds": (str(SEED),)})
    settings = make_settings(
        config, {**small.ALIGN, "layers": 1}, {**small.ATTACK, "adapter": adapter, "learning_rate": 5e-3},
        {**small.TESTS, "sst2_test": "", "benign_test": "", "loss_data": "world_harmful@test[0:4]"})
    found = {}

    def done(stage, cycle, folder):
        of = settings.scores
        found[stage, cycle] = evaluate(dataclasses.replace(
            of, model=dataclasses.replace(of.model, model="", trained=str(folder)),
            run=dataclasses.replace(of.run, run_dir=f"{folder}-scores", progress=False)))[LOSS]["loss"]
        return str(folder)

    def configs(method, user):
        return cell_configs(settings, root, Cell(model_dir, method, user, SEED))

    at = done("alignment", 0, align(change(configs("booster", "")[0], run_dir=str(root / "first"), progress=False)))
    for cycle, user in enumerate(("poison_ratio=0.5", "poison_ratio=0"), start=1):
        at = done("attack", cycle, attack(change(
            configs("booster", user)[1], aligned=at, run_dir=str(root / f"user{cycle}"), progress=False,
            seed=seed_of(SEED, cycle, "attack"))))
        if cycle == 1:
            at = done("alignment", 1, align(change(
                configs("t_vaccine:steps=3", "")[0], start=at, adapter=adapter, run_dir=str(root / "again"),
                progress=False, seed=seed_of(SEED, 1, "alignment"))))
    return found


@pytest.mark.long
@pytest.mark.parametrize("adapter", ["continue", "new"])
def test_lanes_are_the_runs(model_dir, tmp_path, monkeypatch, adapter):
    call = flags(model_dir, tmp_path / "a", "--defenses=booster", "--again=none,t_vaccine", "--cycles=2",
                 "--attacks=poison_ratio=0.5,poison_ratio=0", f"--attack_adapter={adapter}",
                 "--attack_learning_rate=5e-3", f"--again_adapter={adapter}", "--loss_data=world_harmful@test[0:4]")
    small.call(study.VERB, *call)
    table = read_results(tmp_path / "a")
    expected = chain_of_runs(model_dir, tmp_path / "runs", adapter)
    of = pick(table, measure=LOSS, seed=SEED, attack="again=t_vaccine:steps=3")
    losses = {(stage, step): value for stage, step, value in of[["stage", "step", "value"]].itertuples(index=False)}
    assert losses == pytest.approx(expected, rel=1e-4)
    assert len(set(losses.values())) == 4
    other = pick(table, measure=LOSS, seed=SEED, attack="again=none")
    assert set(zip(other["stage"], other["step"], strict=True)) == {("alignment", 0), ("attack", 1), ("attack", 2)}
    same, apart = (pick(other, step=step)["value"].item() - losses["attack", step] for step in (1, 2))
    assert same == 0 and apart != 0
    text = (tmp_path / "a" / "report.md").read_text()
    assert "Missing so far" not in text and (tmp_path / "a" / "cycles.png").stat().st_size > 1000
    # Again, nothing is trained; and nothing else is taken for it.
    monkeypatch.setattr(lanes, "train", lambda *args, **more: pytest.fail("trained"))
    small.call(study.VERB, *call)
    assert (tmp_path / "a" / "report.md").read_text() == text
    for flag, message in (("--cycles=3", "cycles: found 2, expected 3"), ("--again_steps=4", "again_steps: found 3"),
                          ("--attack_learning_rate=1e-3", "learning_rate: found 0.005, expected 0.001")):
        with pytest.raises(SystemExit, match=message):
            small.call(study.VERB, *call, flag)


def test_seeds():
    """The first fine-tuning is that of a plan's cell; no two links draw alike, of one run or of several."""
    assert seed_of(7, 1, "attack") == 7
    links = [(cycle, stage) for cycle in range(1, 9) for stage in ("attack", "alignment")]
    found = {seed_of(seed, *link) for seed in range(4) for link in links}
    assert len(found) == 4 * len(links) and all(0 <= seed < 2**32 for seed in found)


def config_of(**given):
    return make(CyclesConfig, {"run_dir": "r", "seeds": ("0", "1"), "defenses": ("sft",), "cycles": 2, **given})


def made_up(config, values):
    """values: {again: {(stage, step): HS}}; of seed 1 all are 2 more."""
    rows = []
    for again, of in values.items():
        for (stage, step), value in of.items():
            for seed in (0, 1):
                place = {"method": "sft", "attack": f"again={config.with_steps(again)}", "stage": stage, "step": step,
                         "seed": seed}
                rows += [synthetic.rate("harmful_score", value + 2 * seed, **place),
                         synthetic.rate("sst2", 90 - value / 2, **place)]
    return synthetic.frame(rows)


def test_the_report(tmp_path):
    config = config_of()
    values = {"none": {("alignment", 0): 0, ("attack", 1): 60, ("attack", 2): 50},
              "t_vaccine": {("alignment", 0): 0, ("attack", 1): 60, ("alignment", 1): 10, ("attack", 2): 20},
              "sft": {("alignment", 0): 0, ("attack", 1): 60, ("alignment", 1): 12, ("attack", 2): 26}}
    text = study.report(config, made_up(config, values), tmp_path)
    assert [[cell.split(" ±")[0] for cell in row[:5]] for row in rows_of(text, "## SFT")[1:]] == [
        ["0", "first alignment", "1.0", "1.0", "1.0"], ["1", "p = 0.1", "61.0", "61.0", "61.0"],
        ["1", "aligned again", "–", "11.0", "13.0"], ["2", "p = 0", "51.0", "21.0", "27.0"]]
    assert [[cell.split(" ±")[0] for cell in row[1:]] for row in rows_of(text, "What aligning again changes")[1:]] == [
        ["1, p = 0.1", f"aligned again with {name}, to {other}", "+0.0", "+0.0"] for name, other in (
            ("T-Vaccine", "not aligned again"), ("SFT", "not aligned again"), ("T-Vaccine", "aligned again with SFT"))
    ] + [["2, p = 0", "aligned again with T-Vaccine, to not aligned again", "-30.0", "+15.0"],
         ["2, p = 0", "aligned again with SFT, to not aligned again", "-24.0", "+12.0"],
         ["2, p = 0", "aligned again with T-Vaccine, to aligned again with SFT", "-6.0", "+3.0"]]
    assert study.harmful_cycles(config) == [1] and (tmp_path / "cycles.png").stat().st_size > 1000
    assert "Missing so far" not in text
    partly = study.report(config, made_up(config, {"none": values["none"]}), tmp_path)
    assert "Missing so far: 4 of 6 chains" in partly and "What aligning again changes" not in partly
    assert "Missing so far: 6 of 6" in study.report(config, synthetic.frame([]), tmp_path)


@pytest.mark.parametrize("more, expected", [
    (["--again=lisa"], "--again: found"), (["--again="], "--again: found"),
    (["--again=sft:steps=9"], "no steps: all have --again_steps"), (["--cycles=0"], "--cycles: found 0"),
    (["--attacks=poison_ratio=0.1:trains=all"], "train an adapter and leave one"),
    (["--attacks=poison_ratio=0.1:user_rows=similar:candidates=40"], "user_rows=drawn"),
    (["--defenses=sft+ewc"], "Fisher"), (["--defenses=t_vaccine", "--attacks=poison_ratio=0.1:only_layers=rarest:1"],
                                         "numbers of layers"),
    (["--again=t_vaccine:dtype=bfloat16"], "--again: found .*expected dtype=checkpoint, as sft, and not bfloat16"),
    (["--again=none,t_vaccine:quantisation=int8"], "--again: found .*quantisation=none, as sft"),
    (["--again=none,t_vaccine:prompt=plain"], "--again: found .*the plan sets it"),
    (["--attack_adapter=new", "--attack_rank=3"], "--again: found .*--again_adapter=new"),
    (["--rank=3", "--attack_rank=4"], "rank: found 4, expected 3")])
def test_flags(model_dir, tmp_path, more, expected):
    with pytest.raises(SystemExit, match=expected):
        small.call(study.VERB, *flags(model_dir, tmp_path / "a", "--defenses=sft", *more))
    assert not Path(tmp_path / "a").exists()


class FoundError(Exception):
    pass


def test_what_a_provider_reads_has_the_prompt_of_the_last_alignment(monkeypatch):
    """The whole of it, with its system prompt."""
    def tokenize(tokenizer, read, poisoned, part, aligned_prompt):
        raise FoundError(aligned_prompt)

    monkeypatch.setattr(engine, "tokenize_attack", tokenize)
    monkeypatch.setattr(engine, "read_data", lambda *of: (None, None))
    last = small.align_config(prompt="chat", system_prompt="Be kind.", supervise="last")
    of = SimpleNamespace(model=SimpleNamespace(lora=last.adapter.lora()))
    with pytest.raises(FoundError) as caught:
        engine._fine_tune(of, small.attack_config(), last, {}, None, [0])
    assert caught.value.args == (data.Prompt("chat", "Be kind.", "last"),)


def test_users_with_harmful_rows():
    config = config_of(attacks=("poison_ratio=0.00", "poison_ratio=0.1", "learning_rate=1e-4", "poison_ratio=0:n=9"),
                       cycles=4)
    assert study.harmful_cycles(config) == [2, 3]


def test_the_judge_is_asked_before_chains_are_trained(model_dir, tmp_path, monkeypatch):
    """Also where the first alignments are there already."""
    monkeypatch.setattr(engine, "carry_out", lambda *of, **more: None)
    monkeypatch.setattr(engine, "_made_of", lambda *of: {})

    def probe(judge, harm):
        raise FoundError(judge.judge, harm)

    monkeypatch.setattr(engine, "probe", probe)
    config = make(CyclesConfig, {"run_dir": "-", "model": (model_dir,), "recipe": "world", "defenses": ("sft",),
                                 "cycles": 1, "again": ("none",)})
    settings = make_settings(config, small.ALIGN, small.ATTACK, small.TESTS)
    with pytest.raises(FoundError, match=r"world.*True"):
        engine.run_cycles(config.make_cycles(), settings, tmp_path / "a", {})
