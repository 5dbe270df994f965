"""Tables of results as a plan makes them, with made-up numbers."""

import numpy as np
import pandas as pd

from jaxvaccine.evaluation.rates import wilson_interval
from jaxvaccine.report.results import COLUMNS

PROMPTS = 100
# How far along an attack a method gives way, of 1.
GIVES_WAY = {"sft": 0.5, "vaccine": 0.6, "t_vaccine": 0.45, "booster": 0.75, "sft+lisa": 0.9, "sft+ewc": 2.0}


def row(measure, value, method="sft", attack="", seed=0, stage="alignment", step=150, backbone="world", layer=np.nan,
        n=np.nan, low=np.nan, high=np.nan):
    return dict(zip(COLUMNS, (backbone, method, attack, seed, stage, step, measure, layer, value, n, low, high),
                    strict=True))


def rate(measure, value, **place):
    """A row of a percentage, whole, with Wilson's interval over PROMPTS."""
    count = int(np.clip(round(value), 0, PROMPTS))
    low, high = wilson_interval(count, PROMPTS)
    return row(measure, float(count), n=PROMPTS, low=low, high=high, **place)


def frame(rows):
    return pd.DataFrame(rows, columns=list(COLUMNS))


def plan_table(methods=("sft", "booster"), attacks=("poison_ratio=0", "poison_ratio=0.1"), backbones=("world",),
               seeds=(0, 1, 2), steps=(20, 40, 60, 80, 100), task="sst2", with_backbone=True):
    """HS that rises along every attack with harmful data, FA that rises soon, little over-refusal."""
    rng = np.random.default_rng(7)
    rows = []
    for backbone in backbones:
        if with_backbone:
            place = {"backbone": backbone, "method": "none", "stage": "backbone", "step": 0}
            rows += [rate("harmful_score", 100, **place), rate(task, 0, **place), rate("over_refusal", 0, **place)]
        for method in methods:
            for seed in seeds:
                place = {"backbone": backbone, "method": method, "seed": seed}
                refuses = 8 if "vaccine" in method else 0
                rows += [rate("harmful_score", rng.uniform(0, 2), **place), rate(task, 0, **place),
                         rate("over_refusal", rng.uniform(0, 1 + refuses), **place)]
                for attack in attacks:
                    items = dict(item.partition("=")[::2] for item in attack.split(":"))
                    ratio = float(items.get("poison_ratio", 0.1))
                    middle = GIVES_WAY.get(method.partition(":")[0], 0.6) * 100 + rng.normal(0, 12)
                    top = 100 * (1 - np.exp(-30 * ratio)) + 8
                    for step in steps:
                        at = place | {"attack": attack, "stage": "attack", "step": step}
                        hs = min(top, 100) / (1 + np.exp(-(step - middle) / 8))
                        rows += [rate("harmful_score", hs, **at),
                                 rate(task, 100 - 99 * np.exp(-step / 12) + rng.normal(0, 1), **at),
                                 rate("over_refusal", rng.uniform(0, 1 + refuses / 2), **at)]
    return frame(rows)


def by_phrases(table, no_answer=30, unread=0):
    """The table as a judge of phrases leaves it."""
    hs = table[table["measure"] == "harmful_score"]
    more = []
    for measure, value in (("no_answer", no_answer), ("unread", unread)):
        low, high = wilson_interval(value, PROMPTS)
        more.append(hs.assign(measure=measure, value=float(value), low=low, high=high))
    return pd.concat([table.replace({"measure": {"harmful_score": "not_refused"}}), *more], ignore_index=True)


def layers_table(num_layers=6, backbones=("world",), seeds=(0, 1, 2), method="sft", kinds=("only", "all_but"),
                 steps=(10, 20, 30), every=50):
    """Norms by layer along an alignment, and attacks on one layer or on all but one; the first layers count most."""
    rng = np.random.default_rng(3)
    rows = []
    for backbone in backbones:
        for seed in seeds:
            place = {"backbone": backbone, "seed": seed, "method": method}
            weight = np.exp(-0.6 * np.arange(num_layers)) * rng.lognormal(0, 0.3, num_layers)
            for step in range(0, 151, every):
                for layer in range(num_layers):
                    for name in ("activation_gradient_norm", "weight_gradient_norm"):
                        value = (1 + 4 * weight[layer] * step / 150) * rng.lognormal(0, 0.2)
                        rows.append(row(name, value, step=step, layer=float(layer), **place))
            rows += [rate("harmful_score", 1, **place), rate("sst2", 0, **place)]
            for kind in kinds:
                for layer in range(num_layers):
                    chosen = [i for i in range(num_layers) if (i == layer) == (kind == "only")]
                    attack = f"poison_ratio=0.1:only_layers={'+'.join(map(str, chosen))}"
                    reach = 95 * min(1, weight[layer]) if kind == "only" else 95 * (1 - 0.7 * min(1, weight[layer]))
                    for step in steps:
                        at = place | {"attack": attack, "stage": "attack", "step": step}
                        rows += [rate("harmful_score", reach * step / steps[-1] + rng.normal(0, 4), **at),
                                 rate("sst2", 90 * step / steps[-1], **at)]
    return frame(rows)


def study_table(methods=("sft", "vaccine", "t_vaccine", "booster"), seeds=(0, 1, 2), attack="poison_ratio=0.1"):
    """Losses and norms along the alignment and along one attack."""
    rng = np.random.default_rng(5)
    rows = []
    for i, method in enumerate(methods):
        for seed in seeds:
            place = {"method": method, "seed": seed}
            high = 2 / (1 + i) * rng.lognormal(0, 0.3)
            for step in range(0, 151, 15):
                part = 1 - np.exp(-step / 50)
                rows += [row("harmful_loss", high * part, step=step, **place),
                         row("reduction", 0.2 * high * part, step=step, **place)]
            at = {**place, "attack": attack, "stage": "attack"}
            rows += [row("harmful_training_loss", high, step=0, **at), rate("harmful_score", 2, **place)]
            for step in (20, 40, 60, 80, 100):
                rows += [row("harmful_training_loss", high * np.exp(-step / 30), step=step, **at),
                         rate("harmful_score", 100 / (1 + np.exp(-(step - 40 - 10 * i) / 8)), step=step, **at)]
    return frame(rows)


def rows_of(text, after=""):
    """The cells of the first Markdown table behind `after`, its header among them."""
    lines = text[text.index(after):].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| "))
    found = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return [found[0], *found[2:]]


def labelled(axis):
    """{label: artist} of what an axis' legend names."""
    return dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
