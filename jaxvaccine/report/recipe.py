"""What a plan's report says of the settings behind its rows: which attack each faced, where that is not the same for
all methods, and where there were fewer data than in the paper whose recipe it is."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxvaccine.experiment import recipes, runs
from jaxvaccine.experiment.plan_folder import result_path
from jaxvaccine.experiment.results import Cell
from jaxvaccine.json_files import read_json
from jaxvaccine.report import names, tables

HEADING = "attack it faced"
NOTE = "The attacks that one text stands for differ between the methods: what differs is in the column.\n"


def _adapter(of: Mapping[str, Any]) -> str:
    if (trains := of.get("trains", "adapter")) != "adapter":  # earlier versions trained adapters alone
        return "all weights" if trains == "all" else "no training"
    which = "new" if of["adapter"] == "new" else "aligned"
    return f"{which} adapter, rank {of['rank']}, alpha {of['lora_alpha']:g}, on {_targets(of['targets'])}"


def _targets(targets: Iterable[str]) -> str:
    return "all projections" if set(targets) == set(recipes.ALL) else ", ".join(
        name.removesuffix("_proj") for name in targets)


def _length(of: Mapping[str, Any]) -> str:
    return f"{of['steps']} steps" if of["steps"] else f"{of['epochs']:g} epochs"


def _rate(of: Mapping[str, Any]) -> str:
    warmup = f", {100 * of['warmup_ratio']:g}% warm-up" if of["warmup_ratio"] else ""
    return f"rate {of['learning_rate']:g} {of['schedule']}{warmup}"


def _layers(of: Mapping[str, Any]) -> str:
    return "all layers" if of["only_layers"] is None else f"{names.layers(of['only_layers'])} alone"


def _plain(name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda of: names.setting(name, f"{of[name]:g}")


# What is said together, {settings: their text}.
_PARTS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], str]] = {
    ("trains", "adapter", "rank", "lora_alpha", "targets"): _adapter, ("dropout",): _plain("dropout"),
    ("only_layers",): _layers, ("steps", "epochs"): _length,
    ("batch_size",): lambda of: f"batches of {of['batch_size']}",
    ("optimizer",): lambda of: names.OPTIMIZERS[of["optimizer"]],
    ("learning_rate", "schedule", "warmup_ratio"): _rate, ("weight_decay",): _plain("weight_decay"),
    ("clip_norm",): _plain("clip_norm"), ("max_length",): lambda of: f"length {of['max_length']}",
    ("n",): lambda of: f"n = {of['n']}",
}


def texts(faced: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """{(method, attack): what it faced}, in the settings in which methods under the same attack differ; {} if they
    differ in none.

    Args:
      faced: as of `experiment.faced.of_plan`.
    """
    # A plan's folder of an earlier version lacks settings that there were not.
    faced = [{**each, "faced": {**runs.BEFORE, **each["faced"]}} for each in faced]
    by_attack: dict[str, list[Mapping[str, Any]]] = {}
    for each in faced:
        by_attack.setdefault(each["attack"], []).append(each["faced"])
    shown = [part for part in _PARTS if any(
        any([of.get(name) for name in part] != [first.get(name) for name in part] for of in rest)
        for first, *rest in by_attack.values())]
    return {(each["method"], each["attack"]): "; ".join(_PARTS[part](each["faced"]) for part in shown)
            for each in faced} if shown else {}


def faced(folder: str | Path) -> dict[tuple[str, str], str]:
    """`texts` of a plan's folder; {} of one with a table of results alone."""
    return texts(_operational(folder).get("faced", ()))


def _operational(folder: str | Path) -> Mapping[str, Any]:
    return runs.read_config(folder)["operational"] if (Path(folder) / runs.CONFIG).is_file() else {}


def section(folder: str | Path) -> str:
    """Markdown: a table of the attack that each method faced, "" where it is the same for all."""
    found = faced(folder)
    if not found:
        return ""
    by_text: dict[tuple[str, str], list[str]] = {}
    for (method, attack), text in found.items():
        by_text.setdefault((method, text), []).append(names.attack(attack))
    rows = [[names.method(method), "; ".join(attacks), text] for (method, text), attacks in by_text.items()]
    return f"## Attacks\n\n{tables.table(['method', 'attack', HEADING], rows)}\n{NOTE}"


def fewer_data(folder: str | Path) -> str:
    """Markdown: where the cells that are there read fewer rows than the paper's; "" of no paper's recipe."""
    operational, found = _operational(folder), {}
    if not (paper := operational.get("paper")):
        return ""
    plan = operational["plan"]
    cells = dict.fromkeys((method, text) for method, attacked in plan["pairs"] for text in ("", attacked))
    for method, attack in cells:
        path = result_path(Path(folder), Cell(plan["backbones"][0], method, attack, plan["seeds"][0]))
        if path.is_file():
            counts = counts_of(read_json(path).get("accounts", {}), attacked=bool(attack))
            found[recipes.fewer_than_published(paper, operational["of_paper"][method], counts)] = None
    lines = [f"- {text[0].upper()}{text[1:]}.\n" for text in found if text]
    return "".join(["Less than the paper has:\n\n", *lines]) if lines else ""


def counts_of(record: Mapping[str, Mapping[str, Mapping[str, Any]]], attacked: bool = False) -> dict[str, int]:
    """Rows by what `recipes.rows` calls them, of a run's accounts: of an alignment, or of an attack."""
    known = {"alignment": "guide"} if attacked else {"alignment": "alignment", "harmful": "harmful"}
    return {name: sum(counts["examples"] for counts in record[of].values()) for of, name in known.items()
            if of in record}
