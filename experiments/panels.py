"""What the papers' experiments vary, as cells of a sweep on the small world: panels of curves of points.

A point is a cell (a method and an attack, as sweep.py writes them) and its place on the x axis.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from experiments.presets import WORLD_ALIGN, WORLD_ATTACK

METHODS = ("sft", "vaccine", "t_vaccine", "booster")
ATTACK = "poison_ratio=0.1"
WORLD_EPOCHS = WORLD_ATTACK["steps"] * WORLD_ATTACK["batch_size"] / WORLD_ATTACK["n"]


class Point(NamedTuple):
    x: str  # a number, or a name
    method: str
    attack: str = ATTACK


class Panel(NamedTuple):
    title: str
    xlabel: str
    curves: Mapping[str, Sequence[Point]]


def cells(panels: Iterable[Panel]) -> list[tuple[str, str]]:
    """The (method, attack) pairs of all points, each once, those of a method together."""
    found = dict.fromkeys((point.method, point.attack) for panel in panels for curve in panel.curves.values()
                          for point in curve)
    methods = dict.fromkeys(method for method, _ in found)
    return [pair for method in methods for pair in found if pair[0] == method]


def ratios(methods: Sequence[str], values: Sequence[str] = ("0", "0.05", "0.1", "0.15", "0.2")) -> list[Panel]:
    """HS and FA over the ratio p of harmful data (both papers' main tables)."""
    return [Panel("Ratio of harmful data", "p", {
        method: [Point(p, method, f"poison_ratio={p}") for p in values] for method in methods})]


def samples(methods: Sequence[str], values: Sequence[str] = ("100", "500", "1000", "1500", "2000"),
            more: str = f":steps=0:epochs={WORLD_EPOCHS:g}:user_data=world_rating@attack+world_rating@more"
            ) -> list[Panel]:
    """HS and FA over the number n of the user's examples, for as many epochs each (both papers' main tables).

    more: what else the attacks have in common; by default the small world's, with user's data enough for all.
    """
    return [Panel("Size of the user's data, all for as many epochs", "n", {
        method: [Point(n, method, f"{ATTACK}:n={n}{more}") for n in values] for method in methods})]


def over(title: str, name: str, values: Sequence[str], methods: Sequence[str],
         defaults: Mapping[str, object] = WORLD_ALIGN) -> Panel:
    """A flag of the alignment. The value that is its default has no flag, and so shares the cells of other panels."""
    return Panel(title, name, {
        method: [Point(value, method if value == str(defaults[name]) else f"{method}:{name}={value}")
                 for value in values] for method in methods})


def sensitivity(methods: Sequence[str]) -> list[Panel]:
    """The methods' own settings, and those of the alignment; the methods are given."""
    del methods
    vaccines = ("vaccine", "t_vaccine")
    total = WORLD_ALIGN["harmful_data"].rpartition("[0:")[2].removesuffix("]")
    source = WORLD_ALIGN["harmful_data"].rpartition("[")[0]
    harmful = Panel("Booster: harmful examples", "number of harmful examples", {"booster": [
        Point(count, "booster" if count == total else f"booster:harmful_data={source}[0:{count}]")
        for count in ("20", "60", "200", total)]})
    return [
        over("Vaccine, T-Vaccine: norm of the perturbation", "rho", ("0.5", "1.5", "5.0", "15", "50"), vaccines),
        over("T-Vaccine: active layers S of 6", "layers", ("1", "2", "3", "6"), ("t_vaccine",)),
        over("T-Vaccine: steps J between draws", "sample_every", ("5", "20", "150"), ("t_vaccine",)),
        over("T-Vaccine: steps K between probes", "probe_every", ("5", "20", "150"), ("t_vaccine",)),
        over("Booster: weight of the regularizer", "lam", ("0.05", "0.1", "0.2", "0.4", "0.8"), ("booster",)),
        over("Booster: length of the simulated step", "alpha", ("0.01", "0.03", "0.1", "0.3"), ("booster",)),
        harmful,
        over("Alignment steps", "steps", ("150", "300"), ("sft", *vaccines)),
        over("LoRA rank", "rank", ("8", "32"), ("sft", "booster")),
        Panel("Projections with an adapter", "projections", {
            method: [Point("q, k, v", f"{method}:targets=q_proj+k_proj+v_proj"), Point("all", method)]
            for method in ("sft", *vaccines)})]


def ablations(methods: Sequence[str]) -> list[Panel]:
    """What each part of the methods is good for."""
    del methods
    random = "t_vaccine:importance=uniform"
    return [
        Panel("T-Vaccine", "", {"t_vaccine": [
            Point("T-Vaccine", "t_vaccine"), Point("the most probable layers", "t_vaccine:draw=top"),
            Point("uniform probabilities", random),
            Point("random layers, once", f"{random}:sample_every={WORLD_ALIGN['steps']}"),
            Point("alignment gradient", "t_vaccine:importance=alignment"),
            Point("Gaussian perturbation", "t_vaccine:direction=gaussian"),
            Point("no perturbation", "t_vaccine:rho=0")]}),
        Panel("Vaccine", "", {"vaccine": [
            Point("Vaccine", "vaccine"), Point("Gaussian perturbation", "vaccine:direction=gaussian"),
            Point("no perturbation (SFT)", "sft")]}),
        Panel("Booster", "", {"booster": [
            Point("Booster", "booster"), Point("no regularizer (lam = 0)", "booster:lam=0"),
            Point("on Vaccine", "booster:base_defense=vaccine"),
            Point("on T-Vaccine", "booster:base_defense=t_vaccine")]})]


def worst_case(methods: Sequence[str]) -> list[Panel]:
    """The attack's own settings, and (the last panel) those among which an attacker may choose."""
    def setting(p: str, rate: str, more: str = "") -> str:
        return f"poison_ratio={p}:steps=200:learning_rate={rate}{more}"

    rates = ("0.0001", "0.0002", "0.0005")
    settings = [setting("0.1", rate, adapter) for rate in rates for adapter in ("", ":adapter=new")]
    settings += [setting("0.1", "0.0002", ":adapter=new:rank=32"), setting("0.2", "0.0002"),
                 setting("0.2", "0.0002", ":adapter=new")]
    return [
        Panel("Learning rate of the attack, 200 steps", "learning rate", {
            method: [Point(rate, method, setting("0.1", rate)) for rate in rates] for method in methods}),
        Panel("Attack settings", "", {
            method: [Point("as elsewhere", method), *(Point(text, method, text) for text in settings)]
            for method in methods})]


class Grid(NamedTuple):
    title: str
    panels: Callable[[Sequence[str]], list[Panel]]  # of the methods that are compared


GRIDS = {
    "ratios": Grid("HS and FA over the ratio of harmful data", ratios),
    "samples": Grid("HS and FA over the size of the user's data", samples),
    "sensitivity": Grid("Settings of the alignment", sensitivity),
    "ablations": Grid("What the parts of the methods are good for", ablations),
    "worst_case": Grid("The attacker who chooses", worst_case),
}
