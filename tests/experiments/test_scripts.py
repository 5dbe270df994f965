"""The scripts end to end on a tiny model directory, by their command lines, and what they say to bad input."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from safetensors.numpy import load_file

from experiments import align, config_flags, demo_smollm2, evaluate, finetune, presets, run
from jaxvaccine import save_model
from jaxvaccine.checkpoints.peft import read_lora_config
from tests import tiny

ROOT = Path(__file__).parents[2]
DATA = {
    "alignment_data": "embedded_refusal@train[0:24]",
    "harmful_data": "embedded_harmful@harmful[0:12]",
}
SMALL = {"steps": 3, "batch_size": 2, "harmful_batch_size": 2, "max_length": 400, "rank": 2, "remat": "none",
         "progress": False}
ATTACK = {"user_data": "embedded_sentiment@attack", "harmful_data": "embedded_harmful@attack[0:20]", "n": 20,
          "steps": 2, "batch_size": 2, "max_length": 400, "remat": "none", "progress": False}


@pytest.fixture(scope="module")
def aligned(model_dir, tmp_path_factory):
    run_dir = str(tmp_path_factory.mktemp("runs") / "sft")
    config = align.AlignConfig(model=model_dir, run_dir=run_dir, **DATA, **SMALL)
    align.align(config)
    return config


def weights(run_dir):
    return (Path(run_dir) / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_command_lines(model_dir, tmp_path):
    """run.py with Booster, and with Lisa after SFT; then again, which repeats nothing."""
    command = [
        sys.executable, "-m", "experiments.run", f"--run_dir={tmp_path}/grid", f"--model={model_dir}",
        "--defenses=booster,sft+lisa", "--poison_ratios=0.5", "--seeds=0,3",
        *(f"--{k}={v}" for k, v in {**DATA, **SMALL}.items()),
        *(f"--attack_{k}={ATTACK[k]}" for k in ("user_data", "harmful_data", "n", "steps", "batch_size", "max_length")),
        "--attack_alignment_steps=1", "--attack_user_steps=1",
        "--harmful_test=embedded_harmful@test[0:3]", "--sst2_test=embedded_sentiment@test[0:3]",
        "--benign_test=embedded_benign@test[0:3]", "--loss_data=embedded_harmful@test[0:3]",
        "--max_new_tokens=4", "--label_max_new_tokens=3"]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "| booster | attacked, p = 0.5 |" in first.stdout and "over seeds (0, 3)" in first.stdout
    grid = tmp_path / "grid"
    for cell in ("sft/seed0/aligned", "sft+lisa/seed3/p0.5", "booster/seed3/p0.5"):
        assert {"config.json", "metrics.jsonl", "metrics.png", "report.md", "adapter", "checkpoints"} <= {
            path.name for path in (grid / cell).iterdir()}
    assert (grid / "grid.png").stat().st_size > 1000
    lines = (grid / "booster/seed0/p0.5-scores/predictions_harmful_score.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert {"prompt", "answer", "verdict"} <= set(json.loads(lines[0]))
    before = {path: path.stat().st_mtime_ns for path in grid.rglob("*.safetensors")}
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert second.stdout == first.stdout
    assert before == {path: path.stat().st_mtime_ns for path in grid.rglob("*.safetensors")}


def test_attack_and_scores(aligned, tmp_path):
    """A continued and a new adapter; the merged start of a new one is what evaluation sees too."""
    for adapter, rank in (("continue", None), ("new", 3)):
        attack = finetune.FinetuneConfig(
            aligned=aligned.run_dir, run_dir=str(tmp_path / adapter), adapter=adapter, rank=rank, **ATTACK)
        finetune.finetune(attack)
        assert read_lora_config(tmp_path / adapter / "adapter").rank == (rank or SMALL["rank"])
        assert weights(attack.run_dir) != weights(aligned.run_dir)
        scores = evaluate.EvaluateConfig(
            trained=attack.run_dir, run_dir=str(tmp_path / f"{adapter}-scores"), max_new_tokens=3, progress=False,
            harmful_test="embedded_harmful@test[0:2]", benign_test="embedded_benign@test[0:2]")
        results = evaluate.evaluate(scores)
        assert set(results) == {"harmful_score", "over_refusal"}
        assert results == evaluate.evaluate(scores)
        merged = dataclasses.replace(scores, run_dir=str(tmp_path / f"{adapter}-merged"), merge_adapter=True)
        assert evaluate.evaluate(merged) == results
        answers = [json.loads((Path(run) / "answers_harmful_score.json").read_text())
                   for run in (scores.run_dir, merged.run_dir)]
        assert answers[0] == answers[1]
        assert json.loads((tmp_path / f"{adapter}-merged" / "config.json").read_text())["flags"]["merge_adapter"]
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["flags"]["poison_ratio"] == 0.1
    assert len(config["data"]["prompts"]["user"]) == 20


@pytest.mark.parametrize("defense", ["repnoise", "tar"])
def test_alignment_with_more_data(aligned, tmp_path, defense):
    """RepNoise's harmless answers and TAR's adversary; what other methods' runs record has not changed."""
    config = dataclasses.replace(aligned, run_dir=str(tmp_path / "run"), defense=defense, steps=2, inner_steps=2,
                                 harmless_data="embedded_refusal@harmful" if defense == "repnoise" else "")
    align.align(config)
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    if defense == "repnoise":
        assert metrics[0]["ascent"] > 0 and metrics[0]["noise"] > 0
        assert set(recorded["data"]["hashes"]) == {"alignment", "harmful", "harmless"}
        assert recorded["flags"]["noise_weight"] == 0.001 and "inner_steps" not in recorded["flags"]
    else:
        assert metrics[0]["tamper_loss"] < 0 and metrics[1]["hidden_distance"] > 0
        assert recorded["flags"]["adversary"] == "adamw" and "ascent_weight" not in recorded["flags"]
    assert weights(config.run_dir) != weights(aligned.run_dir)
    other = json.loads((Path(aligned.run_dir) / "config.json").read_text())["flags"]
    assert not {"ascent_weight", "inner_steps"} & set(other)


