"""Configs as absl flags, and the console command: `jaxvaccine align --preset=booster --model=… --run_dir=…`."""

import contextlib
import logging as python_logging
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags, logging

from jaxvaccine.experiment import compare_judges, data_card, dry_run, export, recipes
from jaxvaccine.experiment.align import AlignConfig, align
from jaxvaccine.experiment.attack import attack
from jaxvaccine.experiment.attack_config import AttackConfig, goes_on, split_new_adapter
from jaxvaccine.experiment.compilation import keep_programs
from jaxvaccine.experiment.config import FieldError, Setting, make, require, settings
from jaxvaccine.experiment.evaluate import evaluate
from jaxvaccine.experiment.evaluate_config import EvaluateConfig
from jaxvaccine.experiment.parts import COMPUTED
from jaxvaccine.experiment.run import PlanConfig, run

PRESET = ("A paper's recipe of a method; booster and t_vaccine are short for booster/booster and t_vaccine/t_vaccine. "
          "Flags that are given go before it. With --help: shows what it sets.")
PROTOCOL = ("Which attack of the preset: the method's own, as its authors' script has it, or one for all methods, that "
            "on the paper's own, on a new adapter or on the aligned one.")


class Section(NamedTuple):
    """A config whose fields are flags."""

    config_class: type
    prefix: str = ""
    without: tuple[str, ...] = ()
    title: str = ""  # before the titles of its groups

    def settings(self) -> list[Setting]:
        return [setting for setting in settings(self.config_class) if setting.name not in self.without]


def define(section: Section, values: flags.FlagValues) -> None:
    """Defines a flag for every name of the section's config. None is their default: what stands for it is the
    config's."""
    for setting in section.settings():
        name = section.prefix + setting.name
        if name in values:  # several methods read it
            continue
        if typing.get_origin(setting.hint) is typing.Literal:
            flags.DEFINE_enum(name, None, typing.get_args(setting.hint), setting.help, flag_values=values)
        elif typing.get_origin(setting.hint) is tuple:
            flags.DEFINE_list(name, None, setting.help, flag_values=values)
        else:
            {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float,
             bool: flags.DEFINE_bool}[setting.hint](name, None, setting.help, flag_values=values)


def given(section: Section, values: flags.FlagValues) -> dict[str, Any]:
    """{name: value} of the section's flags that were on the command line."""
    found = {setting.name: values[section.prefix + setting.name] for setting in section.settings()}
    return {name: tuple(flag.value) if isinstance(flag.value, list) else flag.value
            for name, flag in found.items() if flag.present}


@contextlib.contextmanager
def flag_errors(prefix: str) -> Iterator[None]:
    """Errors of fields name the flags that they come from."""
    try:
        yield
    except FieldError as error:
        raise ValueError(f"--{prefix}{error.name}: {error.message}") from error


class Presets(NamedTuple):
    """The presets of a command.

    Attributes:
      names: all of them.
      read: what --preset sets, given the other flags; raises FieldError.
      protocols: whether --protocol chooses among their attacks.
    """

    names: tuple[str, ...]
    read: Callable[[flags.FlagValues], Mapping[str, Any]]
    protocols: bool = False


class Verb(NamedTuple):
    """A command: its flags, and what it does with them."""

    text: str  # what it does, and an example
    sections: tuple[Section, ...]
    call: Callable[[flags.FlagValues], None]
    presets: Presets | None = None
    rest: str = ""  # the flag that takes what is given without one


def _read(config_class: type, values: flags.FlagValues, presets: Presets | None = None) -> Any:
    with flag_errors(""):
        return make(config_class, given(Section(config_class), values), _preset(presets, values))


def _preset(presets: Presets | None, values: flags.FlagValues) -> Mapping[str, Any]:
    """What --preset sets; nothing without one."""
    if presets and values.preset:
        return presets.read(values)
    if presets and presets.protocols:
        require(not values["protocol"].present, "protocol", values.protocol, "--preset beside it")
    return {}


def _dry(values: flags.FlagValues) -> dry_run.DryRun:
    """What --dry_run asks for."""
    dry = _read(dry_run.DryRun, values)
    if dry.card:  # another machine's: none here is looked for
        jax.config.update("jax_platforms", "cpu")
    return dry


def _reports() -> types.ModuleType:
    # Late: matplotlib and pandas take a second that --help and a mistake in a flag need not wait for.
    from jaxvaccine.report import runs

    return runs


def _of_alignment(values: flags.FlagValues) -> Mapping[str, Any]:
    return recipes.alignment(*recipes.parse_pair(values.preset), recipes.harmful_of(values.harmful_data or ""))


