"""The console command: its verbs and flags, what it says to mistakes, and whole experiments by command lines."""

import json
import re
import runpy
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from absl import flags

from jaxvaccine import cli
from jaxvaccine.experiment import recipes, runs
from jaxvaccine.experiment.config import settings
from jaxvaccine.report import plots
from tests.experiment.small_world import world_model

pytestmark = pytest.mark.usefixtures("quick_compile")

ROOT = Path(__file__).parents[1]
PARTS = {"align": ["", ""], "finetune": ["", ""], "evaluate": ["", ""],
         "run": ["", "Alignment: ", "Attack: ", "Evaluation: "],
         "data": [""], "export": [""], "compare-judges": ["", "First ", "Second "]}
SMALL = ("--steps=2", "--batch_size=4", "--max_length=16", "--bucket=16", "--remat=none", "--noprogress")
TESTS = ("--harmful_test=world_harmful@test[0:4]", "--sst2_test=world_rating@test[0:4]",
         "--benign_test=world_benign@test[0:4]", "--loss_data=world_harmful@test[0:4]", "--max_new_tokens=4",
         "--label_max_new_tokens=3", "--eval_bucket=16")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return world_model(tmp_path_factory.mktemp("world"))


@pytest.fixture
def call(capsys, monkeypatch):
    """(exit code or message, what is printed, what is printed as an error) of `jaxvaccine …` in this process."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments, program=cli.main):
        code = 0
        try:
            program(argv=list(arguments))
        except SystemExit as error:
            code = error.code
        return (code, *capsys.readouterr())

    return run


def test_without_a_verb(call):
    code, out, err = call()
    assert code == 0 and not err and out.startswith("usage: jaxvaccine VERB --flag=value")
    for name, verb in cli.VERBS.items():
        assert re.search(rf"^  {name} +{re.escape(verb.text.splitlines()[0])}$", out, re.MULTILINE)
    for asked in ("help", "--help", "-h"):
        assert call(asked) == (0, out, "")


def test_a_verb_that_is_none(call):
    code, out, err = call("aline", "--model=world")
    assert code == ("jaxvaccine: found 'aline', expected one of align, finetune, evaluate, run, data, export, "
                    "compare-judges")
    assert not out and err.startswith("usage: jaxvaccine VERB")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_flags_that_are_none(call, verb):
    for arguments, message in ((["--lamb=1"], "Unknown command line flag 'lamb'"),
                               (["--run_dir=r", "world"], "found arguments ['world'], expected flags only"),
                               (["--run_dir"], "Missing value for flag --run_dir"),
                               (["--progress=maybe"], "flag --progress=maybe")):
        if verb in ("data", "export") and "--lamb=1" not in arguments:
            continue  # these make no run, and draw nothing
        code, out, err = call(verb, *arguments)
        assert code.startswith(f"{verb}: ") and message in code and "Traceback" not in code and not out + err


@pytest.mark.parametrize("arguments, message", [
    ("align", "--model: found '', expected a directory, a hub id or a .gguf file"),
    ("align --defense=adam", "flag --defense=adam: value should be one of <sft|"),
    ("align --steps=1.5", "flag --steps=1.5"),
    ("align --preset=vaccine", "--preset: found 'vaccine', expected a paper's method, booster/vaccine or t_vaccine/va"),
    ("finetune --protocol=one_new", "--protocol: found 'one_new', expected --preset beside it"),
    ("evaluate --preset=booster/sft", "--preset: found 'booster/sft', expected booster or t_vaccine"),
    ("align --preset=tar --help", "--preset: found 'tar', expected a paper's method, t_vaccine/tar"),
    ("finetune --aligned=a --run_dir=r --user_data=world_rating@attack --poison_ratio=0 --defense=lisa "
     "--alignment_data=world_refusal@train --lisa_user_steps=0", "--lisa_user_steps: found 0, expected at least 1"),
    ("align --model=m --run_dir=r --alignment_data=world_refusal@train --warmup_ratio=2",
     "--warmup_ratio: found 2.0, expected 0 to 1"),
    ("align --model=m --run_dir=r --alignment_data=world_refusal@train --rho=2",
     "--rho: found 2.0, expected nothing: defense=sft does not read it"),
    ("align --model=m --run_dir=r --alignment_data=nothing:x", "--alignment_data: data source nothing:x: found kind"),
    ("align --model=m --alignment_data=world_refusal@train --run_dir=", "--run_dir: found '', expected a folder"),
    ("finetune", "--aligned: found '', expected the folder of an alignment"),
    ("finetune --aligned=a --run_dir=r --user_data=world_rating@attack --poison_ratio=0 --lisa_rho=1",
     "--lisa_rho: found 1.0, expected nothing: defense=none does not read it"),
    ("evaluate", "--model: found '', expected either --model or --trained"),
    ("evaluate --model=m --run_dir=r --harmful_test=world_harmful@test --judge=nobody", "--judge: found 'nobody'"),
    ("run", "--run_dir: found '', expected a folder"), ("run --run_dir=r --seeds=a", "--seeds: found ('a',), expected"),
    ("run --run_dir=r --defenses=sft,adam", "--defenses: found ('sft', 'adam'), expected all, or some of sft, "),
    ("run --run_dir=r --defenses=sft:lam=1", "--defenses: found 'sft:lam=1': lam: found 1.0, expected nothing"),
    ("run --run_dir=r --attacks=poison_ratio=2", "--attacks: found 'poison_ratio=2': poison_ratio: found 2.0"),
    ("run --run_dir=r --batch_size=0", "--batch_size: found 0, expected at least 1"),
    ("run --run_dir=r --attack_batch_size=0", "--attack_batch_size: found 0, expected at least 1"),
    ("run --run_dir=r --attack_ewc_lam=1", "--attack_ewc_lam: found 1.0, expected nothing: no method of the plan"),
    ("run --run_dir=r --eval_batch_size=0", "--eval_batch_size: found 0, expected at least 1"),
    ("run --run_dir=r --attack_poison_ratio=1", "Unknown command line flag 'attack_poison_ratio'"),
    ("run --run_dir=r --model=m --recipe=booster --defenses=sft", "--harmful_test: found '', expected at least one of"),
    ("run --run_dir=r --attack_only_layers=99", "--attack_only_layers: found ('99',), expected numbers below 6"),
    ("compare-judges --run_dir=r", "--predictions: found (), expected at least one file"),
    ("compare-judges --run_dir=r --predictions=p --first_judge=chat_api",
     "--first_judge_model: found '', expected a model's name"),
    ("compare-judges --run_dir=r --predictions=p --second_judge=nobody", "--second_judge: found 'nobody', expected"),
])  # fmt: skip
def test_mistakes_are_said_by_the_flags_name(call, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*arguments.split())
    assert code.startswith(f"{arguments.split()[0]}: {message}"), code
    assert not out + err and not list(tmp_path.iterdir())
    # As Python says it, for who wants to know where.
    with pytest.raises((ValueError, flags.Error)) as error:
        verb, *more = arguments.split()
        cli.main(argv=[verb, "--verbosity=1", *more])
    assert str(error.value).startswith(message)


def test_mistakes_in_files(call, tmp_path):
    """Found later than a flag's, and said alike."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "answer": "b", "verdict": "correct"}\n')
    for arguments, message in (
            (f"compare-judges --run_dir={tmp_path}/r --predictions={tmp_path}/p.jsonl --second_judge=keyword",
             "line 1: column 'verdict': found 'correct'"),
            (f"finetune --run_dir={tmp_path}/r --aligned={tmp_path}/none --poison_ratio=0 --user_data=sst2:x.tsv",
             "none/config.json: not found"),
            (f"run --run_dir={tmp_path}/r --model={tmp_path}/none --recipe=world", "none")):
        code, out, err = call(*arguments.split())
        assert code.startswith(arguments.split()[0] + ": ") and message in code and not out + err
    assert not (tmp_path / "r").exists()