@pytest.mark.parametrize("defense", ["lisa", "ewc", "kl"])
def test_a_defended_attack(aligned, tmp_path, defense):
    attack = finetune.FinetuneConfig(
        aligned=aligned.run_dir, run_dir=str(tmp_path / "run"), defense=defense, learning_rate=0.05,
        **{**ATTACK, "steps": 3},
        alignment_data="" if defense == "kl" else "embedded_refusal@train[0:8]", alignment_steps=1, user_steps=1)
    finetune.finetune(attack)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert config["flags"]["adapter"] == ("continue" if defense == "ewc" else "new")
    assert config["flags"]["defense"] == defense
    assert set(config["data"]["prompts"]) == {"harmful", "user"} | ({"alignment"} if defense != "kl" else set())
    if defense == "lisa":
        assert [m["aligning"] for m in metrics] == [True, False, True]
    else:
        values = [m["penalty" if defense == "ewc" else "kl"] for m in metrics]
        assert abs(values[0]) < 1e-6 < min(values[1:])
    with pytest.raises(FileExistsError, match=r"kl_lam: found 0\.1, expected 0\.2"):
        finetune.finetune(dataclasses.replace(attack, kl_lam=0.2))


def test_lisa_after_other_defenses(aligned, tmp_path):
    """It starts from what Booster on T-Vaccine left, and pulls to it: with a huge rho the model hardly moves."""
    first = dataclasses.replace(
        aligned, run_dir=str(tmp_path / "first"), defense="booster", base_defense="t_vaccine", layers=1)
    align.align(first)
    start = load_file(tmp_path / "first" / "adapter" / "adapter_model.safetensors")

    def distance(rho):
        attack = finetune.FinetuneConfig(
            aligned=first.run_dir, run_dir=str(tmp_path / f"lisa{rho}"), adapter="continue", defense="lisa",
            alignment_data="embedded_refusal@train[0:8]", alignment_steps=2, user_steps=2, rho=rho,
            learning_rate=1e-3, **{**ATTACK, "steps": 10})
        finetune.finetune(attack)
        end = load_file(tmp_path / f"lisa{rho}" / "adapter" / "adapter_model.safetensors")
        return np.sqrt(sum(np.sum((end[name] - start[name]) ** 2) for name in start))

    assert 0 < distance(1e6) < 0.5 * distance(0.0)


