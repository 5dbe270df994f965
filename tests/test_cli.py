"""The console command: help, what is given and what is read, and what it says to bad input."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxvaccine import cli
from jaxvaccine.experiment import recipes
from jaxvaccine.experiment.align import AlignConfig
from jaxvaccine.experiment.config import flat, make

ROOT = Path(__file__).parents[1]


def ended(*arguments):
    """(exit code or message, nothing raised otherwise) of the command."""
    with pytest.raises(SystemExit) as end:
        cli.main(argv=list(arguments))
    return end.value.code


@pytest.mark.parametrize("name", cli.VERBS)
def test_help_lists_every_flag_under_its_group(name, capsys):
    cli.main(argv=[name, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(cli.VERBS[name].text.split("\n")[0])
    lines = text.split("\n")
    for section in cli.VERBS[name].sections:
        for setting in section.settings():
            title = section.title + setting.group + (f" (with {setting.option})" if setting.option else "")
            start = lines.index(title)
            end = next((i for i in range(start, len(lines)) if not lines[i]), len(lines))
            flag = f"--[no]{section.prefix}{setting.name}" if setting.hint is bool else (
                f"--{section.prefix}{setting.name}=")
            assert any(line.strip().startswith(flag) for line in lines[start:end]), (title, flag)


@pytest.mark.parametrize("name", ["align", "finetune"])
def test_help_shows_what_a_preset_sets(name, capsys):
    presets = cli.VERBS[name].presets
    for preset, values in presets.items():
        cli.main(argv=[name, f"--preset={preset}", "--help"])
        text = " ".join(capsys.readouterr().out.split())
        for value in values.values():
            shown = ",".join(value) if isinstance(value, tuple) else str(value)
            assert f"preset {preset}: {shown}" in text


def test_what_is_given_goes_before_a_preset():
    verb = cli.VERBS["align"]
    values = cli.verb_flags(verb)
    values(["align", "--preset=t_vaccine", "--epochs=1", "--targets=q_proj,v_proj", "--noprogress"])
    found = cli.given(cli.Section(AlignConfig), values)
    assert found == {"epochs": 1.0, "targets": ("q_proj", "v_proj"), "progress": False}
    config = make(AlignConfig, {**found, "model": "m", "run_dir": "r", "alignment_data": "embedded_refusal@train",
                                "harmful_data": "embedded_harmful@harmful"}, recipes.ALIGN["t_vaccine"])
    read = flat(config)
    assert (read["defense"], read["epochs"], read["rank"], read["progress"]) == ("t_vaccine", 1.0, 8, False)


@pytest.mark.parametrize("arguments, message", [
    (("align", "--modle=x"), "align: Unknown command line flag 'modle'"),
    (("align", "--rank=many"), "flag --rank="),
    (("align", "--defense=prayer"), "flag --defense="),
    (("align", "and", "more"), "align: found arguments ['and', 'more'], expected flags only"),
    (("align", "--run_dir=r", "--alignment_data=embedded_refusal@train"), "align: --model: found ''"),
    (("align", "--model=m", "--run_dir=r", "--alignment_data=embedded_refusal@train", "--rho=2"),
     "align: --rho: found 2.0, expected nothing: defense=sft does not read it"),
    (("finetune", "--run_dir=r", "--aligned=nowhere", "--poison_ratio=2"), "--poison_ratio: found 2.0"),
    (("evaluate", "--model=m", "--run_dir=r"), "--harmful_test: found ''"),
    (("run", "--run_dir=r", "--poison_ratios=2"), "--poison_ratios: found ('2',)"),
    (("run", "--run_dir=r", "--defenses=sft", "--lam=1"), "--lam: found 1.0, expected nothing: no method of the plan"),
    (("run", "--run_dir=r", "--attack_lisa_rho=1"), "--attack_lisa_rho: found 1.0, expected nothing"),
    (("run", "--run_dir=r", "--attack_batch_size=0"), "batch_size: found 0, expected at least 1"),
    (("compare-judges", "--run_dir=r", "--predictions=x", "--first_judge=oracle"), "--first_judge: found 'oracle'"),
])
def test_bad_input_ends_with_its_message(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in str(ended(*arguments))
    assert not list(tmp_path.iterdir())


def test_verbs(capsys):
    assert ended() == 0 and ended("--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.VERBS)
    assert "found 'pray', expected one of align, finetune" in ended("pray")


def test_verbosity_shows_where_an_error_was_raised(tmp_path):
    with pytest.raises(ValueError, match="--model: found ''"):
        cli.main(argv=["align", f"--run_dir={tmp_path}/r", "--alignment_data=embedded_refusal@train", "--verbosity=1"])


def test_a_script_is_its_verb(tmp_path):
    """Without a traceback, and with the exit code of an error."""
    arguments = [f"--run_dir={tmp_path}/r", f"--model={tmp_path}/none", "--alignment_data=instructions:missing.jsonl"]
    said = [subprocess.run([sys.executable, "-m", *program, *arguments], cwd=ROOT, capture_output=True, text=True,
                           check=False) for program in (["experiments.align"], ["jaxvaccine", "align"])]
    for done in said:
        assert done.returncode == 1 and done.stderr.startswith("align: ") and "missing.jsonl" in done.stderr
    assert said[0].stderr == said[1].stderr
