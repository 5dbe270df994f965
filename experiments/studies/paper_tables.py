"""What the papers' tables go through, as cells of a plan. What a model or the given data cannot have is said."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxvaccine import data
from jaxvaccine.experiment import plans, recipes
from jaxvaccine.experiment.plans import Panel, Point

STATISTICS, CRITICALITY, SYSTEM = "statistics", "criticality", "system"


class Entry(NamedTuple):
    """A row of a paper's table.

    Attributes:
      method, attack: the cell's, as a plan has them.
      curve: the method that it belongs to in a figure.
      x: the place on the figure's axis.
      task, p, n, setting: as published.csv spells them.
      backbone: which of the models, from 0.
    """

    method: str
    attack: str
    curve: str
    x: str
    task: str
    p: str
    n: str
    setting: str = ""
    backbone: int = 0


class Table(NamedTuple):
    """Attributes:
      title: its headline.
      xlabel: of its figure; "" if the places have names.
      entries: its rows.
      published: names of the tables in published.csv that it stands beside.
      note: what of it is not there, and why.
    """

    title: str
    xlabel: str
    entries: tuple[Entry, ...]
    published: tuple[str, ...] = ()
    note: str = ""

    def panel(self) -> Panel:
        """As a figure, of the first model."""
        curves: dict[str, list[Point]] = {}
        for entry in self.entries:
            if entry.backbone == 0:
                curves.setdefault(entry.curve, []).append(Point(entry.x, entry.method, entry.attack))
        return Panel(self.title, self.xlabel, curves)


@dataclasses.dataclass(frozen=True)
class Values:
    """What the lists run through. The papers' values, or few of them."""

    ratios: Sequence[str] = ("0", "0.05", "0.1", "0.15", "0.2")
    counts: Sequence[str] = ("500", "1000", "1500", "2000", "2500")
    lam: Sequence[str] = ("0", "5", "20", "100")
    alpha: Sequence[str] = ("0.01", "0.1", "0.5")
    rho: Sequence[str] = ("1", "3", "10")
    layers: Sequence[str] = ("4", "8", "16")
    sample_every: Sequence[str] = ("5", "20", "100")
    probe_every: Sequence[str] = ("50", "200", "1000")
    harmful_rows: Sequence[str] = ("50", "500", "5000")
    alignment_rows: Sequence[str] = ("100", "500", "1000", "1500", "5000")
    few_rows: str = "500"  # of the alignment, where combinations are compared


FULL = {"booster": Values(), "t_vaccine": Values(
    harmful_rows=("20", "50", "200"), alignment_rows=("100", "500", "1000", "2000"))}
REDUCED = Values(("0", "0.1", "0.2"), ("100", "500", "1000"), ("0", "0.2", "0.4"), ("0.03", "0.1", "0.3"),
                 ("1.5", "5", "15"), ("1", "3", "6"), ("5", "20", "150"), ("5", "20", "150"), ("20", "100", "600"),
                 ("100", "400", "1600"), "400")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the tables are made for.

    Attributes:
      paper: "booster" or "t_vaccine".
      values: what the lists run through.
      align: flat values of the paper's own method's alignment: what is not varied.
      attack: (method, as in recipes.METHODS; task) -> flat values of its attack.
      user_data: {task: source} of the user's tasks that there is data for; the first is the usual one.
      models: the backbones.
      longer: what the attacks over n have beside it.
    """

    paper: str
    values: Values
    align: Mapping[str, Any]
    attack: Callable[[str, str], Mapping[str, Any]]
    user_data: Mapping[str, str]
    models: Sequence[str]
    longer: str = ""

    @property
    def task(self) -> str:
        return next(iter(self.user_data))

    @property
    def ratio(self) -> str:
        return f"{self.attack(self.paper, self.task)['poison_ratio']:g}"

    @property
    def count(self) -> str:
        return str(self.attack(self.paper, self.task)["n"])

    @property
    def protocol(self) -> data.Protocol:
        return self.align.get("data_protocol", "distinct")

    def method(self, name: str) -> str:
        """As a plan has it, of a name in recipes.METHODS[paper]."""
        return recipes.METHODS[self.paper][name]


def limited(sources: str, count: int, protocol: data.Protocol = "distinct") -> str:
    """Data sources cut to `count` examples in all, the first of each, in the proportion that there are.

    Raises:
      ValueError: there are fewer.
    """
    parsed = data.parse_sources(sources)
    sizes = [len(data.load_examples(source, protocol)) for source in parsed]
    if count > sum(sizes):
        raise ValueError(f"data source {sources}: found {sum(sizes)} examples, expected at least {count}")
    ends = [round(sum(sizes[:i]) * count / sum(sizes)) for i in range(len(sizes) + 1)]
    taken = [end - start for start, end in itertools.pairwise(ends)]
    return ",".join(str(dataclasses.replace(source, start=source.start or 0, stop=(source.start or 0) + size))
                    for source, size in zip(parsed, taken, strict=True) if size)


def _joined(sources: str) -> str:
    """Several data sources as a method's or an attack's text has them."""
    return sources.replace(",", "+")


def _changes(text: str, **changes: Any) -> str:
    return text + "".join(f":{name}={value}" for name, value in changes.items())


def _with(method: str, **changes: Any) -> str:
    """A method's text with other settings of its alignment."""
    aligned, tuning = plans.split_method(method)
    return _changes(aligned, **changes) + (f"+{tuning}" if tuning else "")