def test_defenses_of_the_attack_are_checked():
    def error(**changes):
        with pytest.raises(ValueError) as raised:
            finetune.FinetuneConfig(aligned="a", run_dir="r", **{**ATTACK, **changes})
        return str(raised.value)

    assert "--alignment_data: found '', expected a data source, which --defense=lisa needs" in error(defense="lisa")
    data = {"alignment_data": "embedded_refusal@train"}
    assert "lisa: user_steps: found 0, expected at least 1" in error(defense="lisa", user_steps=0, **data)
    assert "ewc: lam: found -1.0" in error(defense="ewc", ewc_lam=-1.0, **data)
    assert "--alignment_data" in error(defense="kl", alignment_data="nonsense:file")


def test_an_attack_without_a_defense_records_what_it_always_did(aligned, tmp_path):
    """So that folders from before there were defenses can be continued."""
    attack = finetune.FinetuneConfig(aligned=aligned.run_dir, run_dir=str(tmp_path / "run"), **{**ATTACK, "steps": 1})
    finetune.finetune(attack)
    assert not set(finetune.DEFENSE_FLAGS) & set(json.loads((tmp_path / "run" / "config.json").read_text())["flags"])


def test_interrupted_run_continues(aligned, tmp_path, monkeypatch):
    """A run whose fourth step fails goes on from its checkpoint to the weights of a run that was never interrupted."""
    config = dataclasses.replace(aligned, run_dir=str(tmp_path / "run"), steps=5, save_every=2, defense="booster")
    align.align(dataclasses.replace(config, run_dir=str(tmp_path / "through")))
    import jaxvaccine.training as training

    make = training.make_train_step

    def failing(*arguments):
        step_fn, calls = make(*arguments), []

        def step(*args):
            calls.append(None)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return step_fn(*args)
        return step

    monkeypatch.setattr(training, "make_train_step", failing)
    with pytest.raises(KeyboardInterrupt):
        align.align(config)
    monkeypatch.setattr(training, "make_train_step", make)
    assert not (tmp_path / "run" / "adapter").exists()
    align.align(config)
    assert weights(config.run_dir) == weights(tmp_path / "through")
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(5))


def align_error(**changes):
    base = {"model": "m", "run_dir": "r", **DATA}
    with pytest.raises(ValueError) as error:
        align.AlignConfig(**{**base, **changes})
    return str(error.value)


def test_align_flags_are_checked_before_anything_loads():
    assert "--alignment_data: found ''" in align_error(alignment_data="")
    assert "--harmful_data: found '', expected a data source, which --defense=booster needs" in align_error(
        defense="booster", harmful_data="")
    assert "--alignment_data" in align_error(alignment_data="nonsense:file.jsonl")
    assert "--base_defense: found 'vaccine'" in align_error(base_defense="vaccine")
    assert "layers: found 0" in align_error(defense="t_vaccine", layers=0)
    assert "targets" in align_error(targets=("q_proj", "w_proj"))
    assert "learning_rate" in align_error(learning_rate=float("nan"))
    assert "--batch_size: found 0" in align_error(batch_size=0)
    assert "--run_dir: found ''" in align_error(run_dir="")


@pytest.mark.parametrize("ratio", [-0.1, 1.5, float("nan")])
def test_poison_ratio(ratio):
    with pytest.raises(ValueError, match=r"--poison_ratio: found .*expected 0 <= poison_ratio <= 1"):
        finetune.FinetuneConfig(aligned="a", run_dir="r", user_data="embedded_sentiment@attack",
                                harmful_data="embedded_harmful@attack", poison_ratio=ratio)


def test_layers_to_train(aligned, tmp_path):
    attack = finetune.FinetuneConfig(aligned=aligned.run_dir, run_dir=str(tmp_path / "r"), **ATTACK)
    assert attack.layer_mask(4) is None
    assert dataclasses.replace(attack, layers=("3", "0", "3")).layer_mask(4).tolist() == [True, False, False, True]
    for layers in ((), ("a",), ("-1",)):
        with pytest.raises(ValueError, match=r"--layers: found .*expected numbers of at least 0"):
            dataclasses.replace(attack, layers=layers)
    with pytest.raises(ValueError, match=r"--layers: found \('4',\), expected numbers below 4"):
        finetune.finetune(dataclasses.replace(attack, layers=("4",)))
    assert not (tmp_path / "r").exists()


