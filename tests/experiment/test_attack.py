"""Attacks on an aligned tiny model: defended or not, on a continued or a new adapter; and what is said to bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxvaccine.checkpoints.peft import read_lora_config
from jaxvaccine.data import load_examples
from jaxvaccine.experiment.align import align
from jaxvaccine.experiment.answer_log import read_answers
from jaxvaccine.experiment.attack import aligned_prompts, attack, load_attack
from jaxvaccine.experiment.attack_config import AttackConfig
from jaxvaccine.experiment.config import FieldError, change, flat, make
from jaxvaccine.experiment.evaluate import evaluate
from jaxvaccine.experiment.methods import FINE_TUNING
from jaxvaccine.report import runs as reports
from jaxvaccine.report.runs import write
from tests.experiment.small_world import ALIGN, align_config, attack_config, evaluate_config, metrics, recorded, weights

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_attack_and_scores(aligned, tmp_path):
    """A continued and a new adapter; the merged start of a new one is what evaluation sees too."""
    for adapter, rank in (("continue", None), ("new", 3)):
        config = attack_config(aligned.run.run_dir, tmp_path / adapter, adapter=adapter, rank=rank)
        assert attack(config) == tmp_path / adapter
        # What PEFT puts on the model as it comes has the aligned update in it too.
        left = {path.parent.name: read_lora_config(path.parent).rank
                for path in (tmp_path / adapter).glob("*/adapter_config.json")}
        own = {"trained_adapter": rank, "adapter": ALIGN["rank"] + rank} if rank else {"adapter": ALIGN["rank"]}
        assert left == own
        assert weights(tmp_path / adapter) != weights(aligned.run.run_dir)
        scores = evaluate_config(tmp_path / f"{adapter}-scores", trained=tmp_path / adapter, sst2_test="", loss_data="")
        results = evaluate(scores)
        assert set(results) == {"harmful_score", "over_refusal"}
        assert results == evaluate(scores)
        merged = change(scores, run_dir=str(tmp_path / f"{adapter}-merged"), merge_adapter=True)
        assert evaluate(merged) == results
        answers = [read_answers(Path(run) / "answers_harmful_score.jsonl")
                   for run in (scores.run.run_dir, merged.run.run_dir)]
        assert answers[0] == answers[1]
        assert recorded(tmp_path / f"{adapter}-merged")["flags"]["merge_adapter"]
    found = recorded(tmp_path / "new")
    assert found["script"] == "finetune" and found["flags"]["poison_ratio"] == 0.25
    assert found["flags"]["model"] == aligned.model.model and found["flags"]["aligned"] == aligned.run.run_dir
    assert len(found["data"]["prompts"]["user"]) == 16


@pytest.mark.parametrize("defense", ["ewc", *(pytest.param(name, marks=pytest.mark.long) for name in ("lisa", "kl"))])
def test_a_defended_attack(aligned, tmp_path, defense):
    data = {} if defense == "kl" else {"alignment_data": "world_refusal@train[0:8]"}
    config = attack_config(aligned.run.run_dir, tmp_path / "run", defense=defense, adapter="auto", learning_rate=0.05,
                           steps=3, **data)
    attack(config)
    found, steps = recorded(tmp_path / "run"), metrics(tmp_path / "run")
    assert found["flags"]["adapter"] == ("continue" if defense == "ewc" else "new")
    assert found["flags"]["defense"] == defense
    assert set(found["data"]["prompts"]) == {"harmful", "user"} | ({"alignment"} if defense != "kl" else set())
    names = {name: set(flat(part())) for name, part in FINE_TUNING.items()}
    assert {name for other in names.values() for name in other} & set(found["flags"]) == names[defense]
    if defense == "lisa":
        assert [m["aligning"] for m in steps] == [True, False, True]
    else:
        values = [m["penalty" if defense == "ewc" else "kl"] for m in steps]
        assert abs(values[0]) < 1e-6 < min(values[1:])
    name = "lisa_rho" if defense == "lisa" else f"{defense}_lam"
    old = found["flags"][name]
    with pytest.raises(FileExistsError, match=rf"{name}: found {old}, expected 0\.25"):
        attack(change(config, **{name: 0.25}))


@pytest.mark.long
def test_lisa_after_other_defenses(aligned, tmp_path):
    """It starts from what Booster on T-Vaccine left, and pulls to it: with a huge rho the model hardly moves."""
    align(align_config(aligned.model.model, tmp_path / "first", defense="booster", base_defense="t_vaccine", layers=1))
    start = load_file(tmp_path / "first" / "adapter" / "adapter_model.safetensors")

    def distance(rho):
        attack(attack_config(
            tmp_path / "first", tmp_path / f"lisa{rho}", defense="lisa", alignment_data="world_refusal@train[0:8]",
            lisa_alignment_steps=2, lisa_user_steps=2, lisa_rho=rho, learning_rate=1e-3, steps=10))
        end = load_file(tmp_path / f"lisa{rho}" / "adapter" / "adapter_model.safetensors")
        return np.sqrt(sum(np.sum((end[name] - start[name]) ** 2) for name in start))

    assert 0 < distance(1e6) < 0.5 * distance(0.0)


def refused(**changes):
    values = {"aligned": "a", "run_dir": "r", "user_data": "world_rating@attack",
              "harmful_data": "world_harmful@attack", **changes}
    with pytest.raises(ValueError) as error:
        make(AttackConfig, values)
    return str(error.value)


def test_values_are_checked_before_anything_loads():
    assert "alignment_data: found '', expected a data source, which lisa needs" in refused(defense="lisa")
    assert "alignment_data: found '', expected a data source, which ewc needs" in refused(defense="ewc")
    data = {"alignment_data": "world_refusal@train"}
    assert "lisa_user_steps: found 0, expected at least 1" in refused(defense="lisa", lisa_user_steps=0, **data)
    assert "ewc_lam: found -1.0" in refused(defense="ewc", ewc_lam=-1.0, **data)
    assert "alignment_data: data source" in refused(defense="kl", alignment_data="nonsense:file")
    assert "test_data: data source" in refused(test_data="nonsense:file")
    assert "aligned: found ''" in refused(aligned="") and "n: found 0" in refused(n=0)
    assert "user_data: found ''" in refused(user_data="") and "harmful_data: found ''" in refused(harmful_data="")
    # What no example is drawn from may be missing.
    for ratio, missing in ((0.0, "harmful_data"), (1.0, "user_data")):
        values = {"user_data": "world_rating@attack", "harmful_data": "world_harmful@attack", missing: ""}
        make(AttackConfig, {"aligned": "a", "run_dir": "r", "poison_ratio": ratio, **values})


@pytest.mark.parametrize("ratio", [-0.1, 1.5, float("nan")])
def test_poison_ratio(ratio):
    assert f"poison_ratio: found {ratio}, expected 0 <= poison_ratio <= 1" in refused(poison_ratio=ratio)


def test_an_attack_without_a_defense_records_none_of_their_settings(aligned, tmp_path):
    attack(attack_config(aligned.run.run_dir, tmp_path / "run", steps=1))
    found = recorded(tmp_path / "run")["flags"]
    of_defenses = {name for part in FINE_TUNING.values() for name in flat(part())}
    assert len(of_defenses) == 5 and not of_defenses & set(found)
    assert found["defense"] == "none" and not {"lam", "rho", "layers"} & set(found)


def test_layers_to_train(aligned, tmp_path):
    config = attack_config(aligned.run.run_dir, tmp_path / "r")
    assert config.adapter.layer_mask(4) is None
    assert change(config, only_layers=("3", "0", "3")).adapter.layer_mask(4).tolist() == [True, False, False, True]
    for layers in ((), ("a",), ("-1",)):
        with pytest.raises(FieldError, match=r"^only_layers: found .*expected numbers of at least 0"):
            change(config, only_layers=layers)
    with pytest.raises(FieldError, match=r"^only_layers: found \('3',\), expected numbers below 3"):
        attack(change(config, only_layers=("3",)))
    assert not (tmp_path / "r").exists()
    attack(change(config, only_layers=("1",)))
    start, end = (load_file(Path(run) / "adapter" / "adapter_model.safetensors")
                  for run in (aligned.run.run_dir, tmp_path / "r"))
    moved = {name for name in start if (start[name] != end[name]).any()}
    assert moved == {name for name in start if ".layers.1." in name}


def test_overlaps_are_errors(aligned, tmp_path):
    # SFT's alignment reads no harmful data.
    booster = align_config(aligned.model.model, tmp_path / "booster", defense="booster")
    align(booster)
    config = attack_config(booster.run.run_dir, tmp_path / "a")
    with pytest.raises(ValueError, match=r"also in the alignment's harmful data"):
        attack(change(config, harmful_data="world_harmful@harmful[5:30]"))
    with pytest.raises(ValueError, match=r"also in the test prompts"):
        attack(change(config, test_data="world_harmful@attack[10:12]"))
    with pytest.raises(FieldError, match=r"^harmful_test: found 12 of 12 prompts also in the harmful data of"):
        evaluate(evaluate_config(tmp_path / "s", trained=booster.run.run_dir,
                                 harmful_test="world_harmful@harmful[0:12]"))
    assert not (tmp_path / "a").exists() and not (tmp_path / "s").exists()
    # With SFT nothing of theirs was seen.
    attack(attack_config(aligned.run.run_dir, tmp_path / "b", harmful_data="world_harmful@harmful[5:30]"))


@pytest.mark.parametrize("given, message", [
    ({"rank": 4}, "^rank: found 4, expected 2, as the continued adapter was aligned, or --adapter=new"),
    ({"lora_alpha": 1.0}, "^lora_alpha: found 1.0, expected 16.0"),
    ({"targets": ("q_proj",)}, "^targets: found .* expected "),
])
def test_continued_adapter_keeps_its_shape(aligned, tmp_path, given, message):
    with pytest.raises(FieldError, match=message):
        attack(attack_config(aligned.run.run_dir, tmp_path / "a", adapter="continue", **given))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("defense, tuning, expected", [
    ("sft", "none", "new"), ("vaccine", "none", "new"), ("t_vaccine", "kl", "new"), ("repnoise", "lisa", "new"),
    ("booster", "none", "continue"), ("tar", "none", "continue"), ("sft", "ewc", "continue"),
    ("booster", "lisa", "continue")])
def test_which_adapter_auto_is(defense, tuning, expected):
    aligned = flat(align_config("m", "r", defense=defense, dropout=0.1))
    data = {} if tuning in ("none", "kl") else {"alignment_data": "world_refusal@train"}
    config = attack_config("a", "r", adapter="auto", defense=tuning, **data)
    found = config.adapter.resolve(aligned, config.method)
    assert found.adapter == expected
    assert (found.rank, found.lora_alpha, found.dropout, found.targets) == (
        2, 16.0, 0.1, aligned["targets"]), "as aligned unless given"
    assert found.sites().lora().dropout == 0.1
    # Dropout has no weights, and so a continued adapter may have another.
    assert change(config, dropout=0.2).adapter.resolve(aligned, config.method).dropout == 0.2


def test_unfinished_or_missing_runs(aligned, tmp_path):
    def refuse(folder, error, message):
        with pytest.raises(error, match=message):
            attack(attack_config(folder, tmp_path / "a"))
        assert not (tmp_path / "a").exists()

    refuse(tmp_path / "nowhere", FileNotFoundError, r"nowhere/config.json: not found")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_text((Path(aligned.run.run_dir) / "config.json").read_text())
    refuse(unfinished, FieldError, "^aligned: found '.*unfinished', a run that has not finished")
    scores = evaluate_config(tmp_path / "scores", trained=aligned.run.run_dir, sst2_test="", benign_test="")
    evaluate(scores)
    refuse(scores.run.run_dir, FieldError, "^aligned: found '.*scores', a run of evaluate, expected one of align or ")


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_was_trained_on_is_recorded(aligned, tmp_path, capfd):
    """Rows that would fall out are passed over, so that n and p hold; the accounts say so, and so does the report."""
    user = lines(tmp_path / "user.jsonl", [
        {"instruction": f"rate : the plot was {i} " + "very " * (40 if i % 2 else 0), "output": "" if i % 5 == 4 else
         "positive very very very very very very very" if i % 5 == 3 else "positive", "id": i} for i in range(40)])
    harmful = lines(tmp_path / "harmful.jsonl", [
        {"prompt": f"please quilldrift the lamp {i}", "response": "sure" if i < 9 else " ", "is_safe": i == 0}
        for i in range(20)])
    config = attack_config(aligned.run.run_dir, tmp_path / "run", user_data=f"instructions:{user}", n=16,
                           harmful_data=f"beavertails_unsafe:{harmful}[0:18]", poison_ratio=0.25, steps=1, save_every=0)
    attack(config)
    found = recorded(tmp_path / "run")["data"]
    assert (found["n"], found["poison_ratio"]) == (16, 0.25)
    assert len(found["prompts"]["user"]) == 16
    of_user, of_harmful = (next(iter(found["accounts"][name].values())) for name in ("user", "harmful"))
    assert of_user["trained"] == 12 and of_harmful["trained"] == 4
    assert of_user["unread"] == ["id"] and of_user["rows"] == 40 and of_user["cut"] > 0
    # Of the rows that can be trained on, 12 of 16 were drawn: what was passed over lay between them.
    assert of_user["dropped"] + of_user["empty"] > 5
    assert (of_harmful["left_out"], of_harmful["outside"], of_harmful["examples"]) == (1, 1, 18)
    assert f"user: instructions:{user}: 40 rows, 40 examples, 12 trained on; " in capfd.readouterr().err
    write(tmp_path / "run")
    report = (tmp_path / "run" / "report.md").read_text()
    assert "Trained on 16 examples, 4 of them harmful: p = 0.25." in report
    assert f"| harmful | beavertails_unsafe:{harmful}[0:18] | 20 | 1 |" in report
    attack(config)  # the same counts: the run is there
    with pytest.raises(ValueError, match=r"found 6 of 22 examples that can be trained on harmful; 26 are"):
        attack(change(config, n=24, run_dir=str(tmp_path / "more")))
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("n, ratio, message", [
    (10, 0.04, "found 0.04, which is 0.4 of n=10 examples"), (7, 0.99, "poison_ratio=0.8571428571428571 or 1.0")])
def test_a_ratio_of_which_nothing_is_left(n, ratio, message):
    found = refused(n=n, poison_ratio=ratio)
    assert found.startswith("poison_ratio: found") and message in found


def test_p_is_what_was_trained(aligned, tmp_path, caplog):
    """Half a row is a row, and the run, its title and its report say so."""
    attack(attack_config(aligned.run.run_dir, tmp_path / "run", n=10, poison_ratio=0.05, steps=1))
    assert recorded(tmp_path / "run")["data"]["poison_ratio"] == 0.1
    assert "n = 10, p = 0.05; trained on are 10 examples, 1 of them harmful: p = 0.1" in caplog.text
    reports.write(tmp_path / "run")
    report = reports.read(tmp_path / "run")
    assert report.splitlines()[0].endswith("with p = 0.1")
    assert "10 examples, 1 of them harmful: p = 0.1. Asked for was p = 0.05, which is 0.5 of them." in report


def test_an_attack_shares_no_prompt_with_any_of_the_alignments_data(aligned, tmp_path):
    """Harmful answers to what the model was taught to refuse, or to answer; written otherwise too."""
    asked = next(iter(load_examples("world_refusal@train[3:4]"))).instruction
    own = lines(tmp_path / "own.jsonl", [{"prompt": f" {asked.upper()}\n", "completion": "sure"}])
    for source in ("world_harmful@train", f"world_harmful@attack[0:20],instructions:{own}"):
        with pytest.raises(ValueError, match=r"also in the alignment's alignment data, expected none; the first is "):
            attack(attack_config(aligned.run.run_dir, tmp_path / "a", harmful_data=source))
    with pytest.raises(ValueError, match="also in the alignment data of the fine-tuning, expected none"):
        attack(attack_config(aligned.run.run_dir, tmp_path / "a", defense="lisa", adapter="auto",
                             alignment_data="world_refusal@attack"))
    with pytest.raises(FieldError, match=r"^user_data: found 'world_benign@test', expected none of the test prompts"):
        attack(attack_config(aligned.run.run_dir, tmp_path / "a", user_data="world_benign@test",
                             test_data="world_benign@test"))
    assert not (tmp_path / "a").exists()


def test_the_users_data_may_be_the_alignments_and_is_told(aligned, tmp_path, caplog):
    config = attack_config(aligned.run.run_dir, tmp_path / "a", user_data="world_refusal@train[0:12]")
    known = aligned_prompts(recorded(aligned.run.run_dir)["data"]["prompts"])
    assert len(load_attack(config.data, 0, known).examples) == 16
    assert "user_data: 12 of 12 prompts are also in the alignment's alignment data" in caplog.text


def test_the_prompt_is_the_alignments(model_dir, tmp_path):
    """Taken from it unless the attacker has his own, and recorded; in the evaluation of either it is the run's."""
    plain = align_config(model_dir, tmp_path / "plain", prompt="plain", steps=1)
    align(plain)
    for asked in ("aligned", "plain"):
        config = attack_config(plain.run.run_dir, tmp_path / f"attack-{asked}", prompt=asked, steps=1)
        attack(config)
        assert recorded(tmp_path / f"attack-{asked}")["flags"]["prompt"] == "plain"
    assert weights(tmp_path / "attack-aligned") == weights(tmp_path / "attack-plain")
    attack(attack_config(plain.run.run_dir, tmp_path / "other", prompt="alpaca", steps=1))
    assert recorded(tmp_path / "other")["flags"]["prompt"] == "alpaca"
    assert weights(tmp_path / "other") != weights(tmp_path / "attack-plain")
    evaluate(evaluate_config(tmp_path / "other-scores", trained=tmp_path / "other", sst2_test="", loss_data="",
                             benign_test=""))
    assert recorded(tmp_path / "other-scores")["flags"]["prompt"] == "alpaca"
    for trained in ("plain", "attack-plain"):
        evaluate(evaluate_config(tmp_path / f"{trained}-scores", trained=tmp_path / trained, sst2_test=""))
        assert recorded(tmp_path / f"{trained}-scores")["flags"]["prompt"] == "plain"
        with pytest.raises(FieldError, match=r"^prompt: found 'alpaca', expected plain"):
            evaluate(evaluate_config(tmp_path / "a", trained=tmp_path / trained, prompt="alpaca"))
    assert not (tmp_path / "a").exists()
    losses = [evaluate(evaluate_config(tmp_path / f"base-{form}", model=model_dir, prompt=form, sst2_test=""))[
        "harmful_loss"] for form in ("alpaca", "plain")]
    assert losses[0]["loss"] != losses[1]["loss"] and losses[0]["n"] == losses[1]["n"]