def groups_of(text):
    """{group: {flag: what is said of it}} of a help text."""
    groups, name, flag = {}, None, None
    for line in text.splitlines():
        if line.startswith("      "):
            groups[name][flag] = (groups[name][flag] + " " + line.strip()).strip()
        elif line.startswith("  --"):
            flag = line.strip()
            groups[name][flag] = ""
        elif line and not line.startswith(" "):
            name = line
            groups[name] = {}
    return {name: found for name, found in groups.items() if found}


def spelling(prefix, setting):
    """A flag as the help text has it."""
    if typing.get_origin(setting.hint) is typing.Literal:
        return f"--{prefix}{setting.name}={'|'.join(filter(None, typing.get_args(setting.hint)))}"
    kind = {str: "=TEXT", int: "=N", float: "=X", bool: ""}.get(setting.hint, "=A,B,…")
    return f"--{'[no]' if setting.hint is bool else ''}{prefix}{setting.name}{kind}"


@pytest.mark.parametrize("name", cli.VERBS)
def test_help(call, name):
    """Every flag stands under its group, a method's under the method, with its default."""
    verb = cli.VERBS[name]
    code, out, err = call(name, "--help")
    assert code == 0 and not err and out.startswith(verb.text.splitlines()[0]) and f"jaxvaccine {name} --" in out
    assert max(map(len, out.splitlines())) <= 120
    found = groups_of(out)
    assert [section.title for section in verb.sections] == PARTS[name]
    expected = {"Preset": {"--preset=NAME"}} if verb.presets else {}
    if verb.presets and verb.presets.protocols:
        expected["Preset"].add(f"--protocol={'|'.join(recipes.PROTOCOLS)}")
    for section in verb.sections:
        for setting in settings(section.config_class):
            if setting.name not in section.without:
                method = f" (with {setting.option})" if setting.option else ""
                expected.setdefault(f"{section.title}{setting.group}{method}", set()).add(
                    spelling(section.prefix, setting))
    expected["Help"] = {"--verbosity=1", "--flagfile=FILE"}
    assert {group: set(listed) for group, listed in found.items()} == expected
    # What is listed is what is taken, and nothing is hidden.
    taken = set(cli.verb_flags(verb)) - {"help", "h", "flagfile", "undefok", "verbosity"}
    listed = {re.match(r"--(\[no\])?(\w+)", flag)[2] for group in found for flag in found[group]}
    assert listed - {"verbosity", "flagfile"} == taken
    for section in verb.sections:
        for setting in section.settings():
            for group, listed in found.items():
                said = listed.get(spelling(section.prefix, setting))
                if said and group.startswith(section.title + setting.group):
                    assert said.startswith(" ".join(setting.help.split())), setting
    assert call(name, "-h") == (0, out, "")


