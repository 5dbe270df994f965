"""What the studies share: a plan whose seeds are lanes, measured on the way, and a report of its own."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from absl import flags

from jaxvaccine import cli, data
from jaxvaccine.experiment.config import field, make
from jaxvaccine.experiment.parts import TokensPart
from jaxvaccine.experiment.plan_folder import Probes
from jaxvaccine.experiment.run import PlanConfig, check_given, make_settings, run
from jaxvaccine.report import accounts, tables
from jaxvaccine.report import runs as reports
from jaxvaccine.report.results import read_results

# What a study's plan is not asked for.
WITHOUT = ("plan", "lanes", "poison_ratios", "score_base", "by_category")
STAGES = (cli.ALIGNMENT, cli.ATTACK, cli.EVALUATION)


@dataclasses.dataclass(frozen=True)
class StudyConfig(PlanConfig):
    """Plan."""

    lanes: bool = field(True, "")
    score_base: bool = field(False, "")


def verb(text: str, config_class: type[StudyConfig], probes: Callable[[Any], Probes],
         report: Callable[[Any, pd.DataFrame, Path], str], scores: Mapping[str, Any] | None = None,
         without: Sequence[str] = (),
         defaults: Callable[[Any], tuple[Mapping[str, Any], Mapping[str, Any]]] = lambda config: ({}, {}),
         before: Callable[[Any], None] = lambda config: None) -> cli.Verb:
    """A study as a command.

    Args:
      text: what it asks, and an example.
      config_class: its flags.
      probes: config -> what is measured on the way.
      report: (config, table of results, folder) -> Markdown, its figures written into the folder.
      scores: flat values of the evaluation that stand for flags that are not given.
      without: names of the config that are no flags.
      defaults: config -> the same as scores of alignment and attack.
      before: makes what the plan needs and is not there, once flags are known to be right.
    """
    section = cli.Section(config_class, without=(*WITHOUT, *without))
    attack = () if "attacks" in without else (cli.ATTACK,)

    def call(values: flags.FlagValues) -> None:
        with cli.flag_errors(""):
            config = make(config_class, cli.given(section, values))
            of_stages = [cli.given(of, values) if of in (cli.ALIGNMENT, *attack, cli.EVALUATION) else {}
                         for of in STAGES]
            usual = (*defaults(config), scores or {})
            asked = [{**one, **given} for one, given in zip(usual, of_stages, strict=True)]
            # A mistake in a flag does not wait for what is made now.
            check_given(config.make_plan(), make_settings(config, *asked), *asked[:2])
            before(config)
            run(config, *asked, probes(config))
        folder = Path(config.run_dir)
        print(publish(folder, report(config, read_results(folder), folder)))

    return cli.Verb(text, (section, cli.ALIGNMENT, *attack, cli.EVALUATION), call)


def own_verb(text: str, config_class: type[StudyConfig], carry_out: Callable[..., str],
             without: Sequence[str] = WITHOUT, stages: Sequence[cli.Section] = STAGES) -> cli.Verb:
    """A study that makes and carries out plans of its own, as a command.

    Args:
      text: what it asks, and an example.
      config_class: its flags.
      carry_out: (config, given flat values of every stage) -> the report, which is printed.
      without: names of the config that are no flags.
      stages: flags of alignment, attack and evaluation.
    """
    section = cli.Section(config_class, without=without)

    def call(values: flags.FlagValues) -> None:
        with cli.flag_errors(""):
            print(carry_out(make(config_class, cli.given(section, values)), *(cli.given(of, values) for of in stages)))

    return cli.Verb(text, (section, *stages), call)


def publish(folder: Path, text: str, *plans: Path) -> str:
    """Writes a study's report, with the accounts of its plans' rows at its end; returns it as it is read.

    plans: the plans' folders, if they are others than the study's.
    """
    tables.write_report(folder, "\n".join([text, *map(accounts.of_plan, plans or (folder,))]))
    return reports.read(folder)


def stack_batches(tokenizer, examples: Sequence[Sequence[data.Example]], part: TokensPart) -> Any:
    """Every lane's examples as one batch: leaves [N, B, T]. B is the least that a lane has, after tokenization."""
    tokenized = [data.tokenize_examples(tokenizer, rows, part.max_length, part.form) for rows in examples]
    count = min(len(rows.input_ids) for rows in tokenized)
    length = data.bucket_length(max(len(ids) for rows in tokenized for ids in rows.input_ids), part.bucket)
    batches = [data.collate(rows, range(count), length) for rows in tokenized]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