def _align(values: flags.FlagValues) -> None:
    config, dry = _read(AlignConfig, values, ALIGN_PRESETS), _dry(values)
    look = _warn_of_few(values.preset, alignment="alignment", harmful="harmful")
    with flag_errors(""):
        if dry.dry_run:
            print(dry_run.of_alignment(config, dry, look))
        else:
            _reports().write(align(config, look))


def _warn_of_few(preset: str | None, **rows: str) -> Callable[[Mapping[str, Sequence[Any]]], None]:
    """Of a run's examples, warns where there are fewer than in the preset's paper. rows: their names in the run, by
    those in `recipes.rows`."""
    def look(examples: Mapping[str, Sequence[Any]]) -> None:
        counts = {name: len(examples[of]) for name, of in rows.items() if of in examples}
        if preset and (text := recipes.fewer_than_published(*recipes.parse_pair(preset), counts)):
            logging.warning("%s", text)
    return look


def _of_attack(values: flags.FlagValues) -> Mapping[str, Any]:
    asked, (paper, method) = given(Section(AttackConfig), values), recipes.parse_pair(values.preset)
    recipe = recipes.attack(paper, method, recipes.task_of(paper, values.user_data or ""), values.protocol,
                            recipes.harmful_of(values.harmful_data or ""))
    chosen = {**recipe, **asked}
    continued = goes_on(chosen.get("adapter", "auto"), recipes.alignment(paper, method)["defense"],
                        chosen.get("defense", "none"))
    return split_new_adapter(recipe)[0] if continued else recipe


def _finetune(values: flags.FlagValues) -> None:
    config, dry, look = _read(AttackConfig, values, ATTACK_PRESETS), _dry(values), _warn_of_few(
        values.preset, guide="alignment")
    with flag_errors(""):
        if dry.dry_run:
            print(dry_run.of_attack(config, dry, look))
        else:
            _reports().write(attack(config, look))


def _of_tests(values: flags.FlagValues) -> Mapping[str, Any]:
    require(values.preset in recipes.EVALUATION, "preset", values.preset, " or ".join(recipes.EVALUATION))
    return recipes.EVALUATION[values.preset]


ALIGN_PRESETS = Presets(recipes.pairs(), _of_alignment)
ATTACK_PRESETS = Presets(recipes.pairs(), _of_attack, protocols=True)
TEST_PRESETS = Presets(tuple(recipes.EVALUATION), _of_tests)


def _evaluate(values: flags.FlagValues) -> None:
    config, dry = _read(EvaluateConfig, values, TEST_PRESETS), _dry(values)
    with flag_errors(""):
        if dry.dry_run:
            print(dry_run.of_evaluation(config, dry))
            return
        evaluate(config)
    _reports().write(config.run.run_dir)
    print(_reports().read(config.run.run_dir))


# What an attack and an evaluation have from the alignment, or from the plan's cells.
ATTACK = Section(AttackConfig, "attack_", (
    "run_dir", "aligned", "poison_ratio", "defense", "seed", "overwrite", "test_data", "dtype",
    *COMPUTED, "bucket", "prompt", "system_prompt", "supervise", "data_protocol", "bad_rows", "save_every",
    "progress"), "Attack: ")
EVALUATION = Section(EvaluateConfig, "", (
    "run_dir", "model", "revision", "trained", "answers", "seed", "overwrite", "dtype", "quantisation", "progress",
    "max_length", "prompt", "system_prompt", "supervise", "data_protocol", "bad_rows"),
    "Evaluation: ")
ALIGNMENT = Section(AlignConfig, "", (
    "run_dir", "model", "start", "adapter", "defense", "seed", "overwrite", "progress"), "Alignment: ")


def _run(values: flags.FlagValues) -> None:
    config = _read(PlanConfig, values)
    of_stages = [given(section, values) for section in (ALIGNMENT, ATTACK, EVALUATION)]
    with flag_errors(""):
        run(config, *of_stages, written=_reports().write)
    print(_reports().write_plan(config))


DRY_RUN = Section(dry_run.DryRun)

FIRST = Section(compare_judges.ComparedJudge, "first_", title="First ")
SECOND = Section(compare_judges.ComparedJudge, "second_", title="Second ")


def _compare_judges(values: flags.FlagValues) -> None:
    config = _read(compare_judges.ComparisonPart, values)
    judges = []
    for section in (FIRST, SECOND):
        with flag_errors(section.prefix):
            judges.append(make(section.config_class, given(section, values)))
    with flag_errors(""):
        compare_judges.compare(config, *judges)
    names = [compare_judges.name_of(judge) for judge in judges]
    print(_reports().write_agreement(config.run_dir, "labels" if config.labelled else names[0], names[1]))


