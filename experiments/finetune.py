"""Fine-tunes an aligned model on a user's data of which a ratio is harmful: the attack.

  python -m experiments.finetune --preset=booster --aligned=runs/booster --run_dir=runs/booster-p0.1 \\
      --user_data=sst2:stanfordnlp/sst2@train --harmful_data=beavertails_unsafe:train.jsonl[5000:6000] \\
      --poison_ratio=0.1 --test_data=beavertails_unsafe:test.jsonl[0:500]
"""

import dataclasses
from typing import Literal

import numpy as np
from absl import app, flags

from experiments import common, config_flags, presets
from experiments.config_flags import flag
from jaxvaccine import data, defenses, runs
from jaxvaccine.checkpoints import hugging_face
from jaxvaccine.llama import Llama, init_adapter
from jaxvaccine.llama_config import LoraConfig
from jaxvaccine.losses import causal_lm_loss, loss_and_kl

WHILE_TUNING = ("lisa", "ewc", "kl")  # the provider's defenses while a user fine-tunes
# Flags that only a run with a defense records, so that runs from before there was one can be continued.
DEFENSE_FLAGS = ("defense", "alignment_data", "alignment_steps", "user_steps", "rho", "ewc_lam", "kl_lam")
# Lisa's proximal term acts after this part of all steps, as in the authors' program.
LISA_START = 0.1


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(common.TrainingConfig):
    """Flags of finetune.py."""

    learning_rate: float = flag(1e-5, "Peak learning rate.")
    aligned: str = flag("", "Folder of the finished align.py run to attack.")
    adapter: Literal["auto", "continue", "new"] = flag(
        "auto", "Train the aligned adapter on, or a new one on the merged weights; auto continues Booster's and TAR's, "
        "whose simulated steps are that adapter's, and what --defense=ewc holds.")
    user_data: str = flag("", "The user's benign data: kind:path-or-hub-id@split[start:stop], separated by commas.")
    harmful_data: str = flag("", "Harmful data mixed in; may share no prompt with the alignment's harmful data.")
    test_data: str = flag("", "Harmful test prompts, only to make sure that harmful_data shares none of them.")
    n: int = flag(1000, "Examples in all.")
    poison_ratio: float = flag(0.1, "Part of them that is harmful, 0 to 1.")
    rank: int | None = flag(None, "LoRA rank of a new adapter; as aligned unless given.")
    lora_alpha: float | None = flag(None, "LoRA alpha of a new adapter; as aligned unless given.")
    dropout: float | None = flag(None, "LoRA dropout; as aligned unless given.")
    targets: tuple[str, ...] | None = flag(None, "Projections of a new adapter; as aligned unless given.")
    layers: tuple[str, ...] | None = flag(None, "Numbers, from 0, of the layers that train; all unless given.")
    defense: Literal["none", "lisa", "ewc", "kl"] = flag("none", "The provider's defense while fine-tuning.")
    alignment_data: str = flag("", "Lisa, EWC: alignment data, in the form of --user_data.")
    alignment_steps: int = flag(100, "Lisa: K1, steps of a phase on alignment data.")
    user_steps: int = flag(900, "Lisa: K2, steps of a phase on the user's data.")
    rho: float = flag(1.0, "Lisa: weight of the proximal term.")
    ewc_lam: float = flag(1e9, "EWC: weight of the penalty.")
    kl_lam: float = flag(0.1, "KL: weight of the divergence from the aligned model.")

    def __post_init__(self):
        super().__post_init__()
        common.require(self, "aligned", bool(self.aligned), "the folder of an align.py run")
        common.require(self, "n", self.n >= 1, "at least 1")
        common.require(self, "poison_ratio", 0 <= self.poison_ratio <= 1, "0 <= poison_ratio <= 1")
        common.require(self, "harmful_data", bool(self.harmful_data) or round(self.n * self.poison_ratio) == 0,
                       "a data source, unless --poison_ratio=0")
        common.require(self, "user_data", bool(self.user_data) or round(self.n * self.poison_ratio) == self.n,
                       "a data source, unless --poison_ratio=1")
        if self.layers is not None:
            common.require_numbers(self, "layers")
        common.require(self, "alignment_data", bool(self.alignment_data) or not self.needs_alignment(),
                       f"a data source, which --defense={self.defense} needs")
        common.check_sources(self, "user_data", "harmful_data", "test_data", "alignment_data")
        make_defense(self, 1)(None, None)  # its hyper-parameters are checked where they are documented

    def needs_alignment(self) -> bool:
        return self.defense in ("lisa", "ewc")

    def layer_mask(self, num_layers: int) -> np.ndarray | None:
        """[L] bool, true where a layer trains; None for all. Raises ValueError for a layer that the model lacks."""
        if self.layers is None:
            return None
        numbers = [int(text) for text in self.layers]
        common.require(self, "layers", max(numbers) < num_layers,
                       f"numbers below {num_layers}, the model's number of layers")
        return np.isin(np.arange(num_layers), numbers)

    def resolve(self, aligned: dict) -> "FinetuneConfig":
        """The config with nothing left open, given the aligned run's flags."""
        adapter = self.adapter
        if adapter == "auto":
            # EWC holds the aligned adapter's weights.
            adapter = "continue" if aligned["defense"] in ("booster", "tar") or self.defense == "ewc" else "new"
        lora = {}
        for name in ("rank", "lora_alpha", "dropout", "targets"):
            as_aligned = tuple(aligned[name]) if name == "targets" else aligned[name]
            found = getattr(self, name)
            lora[name] = as_aligned if found is None else found
            if adapter == "continue" and name != "dropout" and lora[name] != as_aligned:
                raise ValueError(f"--{name}: found {found!r}, expected {as_aligned!r}, as the continued adapter was "
                                 "aligned, or --adapter=new")
        return dataclasses.replace(self, adapter=adapter, **lora)


