"""Do defenses hold where clients fine-tune together, and some of them are harmful?

  python -m experiments.studies.federated --run_dir=runs/federated --seeds=0,1,2

Aligned models are fine-tuned by --clients, who train a copy of one adapter on rows of their own; a server joins what
they return. Every method meets every part of harmful clients (--harmful_clients) and every split of the rows among
clients (--splits), joined by the first of --rules; the other rules at the part --rules_at and the first split. HS and
FA after --score_rounds. Results go by rounds where those of other plans go by steps."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.studies import study
from jaxvaccine import cli
from jaxvaccine.experiment.config import field, require
from jaxvaccine.experiment.federated import FederationPart, Setting, attack_text
from jaxvaccine.experiment.federated_cells import Federated, carry_out
from jaxvaccine.experiment.plans import Panel, Plan, Point, split_method
from jaxvaccine.experiment.run import check_given, make_settings
from jaxvaccine.report import curves, names, panels, plots, results, tables
from jaxvaccine.report.plan import Cells, missing
from jaxvaccine.report.results import read_results
from jaxvaccine.report.style import styles

# What stands, on the small world, for flags of a client that are not given.
CLIENT = {"batch_size": 5, "learning_rate": 4e-4}
TESTS = {"loss_data": ""}
FEDERATION = FederationPart()
# Of an attack, what clients do otherwise or not at all.
NOT_CLIENTS = ("steps", "epochs", "trains", "ablate", "ablation_layer", "harmless_data", "objective", "order",
               "user_rows", "candidates", "only_layers", "alignment_data")
ROUNDS = ("{clients} clients, {participants} of them in a round, {rounds} rounds of {steps} local steps. Of the "
          "rows of a harmful client {rows:g}% are harmful. \"Attacked\" is after all rounds, and \"along the "
          "attack\" the mean over rounds, the aligned model being round 0.\n")


@dataclasses.dataclass(frozen=True)
class FederatedConfig(study.StudyConfig):
    """Plan."""

    defenses: tuple[str, ...] = field(("sft", "t_vaccine", "booster"), "Methods of the alignment, as of run.")
    harmful_clients: tuple[str, ...] = field(
        ("0", "0.1", "0.2", "0.3"), "Parts of the clients that are harmful.")
    splits: tuple[str, ...] = field(
        ("iid", "sorted"), "How rows are split among clients: iid; sorted, most clients with one label of the user's "
        "task; or dirichlet:ALPHA, parts of the labels by a Dirichlet distribution.")
    rules: tuple[str, ...] = field(
        ("fedavg", "fedprox:mu=0.1", "median", "trimmed_mean:share=0.2", "clipped_mean:norm=0.2"),
        "How updates are joined: fedavg, fedprox:mu=M, median, trimmed_mean:share=S (cut on each side), "
        "clipped_mean:norm=N.")
    rules_at: str = field("0.2", "Part of harmful clients at which the rules but the first are compared.")
    score_rounds: tuple[str, ...] = field(
        ("5", "10", "20"), "Rounds after which a model is scored; the last one always is.")
    federation: FederationPart = FEDERATION

    def __post_init__(self):
        super().__post_init__()
        for name in ("harmful_clients", "splits", "rules", "score_rounds"):
            values = getattr(self, name)
            require(bool(values) and len(set(values)) == len(values), name, values, "at least one, each once")
        for name, values in (("harmful_clients", self.harmful_clients), (
                "rules_at", (self.rules_at,) if len(self.rules) > 1 else ())):
            for value in values:
                require(plots.is_number(value), name, value, "a number from 0 to 1")
                self.federation.whole(name, float(value))
        require(len(set(map(float, self.harmful_clients))) == len(self.harmful_clients), "harmful_clients",
                self.harmful_clients, "each part once")
        rounds = self.federation.rounds
        require(all(text.isdecimal() and 1 <= int(text) <= rounds for text in self.score_rounds), "score_rounds",
                self.score_rounds, f"whole numbers from 1 to {rounds}, the rounds")
        for method in self.methods:
            require(not split_method(method)[1], "defenses", method, "a defense of the alignment: clients train as "
                    "they like")

    @property
    def grid(self) -> list[list[Setting]]:
        """[splits][harmful_clients], by the first rule."""
        return [[Setting(share, split, self.rules[0]) for share in self.harmful_clients] for split in self.splits]

    @property
    def compared(self) -> list[Setting]:
        """A setting a rule; none where there is one rule alone."""
        return [Setting(self.rules_at, self.splits[0], rule) for rule in self.rules] if len(self.rules) > 1 else []

    @property
    def settings(self) -> dict[str, Setting]:
        return {setting.text: setting for of in (*self.grid, self.compared) for setting in of}

    def make_plan(self) -> Plan:
        return Plan.product(self.model, self.methods, tuple(self.settings), tuple(map(int, self.seeds)),
                            tuple(map(int, self.score_rounds)))

    def panels(self) -> list[Panel]:
        """HS and FA over the part of harmful clients, of every split, and by rule."""
        found = [Panel(f"Harmful clients, {split_name(of[0].split)}", "harmful_clients", {
            method: [Point(setting.harmful_clients, method, setting.text) for setting in of]
            for method in self.methods}) for of in self.grid]
        if self.compared:
            found.append(Panel(
                f"How updates are joined, a part of {self.rules_at} of the clients harmful, "
                f"{split_name(self.splits[0])}", "", {
                    method: [Point(rule_name(setting.rule), method, setting.text) for setting in self.compared]
                    for method in self.methods}))
        return found


def split_name(split: str) -> str:
    name, _, alpha = split.partition(":")
    return {"iid": "clients alike", "sorted": "clients sorted by label"}.get(name, f"Dirichlet({alpha}) labels")


RULES = {"fedavg": "FedAvg", "fedprox": "FedProx", "median": "median", "trimmed_mean": "trimmed mean",
         "clipped_mean": "clipped mean"}


def rule_name(rule: str) -> str:
    """"trimmed_mean:share=0.2" -> "trimmed mean (share = 0.2)"."""
    name, *items = rule.split(":")
    settings = ", ".join(names.setting(*item.split("=", 1)) for item in items)
    return RULES.get(name, name.replace("_", " ")) + (f" ({settings})" if settings else "")


Curves = Mapping[tuple[str, str], Mapping[str, curves.Curve]]  # (measure, text of a setting) -> {method: curve}


def curves_of(table: pd.DataFrame, settings: Iterable[Setting]) -> dict[tuple[str, str], dict[str, curves.Curve]]:
    """HS, or not refused, and FA over rounds."""
    measures = table["measure"].unique()
    shown = [name for name in (names.harm(measures), names.accuracy(measures)) if name]
    return {(measure, setting.text): curves.attack_curves(table, measure, setting.text)
            for measure in shown for setting in settings}


def plot_rounds(path: Path, found: Curves, settings: list[Setting], methods: Iterable[str]) -> None:
    """A row of panels a measure, a column a part of harmful clients."""
    looks = styles(methods)
    figure, axes = plots.panels(len(found), columns=len(settings), size=(2.9, 2.6))
    for axis, ((measure, text), by_method) in zip(axes, found.items(), strict=True):
        part = next(setting.harmful_clients for setting in settings if setting.text == text)
        curves.plot_curves(axis, by_method, measure, "round", looks, f"harmful clients {part}")
    several = any(each.runs > 1 for of in found.values() for curve in of.values() for each in curve.values())
    plots.legend(figure, axes, (plots.SD, plots.RUN) if several else ())
    plots.save(figure, path)


def rounds_table(found: Curves, settings: list[Setting], measure: str) -> str:
    """Markdown: a line for every part of harmful clients and method, a column a round."""
    rounds = sorted({step for of in found.values() for curve in of.values() for step in curve})
    lines = [[setting.harmful_clients, names.method(method),
              *(tables.percent(curve.get(step), interval=False) for step in rounds)]
             for setting in settings for method, curve in found.get((measure, setting.text), {}).items()]
    return tables.table(["harmful clients", "method", *(f"round {step}" for step in rounds)], lines)


def report(config: FederatedConfig, found: pd.DataFrame, folder: Path) -> str:
    plan, part = config.make_plan(), config.federation
    text = ["# Clients who fine-tune together\n",
            missing(found, Cells(plan.pairs, plan.backbones, plan.seeds)),
            ROUNDS.format(clients=part.clients, participants=part.participants, rounds=part.rounds,
                          steps=part.local_steps, rows=100 * part.harmful_rows),
            panels.panels_report(found, folder, "", config.panels(), plan.backbones, plan.seeds)]
    for i, of in enumerate(config.grid):
        by = curves_of(found, of)
        if not any(by.values()):
            continue
        name = f"rounds{i}.png"
        plot_rounds(folder / name, by, of, config.methods)
        text += [f"## Over rounds, {split_name(of[0].split)}\n", f"![HS and FA over rounds]({name})\n"]
        for measure in dict.fromkeys(measure for measure, _ in by):
            text += [f"{names.measure(measure).heading}, mean ± standard deviation over runs:\n",
                     rounds_table(by, of, measure)]
    text.append(update_section(config, found))
    return "\n".join(part for part in text if part)


def update_section(config: FederatedConfig, found: pd.DataFrame) -> str:
    """Markdown: how long updates were, which says where a norm clips."""
    measures = {"update_norm_others": "of other clients", "update_norm_harmful": "of harmful ones",
                "server_update_norm": "joined"}
    rows = found[found["measure"].isin(measures)]
    lines = []
    for (method, text), of in rows.groupby(["method", "attack"], sort=False):
        lines.append([names.method(method), names.attack(text), *(
            _mean(results.pick(of, measure=measure)["value"]) for measure in measures)])
    if not lines:
        return ""
    return ("## Length of updates\n\nMean of the 2-norm over scored rounds and runs.\n\n"
            + tables.table(["method", "setting", *measures.values()], lines))


def _mean(values: pd.Series) -> str:
    return f"{values.mean():.3g}" if len(values) else tables.NONE


CLIENTS = cli.ATTACK._replace(without=(*cli.ATTACK.without, *NOT_CLIENTS), title="Clients: ")


def study_of(config: FederatedConfig, align: Mapping[str, Any], client: Mapping[str, Any], scores: Mapping[str, Any]
             ) -> Federated:
    """Of flat values of the stages that were given. Raises FieldError for one that nothing reads."""
    on_world = (CLIENT, TESTS) if config.on_world else ({}, TESTS)
    settings = make_settings(config, align, {**on_world[0], **client}, {**on_world[1], **scores})
    plan = config.make_plan()
    check_given(Plan.product(plan.backbones, plan.methods, (attack_text(0, 1),), plan.seeds), settings, align, client)
    return Federated(plan, config.settings, settings, config.federation, Path(config.run_dir))


def study_federated(config: FederatedConfig, align: Mapping[str, Any], client: Mapping[str, Any],
                    scores: Mapping[str, Any]) -> str:
    """Carries out what has not been carried out yet; returns the report."""
    carry_out(study_of(config, align, client, scores), config.overwrite)
    folder = Path(config.run_dir)
    return study.publish(folder, report(config, read_results(folder), folder))


VERB = study.own_verb(__doc__, FederatedConfig, study_federated, (*study.WITHOUT, "attacks", "score_steps"),
                      (cli.ALIGNMENT, CLIENTS, cli.EVALUATION))

if __name__ == "__main__":
    cli.call("federated", VERB)