@pytest.mark.parametrize("name, group, flag, default", [
    ("align", "Optimizer", "--learning_rate=X", "[default 0.0005]"),
    ("align", "T-Vaccine (with t_vaccine)", "--rho=X", "[default 3.0]"),
    ("align", "Vaccine (with vaccine)", "--rho=X", "[default 2.0]"),
    ("align", "Adapter", "--targets=A,B,…", "[default q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"),
    ("align", "Run", "--[no]progress", "[default true]"),
    ("finetune", "Lisa (with lisa)", "--lisa_rho=X", "[default 1.0]"),
    ("run", "Attack: Lisa (with lisa)", "--attack_lisa_rho=X", "[default 1.0]"),
    ("run", "Plan", "--seeds=A,B,…", "[default 0]"), ("evaluate", "Judge", "--judge_timeout=X", "[default 60.0]"),
    ("compare-judges", "First Judge", "--first_judge=TEXT", "[default recorded]"),
])  # fmt: skip
def test_defaults_are_shown(call, name, group, flag, default):
    assert groups_of(call(name, "--help")[1])[group][flag].endswith(default)


@pytest.mark.parametrize("name, preset", [
    *((name, preset) for name in ("align", "finetune") for preset in ("booster", "t_vaccine", *recipes.pairs())),
    ("evaluate", "booster"), ("evaluate", "t_vaccine")])