def _over_attack(of: Setting, names: Iterable[str], values: Sequence[str], name: str) -> tuple[Entry, ...]:
    entries = []
    for method in names:
        for value in values:
            p, n = (value, of.count) if name == "poison_ratio" else (of.ratio, value)
            more = {} if name == "poison_ratio" else {"n": n}
            attack = _changes(f"poison_ratio={p}", **more) + (of.longer if more else "")
            entries.append(Entry(of.method(method), attack, of.method(method), value, of.task, p, n))
    return tuple(entries)


def _over_alignment(of: Setting, names: Iterable[str], field: str, values: Sequence[str], setting: str = "",
                    write: Callable[[str], str] = str) -> tuple[Entry, ...]:
    """Values of a field of the alignment; the usual one is not written, and so shares other tables' cells."""
    entries = []
    for name in names:
        for value in values:
            method, usual = of.method(name), of.align.get(field)
            same = str(usual) == write(value) or (isinstance(usual, int | float) and _number(value) == float(usual))
            entries.append(Entry(method if same else _with(method, **{field: write(value)}), f"poison_ratio={of.ratio}",
                                 method, value, of.task, of.ratio, of.count, f"{setting or field}={value}"))
    return tuple(entries)


def _number(text: str) -> float:
    return float(text) if re.fullmatch(r"[\d.e+-]+", text) else float("nan")


def _rows_table(of: Setting, names: Sequence[str], field: str, counts: Sequence[str], title: str, setting: str
                ) -> Table:
    sources = of.align.get(field, "")
    there = len(data.load_examples(sources, of.protocol)) if sources else 0
    known = [count for count in counts if int(count) <= there]
    left = [count for count in counts if int(count) > there]

    def write(count: str) -> str:
        return sources if int(count) == there else _joined(limited(sources, int(count), of.protocol))

    note = f"Not here: {', '.join(left)} rows; there are {there}." if left else ""
    return Table(title, title[0].lower() + title[1:], _over_alignment(of, names, field, known, setting, write),
                 (setting,), note)


def _tasks(of: Setting, names: Iterable[str]) -> Table:
    entries = []
    for name in names:
        for task, source in of.user_data.items():
            method, usual, own = of.method(name), of.attack(name, of.task), of.attack(name, task)
            changed = {key: value for key, value in own.items()
                       if usual.get(key) != value and key not in ("poison_ratio", "defense")}
            p = f"{own['poison_ratio']:g}"
            other = {} if task == of.task else {"user_data": _joined(source), **changed}
            entries.append(Entry(method, _changes(f"poison_ratio={p}", **{k: _text(v) for k, v in other.items()}),
                                 method, task, task, p, str(own["n"])))
    absent = [task for task in recipes.TASKS[of.paper] if task not in of.user_data]
    return Table("The user's task", "", tuple(entries), ("tasks",), f"Not here, for want of data: {', '.join(absent)}."
                 if absent else "")


def _text(value: Any) -> str:
    return "+".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)


def _models(of: Setting, names: Iterable[str]) -> Table:
    entries = tuple(Entry(of.method(name), f"poison_ratio={of.ratio}", of.method(name), model, of.task, of.ratio,
                          of.count, backbone=i) for name in names for i, model in enumerate(of.models))
    note = "" if len(of.models) > 1 else "One model here: --model takes several."
    table = ("models_gsm8k",) if of.task == "gsm8k" else ("models",)
    return Table("Models", "", entries, table, note)


def _named(of: Setting, title: str, variants: Mapping[str, str], published: Sequence[str] = (), note: str = "",
           settings: Mapping[str, str] = {}) -> Table:
    return Table(title, "", tuple(
        Entry(method, f"poison_ratio={of.ratio}", next(iter(variants.values())), name, of.task, of.ratio, of.count,
              settings.get(name, "")) for name, method in variants.items()), tuple(published), note)