def _data(values: flags.FlagValues) -> None:
    from jaxvaccine.report import accounts

    config = _read(data_card.DataCardConfig, values)
    with flag_errors(""):
        print(accounts.card(data_card.read_card(config)))


def _export(values: flags.FlagValues) -> None:
    from jaxvaccine.report.model_card import model_card

    with flag_errors(""):
        print(export.export(_read(export.ExportConfig, values), model_card))


VERBS = {
    "align": Verb("""Aligns a model with a defense.

jaxvaccine align --preset=booster --model=meta-llama/Llama-2-7b-hf --run_dir=runs/booster \\
    --alignment_data=beavertails_refusal:train.jsonl[0:5000] --harmful_data=beavertails_unsafe:train.jsonl[0:5000]""",
                  (Section(AlignConfig), DRY_RUN), _align, ALIGN_PRESETS),
    "finetune": Verb("""Fine-tunes an aligned model on a user's data of which a ratio is harmful: the attack.

jaxvaccine finetune --preset=booster --aligned=runs/booster --run_dir=runs/booster-p0.1 \\
    --user_data=sst2:stanfordnlp/sst2@train --harmful_data=beavertails_unsafe:train.jsonl[5000:5500] \\
    --poison_ratio=0.1 --test_data=beavertails_unsafe:train.jsonl[5500:6000]""",
                     (Section(AttackConfig), DRY_RUN), _finetune, ATTACK_PRESETS),
    "evaluate": Verb("""Scores a model, as it comes or as a run left it: harmful score, fine-tune accuracy,
over-refusal, the win rate on AlpacaEval and the loss on harmful answers.

jaxvaccine evaluate --trained=runs/booster-p0.1 --run_dir=runs/booster-p0.1-scores --judge=beaver_dam \\
    --harmful_test=beavertails_unsafe:train.jsonl[5500:6000] --sst2_test=sst2:stanfordnlp/sst2@validation""",
                     (Section(EvaluateConfig), DRY_RUN), _evaluate, TEST_PRESETS),
    "run": Verb("""Carries out a plan: backbones times methods times attacks times seeds, aligned, attacked and scored;
a table of all results, a report and plots.

jaxvaccine run --model=world --defenses=all --seeds=0,1,2 --run_dir=runs/all
jaxvaccine run --lanes --model=world --seeds=0,1 --run_dir=runs/some \\
    --defenses=sft,t_vaccine:freeze=released \\
    --attacks=poison_ratio=0.1,poison_ratio=0.1:adapter=new:learning_rate=2e-4
jaxvaccine run --lanes --plan=ratios --model=world --seeds=0,1,2 --run_dir=runs/ratios""",
                (Section(PlanConfig), ALIGNMENT, ATTACK, EVALUATION), _run),
    "data": Verb("""What is in data: rows, duplicates, answers that disagree, tokens, and what sets have in common.

jaxvaccine data sst2:train.tsv[0:1000] --model=world
jaxvaccine data --alignment_data=world_refusal@train --harmful_data=world_harmful@attack \\
    --user_data=world_rating@attack --test_data=world_harmful@test --model=world""",
                 (Section(data_card.DataCardConfig),), _data, rest="sources"),
    "export": Verb("""Writes what a run left for others to serve: a whole model, or a PEFT adapter, with a model card.

jaxvaccine export --trained=runs/booster --directory=served/booster --dtype=bfloat16
jaxvaccine export --trained=runs/booster --directory=served/booster-adapter --form=adapter""",
                   (Section(export.ExportConfig),), _export),
    "compare-judges": Verb("""How far two judges agree on the answers of evaluations: Cohen's kappa, the table of
verdicts, every disagreement. The first judge is the one whose verdicts the predictions hold, unless --first_judge
names another.

jaxvaccine compare-judges --run_dir=runs/judges --second_judge=beaver_dam \\
    --predictions=runs/booster-p0.1-scores/predictions_harmful_score.jsonl""",
                           (Section(compare_judges.ComparisonPart), FIRST, SECOND), _compare_judges),
}


def verb_flags(verb: Verb) -> flags.FlagValues:
    """The flags of a command."""
    values = flags.FlagValues()
    for section in verb.sections:
        define(section, values)
    if verb.presets:
        flags.DEFINE_string("preset", None, PRESET, flag_values=values)
        if verb.presets.protocols:
            flags.DEFINE_enum("protocol", recipes.PROTOCOLS[0], recipes.PROTOCOLS, PROTOCOL, flag_values=values)
    flags.DEFINE_bool("help", False, "Shows this text.", short_name="h", flag_values=values)
    flags.DEFINE_integer("verbosity", None, "1 shows where an error was raised, and what libraries say.",
                         flag_values=values)
    return values