def test_what_a_preset_sets_is_shown(call, name, preset):
    presets, parsed = cli.VERBS[name].presets, cli.verb_flags(cli.VERBS[name])
    parsed([name, f"--preset={preset}"])
    values = presets.read(parsed)
    code, out, _ = call(name, f"--preset={preset}", "--help")
    assert all(pair in " ".join(out.split()) for pair in presets.names)
    shown = {re.match(r"--(\[no\])?(\w+)", flag)[2]: said for listed in groups_of(out).values()
             for flag, said in listed.items() if f"[preset {preset}: " in said}
    assert code == 0 and shown.keys() == values.keys()
    for flag, said in shown.items():
        value = values[flag]
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        assert re.search(rf"\[preset {re.escape(preset)}: {re.escape(text)}(; else .+)?\]$", said), said
    assert "[preset" not in call(name, "--help")[1]


def test_no_flag_of_a_command_means_two_things():
    for verb in cli.VERBS.values():
        names = [section.prefix + name for section in verb.sections
                 for name in {setting.name for setting in section.settings()}]
        assert len(names) == len(set(names)) and "preset" not in names and "verbosity" not in names


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_same_from_a_checkout(call, monkeypatch, verb):
    """`python -m experiments.align` is `jaxvaccine align`."""
    module = f"experiments.{verb.replace('-', '_')}"

    def program(argv):
        monkeypatch.setattr(sys, "argv", [module, *argv])
        runpy.run_module(module, run_name="__main__")

    for arguments in (("--help",), ("--lamb=1",), (), ("--run_dir=r", "positional")):
        assert call(*arguments, program=program) == call(verb, *arguments)


def test_the_console_script_is_this_command(monkeypatch, capsys):
    """As setup.py has it; without arguments of its own it takes the program's."""
    assert '"console_scripts": ["jaxvaccine = jaxvaccine.cli:main"]' in (ROOT / "setup.py").read_text()
    monkeypatch.setattr(sys, "argv", ["jaxvaccine", "align", "--help"])
    cli.main()
    assert capsys.readouterr().out.startswith("Aligns a model with a defense.")


def test_a_program_ends_with_the_message_alone(tmp_path):
    """Without a traceback, with the exit code of an error; whichever way it was started."""
    arguments = [f"--run_dir={tmp_path}/r", f"--model={tmp_path}/none", "--alignment_data=instructions:missing.jsonl"]
    programs = ["experiments.align"], ["jaxvaccine", "align"]
    said = [subprocess.run([sys.executable, "-m", *program, *arguments], cwd=ROOT, capture_output=True, text=True,
                           check=False) for program in programs]
    for done in said:
        assert done.returncode == 1 and not done.stdout and done.stderr == said[0].stderr
        assert done.stderr.startswith("align: ") and "missing.jsonl" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_what_is_given():
    """What was on the command line, typed, and nothing else: what stands for the rest is the config's affair."""
    verb = cli.VERBS["align"]
    values = cli.verb_flags(verb)
    values(["align", "--preset=t_vaccine", "--epochs=1", "--targets=q_proj,v_proj", "--noprogress", "--exact",
            "--seed=3"])
    assert cli.given(verb.sections[0], values) == {
        "epochs": 1.0, "targets": ("q_proj", "v_proj"), "progress": False, "exact": True, "seed": 3}
    values = cli.verb_flags(cli.VERBS["run"])
    values(["run", "--attack_steps=3", "--steps=4", "--attack_only_layers=0,2", "--judge=keyword"])
    assert [cli.given(section, values) for section in cli.VERBS["run"].sections] == [
        {}, {"steps": 4}, {"steps": 3, "only_layers": ("0", "2")}, {"judge": "keyword"}]


