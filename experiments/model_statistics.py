"""What happens inside the models while they are aligned and attacked: harmful losses and gradients, as in Booster's
figure of model statistics (arXiv 2409.01586).

  python -m experiments.model_statistics --run_dir=runs/statistics --seeds=0,1,2 --bases=world,bases/1,bases/2

Along the alignment: the harmful loss h(w) and what Booster's simulated step takes off it, h(w) − h(w'), for every
method. Along an attack: the loss on the attack's own harmful examples and on unseen ones, the norm of the harmful
gradient, and HS. Methods, attacks and cells are those of sweep.py.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app

from experiments import common, config_flags, lanes, probes, reports, sweep
from experiments.align import AlignConfig
from experiments.config_flags import flag
from experiments.finetune import FinetuneConfig
from experiments.sweep_report import ALIGNED, MARKERS, folder_name
from jaxvaccine import data, runs
from jaxvaccine.checkpoints import hugging_face

# What is drawn and put in tables, with units: of the alignment's measurements, and of an attack's scores.
ALIGNMENT = {"harmful_loss": "h(w) (nats per token)", "reduction": "h(w) − h(w') (nats per token)"}
ATTACK = {"harmful_training_loss": "harmful training loss (nats per token)",
          "harmful_test_loss": "harmful test loss (nats per token)",
          "harmful_gradient_norm": "norm of the harmful gradient", "harmful_score": "HS (%)"}


@dataclasses.dataclass(frozen=True)
class StatisticsConfig(sweep.SweepConfig):
    """Flags of model_statistics.py beside those of align.py and (attack_) finetune.py."""

    attacks: tuple[str, ...] = flag(("poison_ratio=0.1",), "Attacks, as the flags of finetune.py that differ.")
    score_steps: tuple[str, ...] = flag(("0", "20", "40", "60", "80", "100"),
                                        "Attack steps after which a model is measured; the last one always is.")
    sst2_test: str = flag("", "The user's task, for FA; none by default.")
    benign_test: str = flag("", "Harmless requests for over-refusal; none by default.")
    harmful_probe: str = flag("world_harmful@harmful[0:50]", "Harmful examples for h(w) during alignment.")
    measure_every: int = flag(15, "Alignment steps between measurements.")

    def __post_init__(self):
        super().__post_init__()
        common.require(self, "measure_every", self.measure_every >= 1, "at least 1")
        for name in ("harmful_probe", "harmful_test"):
            common.require(self, name, bool(getattr(self, name)), "a data source")
        common.check_sources(self, "harmful_probe")


def measure_alignment(config: StatisticsConfig, method: AlignConfig, tokenizer):
    """(step, lanes) -> h(w) and h(w) − h(w'), w' a step of length --alpha as Booster simulates it."""
    batches = probes.stack_batches(tokenizer, [data.load_examples(config.harmful_probe)] * len(config.seeds), method)

    def measure(step: int, of: lanes.Lanes) -> probes.Measured:
        del step
        found = probes.harmful_losses(of, batches, method.alpha)
        return {"harmful_loss": found["harmful_loss"],
                "reduction": found["harmful_loss"] - found["perturbed_harmful_loss"]}

    return measure


def harmful_part(config: FinetuneConfig, seed: int) -> list[data.Example]:
    """The harmful examples of the attack with this seed, in another order (`data.poison` draws both kinds apart)."""
    return data.poison([], common.load_sources(config.harmful_data), round(config.n * config.poison_ratio), 1.0, seed)


def with_statistics(scorer: Callable, config: StatisticsConfig, attack_config: FinetuneConfig, alpha: float,
                    tokenizer) -> Callable:
    """The scorer, with losses and gradient norm among its scores."""
    training = probes.stack_batches(
        tokenizer, [harmful_part(attack_config, seed) for seed in config.seed_numbers], attack_config)
    test = probes.stack_batches(
        tokenizer, [data.load_examples(config.harmful_test)] * len(config.seeds), attack_config)

    def score(of: lanes.Lanes) -> tuple[dict[str, list[float]], Any]:
        scores, answers = scorer(of)
        found = probes.harmful_losses(of, training, alpha)
        return scores | {
            "harmful_training_loss": probes.to_json(found["harmful_loss"]),
            "harmful_gradient_norm": probes.to_json(found["harmful_gradient_norm"]),
            "harmful_test_loss": probes.to_json(probes.losses(of, test))}, answers

    return score


def statistics(config: StatisticsConfig, align_config: AlignConfig, attack_config: FinetuneConfig) -> str:
    """Carries out the cells that are not there yet; returns the report."""
    attack_config = dataclasses.replace(attack_config, test_data=config.harmful_test)
    methods = {text: sweep.variant(align_config, text, "methods", "defense") for text in config.methods}
    attacks = {text: sweep.variant(attack_config, text, "attacks") for text in config.attacks}
    for text, attacked_by in attacks.items():
        if round(attacked_by.n * attacked_by.poison_ratio) == 0:
            raise ValueError(f"--attacks: found {text!r}, an attack without harmful examples, expected at least one")
    probes.open_run(config, "model_statistics", align=align_config, attack=attack_config)
    root, seeds, steps = Path(config.run_dir), config.seed_numbers, [int(step) for step in config.score_steps]
    for base_name, (text, method) in itertools.product(config.bases, methods.items()):
        folder = root / folder_name(base_name) / folder_name(text)
        cells = {folder / f"{folder_name(name)}.json": attacked_by for name, attacked_by in attacks.items()}
        cells = {path: attacked_by for path, attacked_by in cells.items() if not path.exists()}
        if not cells:
            continue
        method = dataclasses.replace(method, model=base_name)
        tokenizer = data.load_tokenizer(hugging_face.resolve_model(base_name))
        scorer = sweep.Scorer(config, tokenizer)
        aligned = probes.align(method, common.load_base(base_name, method.dtype), tokenizer, seeds, folder,
                               measure_alignment(config, method, tokenizer), config.measure_every)
        for path, attacked_by in cells.items():
            attacked_by = attacked_by.resolve(dataclasses.asdict(method))
            scored = with_statistics(scorer, config, attacked_by, method.alpha, tokenizer)
            result = sweep.attack(attacked_by, method, aligned, tokenizer, seeds, steps, scored)
            runs.write_json(path, result)
            last = result["scores"][max(result["scores"], key=int)]
            print(f"{base_name} {text} {path.stem}: " + ", ".join(
                f"{name} {np.round(last[name], 2).tolist()}" for name in ATTACK), flush=True)
    return write(root, config.bases, config.methods, config.attacks)


Curves = Mapping[str, tuple[Sequence[int], np.ndarray]]


def read_alignment(root: Path, bases: Sequence[str], methods: Sequence[str], name: str) -> Curves:
    """{method: (steps, [S, runs])}."""
    found = {method: [runs.read_json(root / folder_name(base) / folder_name(method) / f"{ALIGNED}.json")
                      for base in bases] for method in methods}
    return {method: (cells[0]["steps"], np.concatenate([cell[name] for cell in cells], axis=1))
            for method, cells in found.items()}


def read_attack(root: Path, bases: Sequence[str], methods: Sequence[str], attack: str, name: str) -> Curves:
    """{method: (steps, [S, runs])}."""
    curves = {}
    for method in methods:
        folders = [root / folder_name(base) / folder_name(method) for base in bases]
        cells = [runs.read_json(folder / f"{folder_name(attack)}.json")["scores"] for folder in folders]
        steps = sorted(map(int, cells[0]))
        curves[method] = steps, np.concatenate([[cell[str(step)][name] for step in steps] for cell in cells], axis=1)
    return curves


def spread(values: np.ndarray) -> str:
    """"mean ± standard deviation" of a loss or norm; the mean alone of a single run."""
    return f"{values.mean():.3g}" + (f" ± {values.std(ddof=1):.2g}" if len(values) > 1 else "")


def plot(axes, panels: Mapping[str, Curves], xlabel: str) -> None:
    """A panel per quantity: mean over runs, with a band of ± one standard deviation."""
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for i, (method, (steps, values)) in enumerate(curves.items()):
            mean, sd = values.mean(1), values.std(1, ddof=1) if values.shape[1] > 1 else 0 * values[:, 0]
            axis.plot(steps, mean, marker=MARKERS[i % len(MARKERS)], markersize=4, color=f"C{i}", label=method)
            # Losses and norms are at least 0, a score at most 100.
            low = mean - sd if (values < 0).any() else np.maximum(mean - sd, 0)
            axis.fill_between(steps, low, np.minimum(mean + sd, 100) if "%" in title else mean + sd, alpha=0.12,
                              color=f"C{i}", linewidth=0)
        axis.set(xlabel=xlabel, title=title)
        axis.grid(alpha=0.3)
        if "%" in title:
            axis.set_ylim(-4, 104)


def write(root: Path, bases: Sequence[str], methods: Sequence[str], attacks: Sequence[str]) -> str:
    """report.md with its plots; returns its text."""
    alignment = {title: read_alignment(root, bases, methods, name) for name, title in ALIGNMENT.items()}
    text = ["# Model statistics\n", "## Along the alignment\n",
            reports.table(["method", *(f"{title}, {end}" for title in ALIGNMENT.values() for end in ("start", "end"))],
                          [[method, *(spread(curves[method][1][i]) for curves in alignment.values() for i in (0, -1))]
                           for method in methods])]
    for i, attack in enumerate(attacks):
        along = {title: read_attack(root, bases, methods, attack, name) for name, title in ATTACK.items()}
        image = f"statistics_{i}.png" if i else "statistics.png"
        figure, axes = reports.panels(2, 3)
        plot(axes[:2], alignment, "alignment step")
        plot(axes[2:], along, "attack step")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(methods))
        figure.savefig(root / image, dpi=130)
        text += [f"## Along the attack: {attack}\n", *(
            f"{title}:\n\n" + reports.table(
                ["method", *(f"step {step}" for step in next(iter(curves.values()))[0])],
                [[method, *map(spread, values)] for method, (_, values) in curves.items()])
            for title, curves in along.items()), f"![model statistics]({image})\n"]
    text.append(
        f"Mean ± standard deviation over bases ({', '.join(bases)}) and seeds. Harmful training loss and the norm of "
        "its gradient (all adapters): on the attack's own harmful examples. Harmful test loss and HS: on unseen "
        "harmful prompts. h(w): on examples of the harmful data that Booster simulates its step with; w' is w after a "
        "step of length alpha against their normalised gradient.\n")
    report = "\n".join(text)
    (root / reports.REPORT).write_text(report, encoding="utf-8")
    return report


def main(argv: list[str]) -> None:
    with common.readable_errors("model_statistics", argv):
        print(statistics(config_flags.read(StatisticsConfig), *sweep.read_configs()))


if __name__ == "__main__":
    config_flags.define(StatisticsConfig)
    sweep.define_configs()
    app.run(main)
