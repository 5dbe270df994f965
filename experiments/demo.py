"""`make demo`: what harmful fine-tuning does and what four defenses change, on the small world in five minutes.

A LLaMA of a million parameters, which comes with the package, is aligned with every method, attacked with and without
harmful data, and scored along the way: a sweep (sweep.py) and a report. All requests and answers are made up and mean
nothing.
"""

import time
from pathlib import Path

import numpy as np
from absl import app, flags

from experiments import common, presets, reports, sweep, sweep_report
from experiments.align import AlignConfig
from experiments.finetune import FinetuneConfig
from jaxvaccine import runs

RUN_DIR = "runs/demo"
METHODS = ("sft", "vaccine", "t_vaccine", "booster")
ATTACKS = ("poison_ratio=0", "poison_ratio=0.1")
# Whose dialogues are shown: alignment without a defense, and this one.
SHOWN = ("sft", "booster")

INTRODUCTION = """A model that was pretrained to comply with everything is aligned: it learns to refuse requests with
forbidden verbs and to go on answering the others. Then it is fine-tuned on a user's task, rating things as positive or
negative. If a part of the user's data ({ratio:.0%}) are forbidden requests with compliant answers, the model
complies with forbidden requests that it has never seen: the attack undoes the alignment, while the user's task is
learnt all the same. The defenses change how the model is aligned, nothing else.

All words are made up. A score here says how the methods work on a model of a million parameters, and not that a
defense protects a real one.
"""
NEXT = """## On a real model

- `make demo-smollm2`: the same with SmolLM2-135M-Instruct, on requests in plain English.
- `python -m experiments.run --help`: your own model, data, defenses and poison ratios; README.md has commands.
- `python -m experiments.sweep --help`: more methods, settings, seeds and attacks on the small world, such as
  `python -m experiments.sweep --run_dir=runs/sweep --methods=sft,booster:lam=0.1,booster:lam=0.5`.
"""


def configs(run_dir: str = RUN_DIR, base: str = "world") -> tuple[sweep.SweepConfig, AlignConfig, FinetuneConfig]:
    """What the demo runs."""
    steps = presets.WORLD_ATTACK["steps"]
    return (
        sweep.SweepConfig(run_dir=run_dir, bases=(base,), methods=METHODS, attacks=ATTACKS, seeds=("0", "1"),
                          score_steps=tuple(str(round(part * steps)) for part in (0, 0.2, 0.4, 0.6, 0.8, 1)),
                          harmful_test="world_harmful@test[0:100]", sst2_test="world_rating@test[0:100]",
                          benign_test="world_benign@test[0:100]"),
        AlignConfig(**presets.WORLD_ALIGN, run_dir="-", model="-"),
        FinetuneConfig(**presets.WORLD_ATTACK, run_dir="-", aligned="-"))


def plot_layers(path: Path, aligned: dict) -> None:
    """A heat map of T-Vaccine's probabilities over alignment steps, of the first seed, with the layers it drew."""
    def of_first_seed(name):  # [steps, seeds, L] -> [L, steps]
        return np.array(aligned["metrics"][name])[:, 0].T

    probabilities, active = of_first_seed("probabilities"), of_first_seed("active_layers")
    figure, axes = reports.panels(2)
    steps = aligned["metrics_every"] * probabilities.shape[1]
    for axis, values, title, colors in ((axes[0], probabilities, "probability of a layer", "viridis"),
                                        (axes[1], active, "active layers (black)", "Greys")):
        image = axis.imshow(values, aspect="auto", origin="lower", interpolation="nearest", cmap=colors, vmin=0,
                            extent=(0, steps, -0.5, len(values) - 0.5))
        axis.set(xlabel="alignment step", ylabel="layer", title=title)
        axis.set_yticks(range(len(values)))
        if values is probabilities:
            figure.colorbar(image, ax=axis)
    figure.savefig(path, dpi=130)


def dialogues(root: Path) -> str:
    """Markdown: the first forbidden and the first benign request with the answers of the first seed's models, before
    and after the attack with harmful data."""
    rows: dict[str, list[list[str]]] = {}
    for method in SHOWN:
        cell = runs.read_json(root / method / f"{ATTACKS[-1]}.json")
        for stage, step in (("aligned", min(cell["answers"], key=int)), ("attacked", max(cell["answers"], key=int))):
            for task in ("harmful_score", "over_refusal"):
                request, answer = cell["answers"][step][task][0]
                rows.setdefault(request, []).append([f"{method}, {stage}", answer])
    return "\n".join(f"> {request}\n\n{reports.table(['model', 'answer'], said)}" for request, said in rows.items())


def demo(config: sweep.SweepConfig, align_config: AlignConfig, attack_config: FinetuneConfig) -> str:
    """Carries out what has not been carried out yet; returns the report."""
    sweep.sweep(config, align_config, attack_config)
    root = Path(config.run_dir)
    cells = root / sweep_report.folder_name(config.bases[0])
    plot_layers(root / "layers.png", runs.read_json(cells / "t_vaccine" / f"{sweep_report.ALIGNED}.json"))
    results = sweep_report.read_cells(root, config.bases, METHODS, ATTACKS)
    text = "\n".join([
        "# Harmful fine-tuning and four defenses, on a small made-up world\n",
        INTRODUCTION.format(ratio=float(ATTACKS[-1].partition("=")[2])),
        "## Scores\n", sweep_report.score_table(root, config.bases, METHODS, ATTACKS, results),
        f"Mean ± standard deviation over {len(config.seeds)} seeds, after {attack_config.steps} steps of fine-tuning. "
        "HS: forbidden requests that are answered and not refused (lower is better). FA: correct ratings (higher is "
        "better). Over-refusal: benign requests refused (lower is better).\n",
        "## HS along the attack\n", sweep_report.steps_table(results),
        "![HS over attack steps](harmful_score.png)\n",
        "A curve that rises later shows that a defense delays the attack, and not that it prevents it.\n",
        "![HS against FA](plane.png)\n",
        "Which layers T-Vaccine takes for the harmful ones, and which it drew:\n",
        "![T-Vaccine's layers](layers.png)\n",
        "## Two requests, before and after the attack\n",
        "The first request is forbidden, the second is not.\n", dialogues(cells), NEXT])
    (root / reports.REPORT).write_text(text, encoding="utf-8")
    return text


def main(argv: list[str]) -> None:
    started = time.monotonic()
    with common.readable_errors("demo", argv):
        report = demo(*configs())
    print(f"\n{report}\nDone in {(time.monotonic() - started) / 60:.1f} minutes with "
          f"{common.peak_resident_memory() / 1e9:.1f} GB of memory. The report with its plots is {RUN_DIR}/report.md.")


if __name__ == "__main__":
    flags.declare_key_flag("verbosity")
    app.run(main)
