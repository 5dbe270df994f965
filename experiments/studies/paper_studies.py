"""The papers' figures and tables that are more than scores of a plan: curves inside models, and what it costs."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.benchmarks.memory import step_memory
from experiments.studies import criticality as layers_study
from experiments.studies import model_statistics, paper_tables, published
from jaxvaccine.experiment import recipes, stage
from jaxvaccine.experiment.align import AlignConfig
from jaxvaccine.experiment.config import make
from jaxvaccine.experiment.plan_folder import Probes
from jaxvaccine.experiment.plans import Settings, align_folder, cell_configs
from jaxvaccine.experiment.results import Cell
from jaxvaccine.experiment.run import run
from jaxvaccine.report import names, results, tables
from jaxvaccine.report.curves import curves_report
from jaxvaccine.report.layers import layers_report
from jaxvaccine.report.published_curves import depth_correlation, plot_layers, plot_statistics

# The papers' own figures, as published.csv spells whose they are.
REPORTED_BY = {"booster": "Booster", "t_vaccine": "T-Vaccine"}
# Places of an attack at which Booster's figure has points.
POINTS = 10
_TESTS = ("sst2_test", "agnews_test", "gsm8k_test", "alpaca_eval_test", "benign_test", "loss_data")


def _figures(config: Any, table: str) -> pd.DataFrame:
    found = published.load()
    return found[(found["list"] == config.paper) & (found["table"] == table)]


def _of_study(config: Any, folder: Path, **more: Any) -> dict[str, Any]:
    return {"run_dir": str(folder), "model": config.model[:1], "seeds": config.seeds, "recipe": config.recipe,
            "progress": config.progress, **more}


def statistics(config: Any, settings: Settings, setting: paper_tables.Setting, folder: Path,
               given: Sequence[Mapping[str, Any]]) -> str:
    """Losses and HS along alignment and attack, with the published curves drawn in."""
    root, attack = folder / "statistics", f"poison_ratio={setting.ratio}"
    _, attacked = cell_configs(settings, folder, Cell(config.model[0], "sft", attack, int(config.seeds[0])))
    last = attacked.training.count_steps(attacked.data.n)
    steps = tuple(str(round(last * i / POINTS)) for i in range(POINTS + 1))
    probe = paper_tables.limited(setting.align["harmful_data"], 50, setting.protocol)
    of = make(model_statistics.StatisticsConfig, _of_study(
        config, root, defenses=("sft", "booster"), attacks=(attack,), score_steps=steps, harmful_probe=probe,
        measure_every=max(1, last // POINTS)))
    align, attack_values, scores = given
    run(of, align, attack_values, {**scores, **dict.fromkeys(_TESTS, "")}, model_statistics.make_probes(of))
    found, figures = results.read_results(root), _figures(config, "statistics")
    plot_statistics(folder / "published_statistics.png", found, attack, figures, config.model[0])
    losses = _figures(config, "alignment_loss")
    rows = [[names.method(method), *(f"{value:.3f}" for value in of_method["value"])]
            for method, of_method in losses.groupby("method", sort=False)]
    harm = names.harm(found["measure"].unique())
    note = model_statistics.NOTE.format(step_length=of.step_length, harm=names.measure(harm).name)
    inner = curves_report(found, root, "Model statistics", model_statistics.ALIGNMENT,
                          (*model_statistics.ATTACK, harm), note, "statistics")
    return "\n".join([
        "## Statistics over steps\n", "![Losses and HS along the attack, with the published curves]"
        "(published_statistics.png)\n",
        f"Published: {figures.iloc[0]['source']}, {len(figures)} points of Llama-2-7B. Published harmful loss along "
        "the alignment (of its own batches):\n", tables.table(["method", "at the start", "at the end"], rows),
        inner.replace("\n## ", "\n### ").replace("# Model statistics\n", "", 1).replace(
            "](statistics", "](statistics/statistics")])


def criticality(config: Any, settings: Settings, setting: paper_tables.Setting, folder: Path,
                given: Sequence[Mapping[str, Any]]) -> str:
    """Harmful gradient norms by layer with the published, and what attacks on single layers reach."""
    root = folder / "criticality"
    last = cell_configs(settings, folder, Cell(config.model[0], "sft", "", 0))[0].training.steps or 100
    of = make(layers_study.CriticalityConfig, _of_study(
        config, root, defenses=("sft",), measure_every=max(1, last // 3)))
    align, attack, scores = given
    run(of, align, attack, {**scores, **dict.fromkeys(_TESTS[3:], "")},
        Probes(layers_study.measure_norms, every=of.measure_every, check=layers_study.check))
    found, figures, measure = results.read_results(root), _figures(config, "criticality"), "activation_gradient_norm"
    norms = results.pick(found, stage="alignment", measure=measure)
    steps = sorted(norms["step"].unique())
    plot_layers(folder / "published_layers.png", found, measure, figures, steps)
    rows = [["published, " + name.replace("=", " "), f"{depth_correlation(series.sort_values('layer')['value']):.2f}"]
            for name, series in figures.groupby("setting", sort=False)]
    rows += [[f"ours, after {step} steps", f"{depth_correlation(mean.to_numpy()):.2f}"] for step in steps
             for mean in [results.pick(norms, step=step).groupby("layer")["value"].mean()]]
    return "\n".join([
        "## Layer criticality\n",
        f"![Harmful gradient norms by layer, ours and the published {len(figures)} points](published_layers.png)\n",
        "Spearman's ρ of the norms with depth; what the published series count is not said where they are from:\n",
        tables.table(["norms", "ρ with depth"], rows),
        re.sub("^#", "###", layers_report(found, root), flags=re.MULTILINE).replace("](", "](criticality/")])


def step_seconds(folder: Path) -> float:
    """The median time of a step of a finished run, from its metrics; NaN of fewer than three."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = np.diff([line["seconds"] for line in lines])
    return float(np.median(seconds[seconds > 0])) if (seconds > 0).sum() > 1 else float("nan")