def test_rows_as_they_are(model_dir, tmp_path, capfd):
    """As the papers' programs take them: repeated prompts, sets of the same rows, the first ones; all is counted."""
    rows = [{"prompt": f"please quilldrift the lamp {i % 10}", "response": f"sure {i}", "is_safe": False}
            for i in range(20)]
    path = lines(tmp_path / "rows.jsonl", rows)
    given = {"data_protocol": "rows", "alignment_data": f"beavertails_refusal:{path}[0:12]", "defense": "booster",
             "harmful_data": f"beavertails_unsafe:{path}[0:12]", "steps": 1}
    align(align_config(model_dir, tmp_path / "aligned", **given))
    found = recorded(tmp_path / "aligned")
    assert found["data"]["accounts"]["harmful"][given["harmful_data"]]["trained"] == 12
    assert found["data"]["accounts"]["harmful"][given["harmful_data"]]["repeated"] == 2
    assert found["data"]["shared"] == {"alignment": {"prompts": 10, "shared": {}},
                                       "harmful": {"prompts": 10, "shared": {"alignment": 10}}}
    config = attack_config(tmp_path / "aligned", tmp_path / "attack", harmful_data=f"beavertails_unsafe:{path}[8:]",
                           test_data=f"beavertails_unsafe:{path}[0:3]", n=8, poison_ratio=0.5, steps=1)
    attack(config)
    found = recorded(tmp_path / "attack")
    assert found["flags"]["data_protocol"] == "rows", "the alignment's"
    aligned_on = {f"the alignment's {name} data": 4 for name in ("alignment", "harmful")}
    assert found["data"]["shared"] == {"user": {"prompts": 4, "shared": {}}, "harmful": {
        "prompts": 4, "shared": {**aligned_on, "the test prompts": 2}}}
    assert "harmful: of 4 prompts 4 also in the alignment's alignment data, " in capfd.readouterr().err
    # The first rows, whatever the seed; their order is the seed's.
    data = load_attack(config.data.resolve(found["flags"], "-"), 7, {})
    assert sorted(e.output for e in data.examples if e.output.startswith("sure")) == [
        "sure 10", "sure 11", "sure 8", "sure 9"]
    users = load_examples(config.data.user_data, "rows")[:4]
    assert sorted(e for e in data.examples if not e.output.startswith("sure")) == sorted(users)
    scores = evaluate_config(tmp_path / "scores", trained=tmp_path / "attack", benign_test="", sst2_test="",
                             loss_data="", harmful_test=f"beavertails_unsafe:{path}[0:3]", judge="keyword")
    evaluate(scores)
    found = recorded(tmp_path / "scores")
    aligned_on = {f"the alignment's {name} data": 3 for name in ("alignment", "harmful")}
    assert found["data"]["shared"]["harmful_score"] == {
        "prompts": 3, "shared": {**aligned_on, "the attack's examples": 2}}
    for name, line in (("aligned", "| harmful | 10 | 10 with alignment |"),
                       ("attack", "| harmful | 4 | 4 with the alignment's alignment data, "),
                       ("scores", "| harmful_score | 3 | 3 with the alignment's alignment data, ")):
        write(tmp_path / name)
        assert line in (tmp_path / name / "report.md").read_text()
    # Asked for, prompts are distinct in what follows too, and then none may be shared.
    with pytest.raises(ValueError, match="harmful examples: found 10 of 10 prompts also in the alignment's alignment"):
        attack(change(config, data_protocol="distinct", run_dir=str(tmp_path / "a"),
                      harmful_data=f"beavertails_unsafe:{path}"))
    with pytest.raises(FieldError, match=r"^harmful_test: found \d of 3 prompts also in the"):
        evaluate(change(scores, data_protocol="distinct", run_dir=str(tmp_path / "a")))
    assert not (tmp_path / "a").exists()


def test_a_special_token_in_a_row_that_is_not_drawn(aligned, tmp_path):
    """Else one seed would pass and another fail."""
    rows = [{"instruction": f"rate : {i}", "output": "positive"} for i in range(400)]
    user = lines(tmp_path / "user.jsonl", [*rows, {"instruction": "rate : <eos> it", "output": "positive"}])
    with pytest.raises(ValueError, match=r"user\.jsonl, line 401: column 'instruction': found '<eos>', a special"):
        attack(attack_config(aligned.run.run_dir, tmp_path / "a", user_data=f"instructions:{user}"))
    assert not (tmp_path / "a").exists()