@pytest.mark.long
def test_aligned_attacked_and_scored(call, model_dir, tmp_path):
    """The three stages by their command lines, each with its report; flags go before a preset, a file holds some."""
    (tmp_path / "flags").write_text("--seed=3\n--rank=2\n")
    folder = tmp_path / "aligned"
    code, _, err = call("align", "--preset=t_vaccine/vaccine", f"--model={model_dir}", f"--run_dir={folder}", *SMALL,
                        f"--flagfile={tmp_path}/flags", "--alignment_data=world_refusal@train[0:20]", "--dropout=0")
    assert code == 0, err
    found = runs.read_config(folder)["flags"]
    assert (found["defense"], found["rho"], found["learning_rate"]) == ("vaccine", 2.0, 1e-3), "of the preset"
    assert (found["seed"], found["rank"], found["steps"], found["dropout"]) == (3, 2, 2, 0.0)
    assert (folder / "report.md").read_text().startswith("# Alignment with Vaccine")
    assert (folder / "metrics.png").stat().st_size > 1000
    attacked = tmp_path / "attacked"
    code, _, err = call("finetune", f"--aligned={folder}", f"--run_dir={attacked}", *SMALL, "--n=20",
                        "--user_data=world_rating@attack", "--harmful_data=world_harmful@attack", "--only_layers=0,2")
    assert code == 0, err
    assert runs.read_config(attacked)["flags"]["only_layers"] == ["0", "2"]
    assert (attacked / "report.md").read_text().startswith(f"# Fine-tuning of {folder} with p = 0.1")
    command = ("evaluate", f"--trained={attacked}", f"--run_dir={tmp_path}/scores", *TESTS, "--noprogress")
    code, out, err = call(*command)
    assert code == 0, err
    assert out.startswith(f"# Evaluation of {attacked}") and "| HS | " in out and "| FA SST-2 | " in out
    assert out.strip() == (tmp_path / "scores" / "report.md").read_text().strip()
    assert call(*command) == (0, out, "")
    code, _, _ = call(*command, "--max_new_tokens=5")
    assert code.startswith("evaluate: ") and "max_new_tokens: found 4, expected 5" in code
    code, out, _ = call("compare-judges", f"--run_dir={tmp_path}/judges", "--second_judge=keyword",
                        f"--predictions={tmp_path}/scores/predictions_harmful_score.jsonl")
    assert code == 0 and out.startswith("# recorded and keyword on 4 answers")
    code, _, _ = call("compare-judges", f"--run_dir={tmp_path}/judges", "--overwrite",
                      f"--predictions={tmp_path}/scores/predictions_harmful_score.jsonl")
    assert code.startswith("compare-judges: --second_judge: found 'recorded', expected another than the first")


def check_plan(run, root, model_dir, defense, name):
    """A plan of this defense, and of Lisa after SFT, by its command line; then again, which repeats nothing."""
    code, out, err = run()
    assert code == 0, err[-3000:]
    assert f"| {name} | attacked, p = 0.5 |" in out and "over seeds (0, 3)" in out
    folder = root / model_dir.strip("/").replace("/", "_")
    for cell in ("sft/seed0/aligned", "sft+lisa/seed3/poison_ratio=0.5", f"{defense}/seed3/poison_ratio=0.5"):
        assert {"config.json", "metrics.jsonl", "metrics.png", "report.md", "adapter", "checkpoints"} <= {
            path.name for path in (folder / cell).iterdir()}
    assert (root / "report.md").read_text(encoding="utf-8").strip() in out
    predictions = folder / f"{defense}/seed0/poison_ratio=0.5-scores/predictions_harmful_score.jsonl"
    lines = predictions.read_text().splitlines()
    assert len(lines) == 4 and {"prompt", "answer", "verdict"} <= set(json.loads(lines[0]))
    assert {"config.json", "results.json", "report.md"} <= {path.name for path in predictions.parent.iterdir()}
    before = {path: path.stat().st_mtime_ns for path in root.rglob("adapter/*.safetensors")}
    assert len(before) == (6 if defense == "sft" else 8)
    code, again, _ = run()
    assert code == 0 and again in out and again.startswith(f"# Harmful fine-tuning of {model_dir}")
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("adapter/*.safetensors")}


