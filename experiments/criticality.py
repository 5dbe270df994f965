"""Which layers an attack needs, and whether the harmful gradient's norm tells: the assumption that T-Vaccine draws by.

  python -m experiments.criticality --run_dir=runs/criticality --seeds=0,1,2 --bases=world,bases/1,bases/2

Along the alignment the norms ‖∇_{a_l} h‖ of T-Vaccine's probe are taken, by layer. Then the aligned model is attacked
on one layer alone (only) or on all layers but one (all_but), every layer in turn; what such an attack reaches is the
layer's effect, and the report has its rank correlation with the norms. An attack is one of these two words, followed
by what differs from the flags of finetune.py (prefix attack_), as in sweep.py. Cells are a base, a method, an attack
and a layer; re-running continues with those that are not there yet.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app

from experiments import common, config_flags, criticality_report, lanes, probes, sweep
from experiments.align import AlignConfig
from experiments.config_flags import flag
from experiments.criticality_report import KINDS
from experiments.finetune import FinetuneConfig
from experiments.sweep_report import folder_name
from jaxvaccine import data, runs
from jaxvaccine.checkpoints import hugging_face


@dataclasses.dataclass(frozen=True)
class CriticalityConfig(sweep.SweepConfig):
    """Flags of criticality.py beside those of align.py and (attack_) finetune.py."""

    methods: tuple[str, ...] = flag(("sft",), "How the attacked models are aligned, as in sweep.py.")
    # A single layer's adapter is a small one: at the small world's own learning rate most layers reach nothing.
    attacks: tuple[str, ...] = flag(("only:learning_rate=1e-3:steps=60",),
                                    "only or all_but, with the flags of finetune.py that differ.")
    score_steps: tuple[str, ...] = flag(("0", "10", "20", "30", "40", "50", "60"),
                                        "Attack steps after which a model is scored; the last one always is.")
    benign_test: str = flag("", "Harmless requests for over-refusal; none by default.")
    measure_every: int = flag(10, "Alignment steps between measurements of the norms.")

    def __post_init__(self):
        super().__post_init__()
        common.require(self, "measure_every", self.measure_every >= 1, "at least 1")
        for name in ("harmful_test", "sst2_test"):
            common.require(self, name, bool(getattr(self, name)), "a data source")


def read_attack(attack_config: FinetuneConfig, text: str) -> tuple[str, FinetuneConfig]:
    """(kind, settings) of "kind:name=value:…"."""
    kind, _, changes = text.partition(":")
    if kind not in KINDS:
        raise ValueError(f"--attacks: found {text!r}, expected it to begin with one of {', '.join(KINDS)}")
    config = sweep.variant(attack_config, changes, "attacks") if changes else attack_config
    if config.layers is not None:
        raise ValueError(f"--attacks: {text!r}: found layers {list(config.layers)}, expected none: each has its turn")
    return kind, config


def attacked_layers(kind: str, layer: int, num_layers: int) -> tuple[str, ...]:
    """Whose adapters train, as finetune.py's --layers."""
    return tuple(str(i) for i in range(num_layers) if (i == layer) == (kind == "only"))


def measure_norms(config: AlignConfig, tokenizer, seeds: Sequence[int]):
    """(step, lanes) -> the norms by layer, on the harmful batch that T-Vaccine would probe with after that step."""
    tokenized = data.tokenize_examples(tokenizer, data.load_examples(config.harmful_data), config.max_length)
    streams = [data.training_batches({"harmful": (tokenized, config.harmful_batch_size)}, seed, config.bucket)
               for seed in seeds]

    def measure(step: int, of: lanes.Lanes) -> probes.Measured:
        batches = [stream(step)["harmful"] for stream in streams]
        return probes.layer_norms(of, {name: np.stack([b[name] for b in batches]) for name in batches[0]})

    return measure


def criticality(config: CriticalityConfig, align_config: AlignConfig, attack_config: FinetuneConfig) -> str:
    """Carries out the cells that are not there yet; returns the report."""
    common.require(align_config, "harmful_data", bool(align_config.harmful_data), "a data source")
    attack_config = dataclasses.replace(attack_config, test_data=config.harmful_test)
    methods = {text: sweep.variant(align_config, text, "methods", "defense") for text in config.methods}
    attacks = {text: read_attack(attack_config, text) for text in config.attacks}
    num_layers = common.read_architecture(config.bases[0]).num_layers
    for base_name in config.bases:
        if (found := common.read_architecture(base_name).num_layers) != num_layers:
            raise ValueError(f"--bases: found {base_name} with {found} layers, expected {num_layers} as in "
                             f"{config.bases[0]}, so that layers can be compared")
    probes.open_run(config, "criticality", align=align_config, attack=attack_config)
    root, seeds, steps = Path(config.run_dir), config.seed_numbers, [int(step) for step in config.score_steps]
    for base_name, (text, method) in itertools.product(config.bases, methods.items()):
        folder = root / folder_name(base_name) / folder_name(text)
        cells = {folder / folder_name(attack_text) / f"{layer}.json": dataclasses.replace(
                     attacked_by, layers=attacked_layers(kind, layer, num_layers))
                 for attack_text, (kind, attacked_by) in attacks.items() for layer in range(num_layers)}
        cells = {path: cell for path, cell in cells.items() if not path.exists()}
        if not cells:
            continue
        method = dataclasses.replace(method, model=base_name)
        tokenizer = data.load_tokenizer(hugging_face.resolve_model(base_name))
        base = common.load_base(base_name, method.dtype)
        scorer = sweep.Scorer(config, tokenizer)
        aligned = probes.align(method, base, tokenizer, seeds, folder, measure_norms(method, tokenizer, seeds),
                               config.measure_every)
        for path, attacked_by in cells.items():
            result = sweep.attack(attacked_by.resolve(dataclasses.asdict(method)), method, aligned, tokenizer, seeds,
                                  steps, scorer)
            path.parent.mkdir(exist_ok=True)
            runs.write_json(path, result)
            last = result["scores"][max(result["scores"], key=int)]
            print(f"{base_name} {text} layers {','.join(attacked_by.layers)}: " + ", ".join(
                f"{task} {np.round(values, 1).tolist()}" for task, values in last.items()), flush=True)
    return criticality_report.write(root, config.bases, config.methods, config.attacks)


def main(argv: list[str]) -> None:
    with common.readable_errors("criticality", argv):
        print(criticality(config_flags.read(CriticalityConfig), *sweep.read_configs()))


if __name__ == "__main__":
    config_flags.define(CriticalityConfig)
    sweep.define_configs()
    app.run(main)