def test_too_many_active_layers(model_dir, tmp_path):
    config = align.AlignConfig(
        model=model_dir, run_dir=str(tmp_path / "r"), defense="t_vaccine", layers=5, **DATA, **SMALL)
    with pytest.raises(ValueError, match=r"--layers: found 5, expected at most the model's 4 layers"):
        align.align(config)
    assert not (tmp_path / "r").exists()


def test_vocabulary_mismatch(model_dir, tmp_path):
    other = tmp_path / "other"
    save_model(tiny.model().clone(lora=None), tiny.trees(tiny.model())[1], other, tokenizer_from=model_dir)
    config = align.AlignConfig(model=str(other), run_dir=str(tmp_path / "r"), **DATA, **SMALL)
    with pytest.raises(ValueError, match="expected ids below 97"):
        align.align(config)
    assert not (tmp_path / "r").exists()


def test_other_flags_in_the_same_folder(aligned):
    before = weights(aligned.run_dir)
    with pytest.raises(FileExistsError, match=r"learning_rate: found 0.0005, expected 0.1"):
        align.align(dataclasses.replace(aligned, learning_rate=0.1))
    with pytest.raises(FileExistsError, match=r"data\.hashes\.alignment"):
        align.align(dataclasses.replace(aligned, alignment_data="embedded_refusal@train[0:25]"))
    align.align(dataclasses.replace(aligned, save_every=7))  # changes nothing that counts
    assert weights(aligned.run_dir) == before


def test_overlaps_are_errors(aligned, tmp_path):
    attack = finetune.FinetuneConfig(aligned=aligned.run_dir, run_dir=str(tmp_path / "a"), **ATTACK)
    # SFT's alignment reads no harmful data; its record is made here, as a Booster run would have it.
    booster = dataclasses.replace(aligned, run_dir=str(tmp_path / "booster"), defense="booster", steps=1)
    align.align(booster)
    with pytest.raises(ValueError, match=r"also in the alignment's harmful data"):
        finetune.finetune(dataclasses.replace(
            attack, aligned=booster.run_dir, harmful_data="embedded_harmful@harmful[5:30]"))
    with pytest.raises(ValueError, match=r"also in the test prompts"):
        finetune.finetune(dataclasses.replace(attack, test_data="embedded_harmful@attack[10:12]"))
    with pytest.raises(ValueError, match=r"--harmful_test: found 12 of 12 prompts also in the harmful data of"):
        evaluate.evaluate(evaluate.EvaluateConfig(
            trained=booster.run_dir, run_dir=str(tmp_path / "s"), harmful_test="embedded_harmful@harmful[0:12]"))


def test_continued_adapter_keeps_its_rank(aligned, tmp_path):
    with pytest.raises(ValueError, match=r"--rank: found 4, expected 2"):
        finetune.finetune(finetune.FinetuneConfig(
            aligned=aligned.run_dir, run_dir=str(tmp_path / "a"), adapter="continue", rank=4, **ATTACK))


def test_unfinished_or_missing_runs(aligned, tmp_path):
    def attack(folder):
        finetune.finetune(finetune.FinetuneConfig(aligned=str(folder), run_dir=str(tmp_path / "a"), **ATTACK))

    with pytest.raises(FileNotFoundError, match=r"nowhere/config.json: not found"):
        attack(tmp_path / "nowhere")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_text((Path(aligned.run_dir) / "config.json").read_text())
    with pytest.raises(ValueError, match="has not finished"):
        attack(unfinished)


@pytest.mark.slow
def test_a_script_ends_with_the_message_alone(tmp_path):
    command = [sys.executable, "-m", "experiments.align", f"--run_dir={tmp_path}/r", f"--model={tmp_path}/none",
               "--alignment_data=instructions:missing.jsonl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "align: " in done.stderr and "missing.jsonl" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", presets.ALIGN)