@pytest.mark.long
def test_a_plan(call, model_dir, tmp_path, monkeypatch):
    # Drawing every one of its figures takes as long as all the rest.
    monkeypatch.setattr(plots, "save", lambda figure, path: Path(path).write_bytes(b"a figure"))
    arguments = ("run", f"--run_dir={tmp_path}/plan", f"--model={model_dir}", "--recipe=world", "--seeds=0,3",
                 "--defenses=sft,sft+lisa", "--poison_ratios=0.5", *SMALL[:2], "--harmful_batch_size=2", "--rank=2",
                 "--alignment_data=world_refusal@train[0:24]", "--harmful_data=world_harmful@harmful[0:12]",
                 "--attack_n=16", "--attack_steps=2", "--attack_batch_size=4", "--attack_lisa_alignment_steps=1",
                 "--attack_lisa_user_steps=1", "--noprogress", *TESTS)
    check_plan(lambda: call(*arguments), tmp_path / "plan", model_dir, "sft", "SFT")


@pytest.mark.long
def test_a_plan_of_lanes(call, model_dir, tmp_path, monkeypatch):
    """A named plan: its panels, and the same cells for another that has them too."""
    monkeypatch.setattr(plots, "save", lambda figure, path: Path(path).write_bytes(b"a figure"))
    arguments = ("run", "--lanes", f"--run_dir={tmp_path}/plan", f"--model={model_dir}", "--recipe=world",
                 "--defenses=sft", "--steps=2", "--batch_size=4", "--rank=2", "--attack_n=20", "--attack_batch_size=4",
                 "--attack_steps=2", "--score_steps=1", "--noprogress", "--noscore_base", *TESTS)
    code, out, err = call(*arguments, "--plan=ratios")
    assert code == 0, err[-3000:]
    assert "# HS and FA over the ratio of harmful data" in out and "## Ratio of harmful data\n" in out
    rows = [line for line in out.splitlines() if line.startswith("| SFT | 0")]
    assert [line.split(" | ")[1] for line in rows] == ["0", "0.05", "0.1", "0.15", "0.2"]
    def cells():
        return {path: path.read_bytes() for path in (tmp_path / "plan").rglob("poison_ratio*.json")}

    before = cells()
    assert len(before) == 5
    code, out, err = call(*arguments, "--attacks=poison_ratio=0.1,poison_ratio=0.1:adapter=new")
    assert code == 0, err[-3000:]
    assert "p = 0.1, new adapter" in out
    assert len(cells()) == 6 and before.items() <= cells().items()


@pytest.mark.long
def test_a_plan_as_a_program(tmp_path):
    """On text, with Booster, in a process of its own."""
    from tests.experiment.small_world import text_model

    model_dir = text_model(tmp_path)
    data = {"alignment_data": "embedded_refusal@train[0:24]", "harmful_data": "embedded_harmful@harmful[0:12]",
            "steps": 3, "batch_size": 2, "harmful_batch_size": 2, "max_length": 400, "rank": 2, "remat": "none"}
    attack = {"user_data": "embedded_sentiment@attack", "harmful_data": "embedded_harmful@attack[0:20]", "n": 20,
              "steps": 2, "batch_size": 2, "max_length": 400, "lisa_alignment_steps": 1, "lisa_user_steps": 1}
    command = [
        sys.executable, "-m", "experiments.run", f"--run_dir={tmp_path}/plan", f"--model={model_dir}",
        "--defenses=booster,sft+lisa", "--poison_ratios=0.5", "--seeds=0,3", "--noprogress",
        *(f"--{name}={value}" for name, value in data.items()),
        *(f"--attack_{name}={value}" for name, value in attack.items()),
        *(f"--{name}=embedded_{kind}@test[0:4]" for name, kind in (
            ("harmful_test", "harmful"), ("sst2_test", "sentiment"), ("benign_test", "benign"),
            ("loss_data", "harmful"))),
        "--max_new_tokens=4", "--label_max_new_tokens=3", "--judge=keyword"]

    def run():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    check_plan(run, tmp_path / "plan", model_dir, "booster", "Booster")
    assert (tmp_path / "plan" / "report.md").exists() and list((tmp_path / "plan").glob("*.png"))