def booster(of: Setting) -> dict[str, Table]:
    """Booster's tables, by name."""
    values, rows = of.values, ("sft", "lisa", "repnoise", "vaccine", "booster")
    few = _joined(limited(of.align["alignment_data"], int(of.values.few_rows), of.protocol))
    combined = tuple(entry._replace(method=method, curve=method, setting=f"alignment_rows={of.values.few_rows}")
                     for name in ("vaccine", "booster", "vaccine+booster")
                     for method in [_with(of.method(name), alignment_data=few)]
                     for entry in _over_attack(of, (name,), values.counts, "n"))
    both = tuple(entry._replace(curve=of.method("booster+lisa")) for entry in _over_attack(
        of, ("booster+lisa",), values.ratios, "poison_ratio"))
    gsm8k = of.task == "gsm8k"
    return {
        "ratios": Table("Ratio of harmful data", "p", _over_attack(of, rows, values.ratios, "poison_ratio"),
                        ("ratios_gsm8k",) if gsm8k else ("ratios",)),
        "samples": Table("Size of the user's data", "n", _over_attack(of, rows, values.counts, "n"),
                         ("samples_gsm8k",) if gsm8k else ("samples",)),
        "tasks": _tasks(of, rows), "models": _models(of, rows),
        "lam": Table("Weight of the regularizer", "lam", _over_alignment(of, ("booster",), "lam", values.lam),
                     ("lam",)),
        "alpha": Table("Length of the simulated step", "alpha",
                       _over_alignment(of, ("booster",), "alpha", values.alpha), ("alpha",)),
        "harmful_rows": _rows_table(of, ("booster",), "harmful_data", values.harmful_rows,
                                    "Number of harmful rows in the alignment", "harmful_rows"),
        "alignment_rows": _rows_table(of, ("sft", "booster"), "alignment_data", values.alignment_rows,
                                      "Number of alignment rows", "alignment_rows"),
        "combination": Table(f"Vaccine + Booster, {of.values.few_rows} alignment rows", "n", combined,
                             ("combination",)),
        "lisa_combination": Table("Booster + Lisa", "p", both, ("ratios_gsm8k",) if gsm8k else ()),
        "ablation": _named(of, "Ablation", {
            "Booster": of.method("booster"), "no regularizer": _with(of.method("booster"), lam="0"),
            "exact gradient": _with(of.method("booster"), exact="true"),
            "no last term": _with(of.method("booster"), last_term="false")}, ("ablation",),
            "No last term: of the paper's equation 3, so that the harmful loss itself is lowered."),
    }


def t_vaccine(of: Setting) -> dict[str, Table]:
    """T-Vaccine's tables, by name."""
    values, rows = of.values, tuple(recipes.METHODS["t_vaccine"])
    own = of.method("t_vaccine")
    return {
        "ratios": Table("Ratio of harmful data", "p", _over_attack(of, rows, values.ratios, "poison_ratio"), ("main",)),
        "samples": Table("Size of the user's data", "n", _over_attack(of, rows, values.counts, "n")),
        "tasks": _tasks(of, rows), "models": _models(of, rows),
        "layers": Table("Active layers S", "layers", _over_alignment(of, ("t_vaccine",), "layers", values.layers)),
        "rho": Table("Norm of the perturbation", "rho", _over_alignment(of, ("t_vaccine",), "rho", values.rho)),
        "sample_every": Table("Steps J between draws", "sample_every",
                              _over_alignment(of, ("t_vaccine",), "sample_every", values.sample_every)),
        "probe_every": Table("Steps K between probes", "probe_every",
                             _over_alignment(of, ("t_vaccine",), "probe_every", values.probe_every)),
        "harmful_rows": _rows_table(of, ("t_vaccine",), "harmful_data", values.harmful_rows,
                                    "Number of harmful rows in the alignment", "harmful_rows"),
        "alignment_rows": _rows_table(of, ("sft", "t_vaccine"), "alignment_data", values.alignment_rows,
                                      "Number of alignment rows", "alignment_rows"),
        "ablation": _named(of, "How layers are chosen, and what is frozen", {
            "T-Vaccine": own, "freezing as released": _with(own, freeze="released"),
            "uniform probabilities": _with(own, importance="uniform"),
            "the most probable layers": _with(own, draw="top")}),
    }


TABLES: Mapping[str, Callable[[Setting], dict[str, Table]]] = {"booster": booster, "t_vaccine": t_vaccine}
# Of every paper's tables, those that a study of its own makes.
STUDIES = {"booster": (STATISTICS, SYSTEM), "t_vaccine": (CRITICALITY, SYSTEM)}
NAMES = {
    "booster": ("ratios", "samples", "tasks", "models", "lam", "alpha", "harmful_rows", "alignment_rows", "combination",
                "lisa_combination", "ablation", *STUDIES["booster"]),
    "t_vaccine": ("ratios", "samples", "tasks", "models", "layers", "rho", "sample_every", "probe_every",
                  "harmful_rows", "alignment_rows", "ablation", *STUDIES["t_vaccine"]),
}