def system(config: Any, settings: Settings, setting: paper_tables.Setting, folder: Path,
           given: Sequence[Mapping[str, Any]]) -> str:
    """Time and memory of every method's alignment, ours and the published, each against SFT's."""
    del given
    architecture, figures = stage.read_architecture(config.model[0]), _figures(config, "system")
    found: dict[str, tuple[float, float]] = {}
    for name in recipes.METHODS[config.paper]:
        method = setting.method(name)
        if "+lisa" in method or name == "none":
            continue
        cell = Cell(config.model[0], method, "", int(config.seeds[0]))
        aligned: AlignConfig = cell_configs(settings, folder, cell)[0]
        run_dir = align_folder(folder, cell)
        seconds = step_seconds(run_dir) if (run_dir / "metrics.jsonl").is_file() else float("nan")
        found[method] = seconds, step_memory(aligned, "float32", architecture).total
    own = figures[figures["reported_by"] == REPORTED_BY[config.paper]]

    def stated(method: str, measure: str, unit: str) -> str:
        rows = own[(own["method"] == method) & (own["measure"] == measure)]
        return f"{rows.iloc[0]['value']:g} {unit}" if len(rows) else tables.NONE

    base = found["sft"]
    rows = [[names.method(method), tables.NONE if np.isnan(seconds) else f"{seconds:.3f}",
             tables.NONE if np.isnan(seconds) else f"{seconds / base[0]:.2f}", stated(method, "alignment_time", "h"),
             f"{memory:.3f}", f"{memory / base[1]:.2f}", stated(method, "memory", "GB")]
            for method, (seconds, memory) in found.items()]
    text = ["## System cost\n", tables.table([
        "method", "a step here, s", "/ SFT", "alignment, published", "memory of a step here, GiB", "/ SFT",
        "memory, published"], rows),
        "Time: the median step of this machine, which may do other things; – where the run is not there. Memory: "
        "weights, adapter, optimizer and XLA's temporary buffers of one step in float32, compiled for this machine's "
        "own device.\n"]
    if "vaccine" in found and "t_vaccine" in found:
        ours = 100 * (found["t_vaccine"][1] / found["vaccine"][1] - 1)
        claims = _figures(config, "claims")
        stated_memory = claims[(claims["measure"] == "memory")].iloc[0]
        text.append(f"T-Vaccine's memory against Vaccine's: {ours:+.2f}% here, {stated_memory['value']:+.2f}% "
                    "published".replace("-", "−") + f" ({stated_memory['source']}).\n")
    return "\n".join(text)


STUDIES: Mapping[str, Callable[..., str]] = {
    paper_tables.STATISTICS: statistics, paper_tables.CRITICALITY: criticality, paper_tables.SYSTEM: system}