def masked(defense: defenses.Defense, layers) -> defenses.Defense:
    """The defense on all layers, or on those where `layers` ([L] bool) is true."""
    return defense if layers is None else defenses.only_layers(defense, layers)


def fine_tuning(model: Llama, layers) -> defenses.Defense:
    """Fine-tuning as it is, of all layers or of those where `layers` ([L] bool) is true."""
    return masked(defenses.sft(causal_lm_loss(model), batch="user"), layers)


def make_defense(config: FinetuneConfig, steps: int):
    """(model, fisher) -> the `Defense` that the flags describe, of all layers, in a run of so many steps.

    fisher: EWC's weights, of `alignment_fisher`.
    """
    def make(model: Llama | None, fisher) -> defenses.Defense:
        loss_fn = causal_lm_loss(model)
        return {
            "none": lambda: defenses.sft(loss_fn, batch="user"),
            "lisa": lambda: defenses.lisa(
                loss_fn, config.alignment_steps, config.user_steps, config.rho, LISA_START * steps),
            "ewc": lambda: defenses.ewc(loss_fn, config.ewc_lam, fisher),
            "kl": lambda: defenses.kl(loss_and_kl(model), config.kl_lam),
        }[config.defense]()

    return make


def alignment_fisher(config: FinetuneConfig, base: common.Base, lora: LoraConfig, adapter,
                     alignment: data.TokenizedExamples):
    """EWC's Fisher weights, of the adapter that training starts from, on one pass over the alignment data."""
    steps = data.steps_for(len(alignment.input_ids), config.batch_size, 1)
    batches = data.training_batches({"alignment": (alignment, config.batch_size)}, config.seed, config.bucket)
    loss_fn = causal_lm_loss(base.model.clone(lora=lora, remat=config.remat))
    return defenses.diagonal_fisher(
        loss_fn, adapter, base.frozen, (batches(step)["alignment"] for step in range(steps)))


def finetune(config: FinetuneConfig) -> None:
    """Carries out the run; returns at once if it has finished."""
    aligned = common.require_finished("aligned", config.aligned)
    if aligned["script"] != "align":
        raise ValueError(f"--aligned: found {config.aligned!r}, a run of {aligned['script']}.py, expected align.py's")
    config = config.resolve(aligned["flags"])
    lora = LoraConfig(config.rank, config.lora_alpha, config.dropout, config.targets)
    forbidden = {"the alignment's harmful data": aligned["data"]["prompts"].get("harmful", []),
                 "the test prompts": common.prompts_of(common.load_sources(config.test_data))}
    harmful = common.load_sources(config.harmful_data)
    examples = data.poison(common.load_sources(config.user_data), harmful, config.n, config.poison_ratio, config.seed,
                           forbidden)
    model_path = aligned["flags"]["model"]
    layers = config.layer_mask(common.read_architecture(model_path).num_layers)
    tokenizer = data.load_tokenizer(hugging_face.resolve_model(model_path))
    read = {"user": examples}
    if config.needs_alignment():
        read["alignment"] = common.load_sources(config.alignment_data)
    tokenized = {name: data.tokenize_examples(tokenizer, rows, config.max_length) for name, rows in read.items()}

    result, operational = common.result_flags(config)
    if config.defense == "none":
        result = {name: value for name, value in result.items() if name not in DEFENSE_FLAGS}
    run_dir = runs.open_run(config.run_dir, "finetune", {"model": model_path, **result}, {
        "hashes": {name: runs.examples_hash(rows) for name, rows in read.items()},
        "dropped": {name: rows.dropped for name, rows in tokenized.items()},
        "prompts": {"harmful": common.prompts_of(harmful), **{
            name: common.prompts_of(rows) for name, rows in read.items()}},
    }, operational, config.overwrite)
    if common.is_finished(config.run_dir):
        return
    base = common.load_base(model_path, config.dtype, config.aligned, merge=config.adapter == "new")
    adapter = base.adapter
    if config.adapter == "new":
        adapter = init_adapter(base.model.clone(lora=lora), common.fresh_key(config))
    sources = {"user": (tokenized["user"], config.batch_size)}
    if config.defense == "lisa":
        sources["alignment"] = (tokenized["alignment"], config.batch_size)
    fisher = None
    if config.defense == "ewc":
        fisher = alignment_fisher(config, base, lora, adapter, tokenized["alignment"])
    make = make_defense(config, common.count_steps(config, sources))
    common.train(config, run_dir, base, lora, adapter, lambda model: masked(make(model, fisher), layers), sources,
                 model_path, f"Fine-tuning of {config.aligned} with p = {config.poison_ratio:g}")


def main(argv: list[str]) -> None:
    with common.readable_errors("finetune", argv):
        finetune(config_flags.read(FinetuneConfig, preset=presets.FINETUNE.get(flags.FLAGS.preset)))


if __name__ == "__main__":
    config_flags.define(FinetuneConfig)
    flags.DEFINE_enum("preset", None, sorted(presets.FINETUNE), "The attack in the recipe of this defense's paper.")
    app.run(main)