def test_presets_are_the_published_recipes(name):
    values = flags.FlagValues()
    config_flags.define(align.AlignConfig, flag_values=values)
    values(["align", "--model=m", "--run_dir=r", "--alignment_data=embedded_refusal@train",
            "--harmful_data=embedded_harmful@harmful", "--epochs=1"])
    config = config_flags.read(align.AlignConfig, preset=presets.ALIGN[name], flag_values=values)
    published = {"booster": (32, 5e-4, "constant", 256), "sft": (32, 5e-4, "constant", 256),
                 "vaccine": (8, 1e-3, "cosine", 200), "t_vaccine": (8, 1e-3, "cosine", 200),
                 "repnoise": (32, 5e-4, "constant", 256), "tar": (8, 1e-3, "cosine", 200)}[name]
    assert (config.rank, config.learning_rate, config.schedule, config.max_length) == published
    assert config.defense == name and config.weight_decay == 0.1
    assert config.batch_size == (5 if name == "repnoise" else 10)
    assert config.epochs == 1, "a flag that is given goes before the preset"
    if name == "t_vaccine":
        assert (config.rho, config.layers, config.sample_every, config.probe_every) == (3.0, 8, 20, 200)
        assert config.harmful_batch_size == 1 and config.dropout == 0.1
    attack = finetune.FinetuneConfig(aligned="a", run_dir="r", user_data="embedded_sentiment@attack",
                                     harmful_data="embedded_harmful@attack", **presets.FINETUNE[name])
    assert (attack.learning_rate, attack.n, attack.poison_ratio, attack.epochs) == (1e-5, 1000, 0.1, 20)


def test_grid_and_demo_configs_are_valid():
    config, cells, scores = demo_smollm2.configs("model", "runs/x")
    assert list(cells) == [("0", "sft"), ("0", "booster")] == [("0", name) for name in config.defenses]
    assert all(cell.attacks.keys() == {"0.1"} for cell in cells.values())
    assert scores.harmful_test == cells["0", "sft"].attacks["0.1"].test_data
    for names in (("sft", "prayer"), ("sft", "all"), ("lisa",), ("sft+sft",), ()):
        with pytest.raises(ValueError, match=r"--defenses: found .*expected all, or some of sft, "):
            run.GridConfig(run_dir="r", defenses=names)
    with pytest.raises(ValueError, match="--poison_ratios"):
        run.GridConfig(run_dir="r", poison_ratios=("0.1", "2"))
    for seeds, expected in (((), "numbers of at least 0"), (("0", "-1"), "numbers of at least 0"),
                            (("1", "1"), "each once")):
        with pytest.raises(ValueError, match=f"--seeds: found .*expected {expected}"):
            run.GridConfig(run_dir="r", seeds=seeds)
    assert np.isclose(float(config.poison_ratios[0]), 0.1)


def run_flags(*arguments):
    """run.py's flags, parsed."""
    values = flags.FlagValues()
    config_flags.define(run.GridConfig, flag_values=values)
    run.define_cells(values)
    values(["run", "--run_dir=r", *arguments])
    return config_flags.read(run.GridConfig, flag_values=values), values


def test_all_defenses_on_the_small_world():
    """Every method of both stages, in the world's settings, which flags that are given go before."""
    config, values = run_flags("--model=world", "--defenses=all", "--seeds=0,2", "--steps=7", "--attack_rho=3")
    cells, scores = run.read_cells(config, values)
    assert {name for _, name in cells} == {*align.DEFENSES, "sft+lisa", "sft+ewc", "sft+kl"}
    assert [seed for seed, _ in cells] == ["0"] * 9 + ["2"] * 9, "a seed's cells are not together"
    assert scores.harmful_test == presets.WORLD_TESTS["harmful_test"] and scores.max_length == 16
    for (seed, name), cell in cells.items():
        assert cell.align.steps == 7 and cell.align.lam == presets.WORLD_ALIGN["lam"]
        assert cell.align.run_dir == f"r/{name.split('+')[0]}/seed{seed}/aligned"
        for ratio, attack in cell.attacks.items():
            assert attack.run_dir == f"r/{name}/seed{seed}/p{ratio}" and attack.aligned == cell.align.run_dir
            assert (attack.poison_ratio, attack.rho, attack.seed) == (float(ratio), 3, int(seed))
            assert attack.defense == (name.split("+")[1] if "+" in name else "none")
            assert attack.test_data == scores.harmful_test
    assert cells["2", "sft+lisa"].align == cells["2", "sft"].align
    assert cells["2", "sft+lisa"].attacks["0"].alignment_data == presets.WORLD_ALIGN["alignment_data"]


def test_published_recipes_are_not_of_the_small_world():
    config, values = run_flags("--model=world", "--published")
    with pytest.raises(ValueError, match="--published: found True, expected not with --model=world"):
        run.read_cells(config, values)