def main(name: str | None = None, argv: Sequence[str] | None = None) -> None:
    """The console command; with a verb's name, that verb alone, as `python -m experiments.align`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if name is None:
        if not arguments or arguments[0] not in VERBS:
            _print_verbs(arguments)
        name = arguments.pop(0)
    call(name, VERBS[name], arguments)


def call(name: str, verb: Verb, arguments: Sequence[str] | None = None) -> None:
    """A command with its arguments, by default the program's."""
    arguments = sys.argv[1:] if arguments is None else arguments
    values = verb_flags(verb)
    with readable_errors(name, lambda: values["verbosity"].value):  # known before all flags are
        rest = values([name, *arguments])[1:]
        if values.help:
            with flag_errors(""):
                print(help_text(verb, values.preset if verb.presets else None, _preset(verb.presets, values)))
            return
        if rest and verb.rest:
            flag = values[verb.rest]
            flag.parse(",".join([flag.value, *rest] if flag.present else rest))
            flag.present += 1
        elif rest:
            raise ValueError(f"found arguments {rest}, expected flags only")
        keep_programs()
        verb.call(values)


def _print_verbs(arguments: Sequence[str]) -> None:
    lines = ["usage: jaxvaccine VERB --flag=value …; VERB --help lists a verb's flags.", ""]
    lines += [f"  {name:15} {verb.text.split(chr(10))[0]}" for name, verb in VERBS.items()]
    asked = not arguments or arguments[0] in ("help", "--help", "-h")
    print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    sys.exit(0 if asked else f"jaxvaccine: found {arguments[0]!r}, expected one of {', '.join(VERBS)}")


@contextlib.contextmanager
def readable_errors(name: str, verbosity: Callable[[], int | None] = lambda: None) -> Iterator[None]:
    """Ends a program with the message of an error in its input; verbosity 1 shows where it was raised.

    Unless it is given, Orbax's notes on every checkpoint are left out.
    """
    logging.set_verbosity(logging.WARNING)
    python_logging.getLogger().setLevel(python_logging.WARNING)
    try:
        yield
    except (ValueError, KeyError, FileNotFoundError, FileExistsError, FloatingPointError, ConnectionError,
            flags.Error) as error:
        if (verbosity() or 0) >= 1:
            raise
        sys.exit(f"{name}: {error}")


def help_text(verb: Verb, preset: str | None = None, chosen: Mapping[str, Any] = types.MappingProxyType({})) -> str:
    """All flags of a verb in groups, a method's under its name, with their defaults and what the preset sets."""
    width = min(120, max(60, shutil.get_terminal_size((100, 24)).columns))
    groups: dict[str, list[str]] = {}
    for section in verb.sections:
        for setting in section.settings():
            title = section.title + setting.group + (f" (with {setting.option})" if setting.option else "")
            groups.setdefault(title, []).append(_flag_help(section.prefix, setting, chosen, preset, width))
    if verb.presets:
        listed = [_wrapped("--preset=NAME", f"{PRESET} One of {', '.join(verb.presets.names)}.", width)]
        if verb.presets.protocols:
            listed.append(_wrapped("--protocol=" + "|".join(recipes.PROTOCOLS),
                                   f"{PROTOCOL} [default {recipes.PROTOCOLS[0]}]", width))
        groups = {"Preset": listed, **groups}
    groups["Help"] = [_wrapped("--verbosity=1", "Shows where an error was raised, and what libraries say.", width),
                      _wrapped("--flagfile=FILE", "Reads flags from a file, one a line.", width)]
    return verb.text + "\n" + "".join(f"\n{title}\n" + "".join(lines) for title, lines in groups.items())


def _flag_help(prefix: str, setting: Setting, chosen: Mapping[str, Any], preset: str | None, width: int) -> str:
    kind = {str: "TEXT", int: "N", float: "X"}.get(setting.hint, "A,B,…")
    if typing.get_origin(setting.hint) is typing.Literal:
        kind = "|".join(filter(None, typing.get_args(setting.hint)))
    name = f"--[no]{prefix}{setting.name}" if setting.hint is bool else f"--{prefix}{setting.name}={kind}"
    default = _shown(setting.default)
    if setting.name in chosen:
        found = _shown(chosen[setting.name])
        default = f"preset {preset}: {found}" + (f"; else {default}" if default not in ("", found) else "")
    elif default:
        default = f"default {default}"
    return _wrapped(name, setting.help + (f" [{default}]" if default else ""), width)


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else (
        "" if value is None else str(value))


def _wrapped(name: str, text: str, width: int) -> str:
    filled = textwrap.fill(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
    return f"  {name}\n{filled}\n"
