"""Aligns a model with a defense.

  python -m experiments.align --preset=booster --model=meta-llama/Llama-2-7b-hf --run_dir=runs/booster \\
      --alignment_data=beavertails_refusal:train.jsonl[0:5000] --harmful_data=beavertails_unsafe:train.jsonl[0:5000]
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import optax
from absl import app, flags

from experiments import common, config_flags, presets
from experiments.config_flags import flag
from jaxvaccine import data, defenses, runs
from jaxvaccine.activation_losses import loss_and_hidden_distance, noise_and_ascent
from jaxvaccine.checkpoints import hugging_face
from jaxvaccine.llama import Llama, in_mlp, init_adapter
from jaxvaccine.llama_config import TARGETS
from jaxvaccine.losses import causal_lm_loss, negative_entropy

DEFENSES = ("sft", "vaccine", "t_vaccine", "booster", "repnoise", "tar")
# Flags that only runs with this method record, so that runs from before it was here can be continued.
METHOD_FLAGS = {
    "repnoise": ("harmless_data", "ascent_weight", "noise_weight"),
    "tar": ("inner_steps", "inner_learning_rate", "adversary", "tamper_weight", "retain_weight")}


@dataclasses.dataclass(frozen=True)
class AlignConfig(common.TrainingConfig):
    """Flags of align.py."""

    model: str = flag("", "Model to align: a Hugging Face directory, a hub id or a .gguf file.")
    defense: Literal["sft", "vaccine", "t_vaccine", "booster", "repnoise", "tar"] = flag(
        "sft", "Alignment-stage defense.")
    base_defense: Literal["sft", "vaccine", "t_vaccine", "repnoise", "tar"] = flag(
        "sft", "Booster only: whose gradient stands in the place of the alignment loss's.")
    alignment_data: str = flag(
        "", "Alignment data: kind:path-or-hub-id@split[start:stop], several separated by commas.")
    harmful_data: str = flag(
        "", "Harmful data of Booster's simulated step, T-Vaccine's probe, RepNoise and TAR, in the same form.")
    harmless_data: str = flag(
        "", "RepNoise: harmless answers to the prompts of --harmful_data, in any order, among others; --alignment_data "
        "unless given. A prompt without one gets a refusal of ours.")
    harmful_batch_size: int = flag(10, "Rows of a harmful batch.")
    rank: int = flag(8, "LoRA rank.")
    lora_alpha: float = flag(4.0, "LoRA alpha: the adapter's output is scaled by alpha / rank.")
    dropout: float = flag(0.0, "LoRA dropout.")
    targets: tuple[str, ...] = flag(TARGETS, "Projections with an adapter.")
    rho: float = flag(2.0, "Vaccine, T-Vaccine: norm of the perturbation.")
    layers: int = flag(8, "T-Vaccine: S, how many layers are active.")
    sample_every: int = flag(20, "T-Vaccine: J, steps between draws of the active layers.")
    probe_every: int = flag(200, "T-Vaccine: K, steps between probes of the layers' harmful gradients.")
    freeze: Literal["layer", "released"] = flag(
        "layer", "T-Vaccine: what is frozen, the other layers whole (the paper), or what the authors' program freezes.")
    importance: Literal["harmful", "alignment", "uniform"] = flag(
        "harmful", "T-Vaccine: from whose gradients layers get their probabilities; the others are ablations.")
    draw: Literal["sample", "top"] = flag("sample", "T-Vaccine: active layers drawn, or (ablation) the most probable.")
    direction: Literal["gradient", "gaussian"] = flag(
        "gradient", "Vaccine, T-Vaccine: the perturbation, or (ablation) Gaussian noise of the same norm.")
    lam: float = flag(5.0, "Booster: weight of the regularizer.")
    alpha: float = flag(0.1, "Booster: length of the simulated harmful step.")
    exact: bool = flag(False, "Booster: the exact gradient of the regularizer, by a second derivative.")
    ascent_weight: float = flag(1.0, "RepNoise: alpha, weight of the harmful loss's logarithm.")
    noise_weight: float = flag(0.001, "RepNoise: beta, weight of the distance from noise.")
    inner_steps: int = flag(4, "TAR: k, steps of the simulated attack.")
    inner_learning_rate: float = flag(5e-4, "TAR: learning rate of the simulated attack.")
    adversary: Literal["adamw", "sgd"] = flag("adamw", "TAR: optimizer of the simulated attack.")
    tamper_weight: float = flag(4.0, "TAR: weight of the tamper-resistance loss after the attack.")
    retain_weight: float = flag(1.0, "TAR: weight of the alignment loss and the hidden states' distance.")

    def __post_init__(self):
        super().__post_init__()
        common.require(self, "model", bool(self.model), "a directory, a hub id or a .gguf file")
        common.require(self, "alignment_data", bool(self.alignment_data), "a data source")
        common.require(self, "base_defense", self.base_defense == "sft" or self.defense == "booster",
                       "sft unless --defense=booster")
        common.require(self, "harmful_batch_size", self.harmful_batch_size >= 1, "at least 1")
        common.require(self, "harmful_data", bool(self.harmful_data) or not self.needs_harmful(),
                       f"a data source, which --defense={self.defense} needs")
        common.require(self, "inner_learning_rate", self.inner_learning_rate >= 0, "at least 0")
        common.check_sources(self, "alignment_data", "harmful_data", "harmless_data")
        common.lora_of(self)
        make_defense(self)(None)  # its hyper-parameters are checked where they are documented

    def uses(self, method: str) -> bool:
        """Whether it is the defense or Booster's base."""
        return method in (self.defense, self.base_defense)

    def needs_harmful(self) -> bool:
        probes = self.uses("t_vaccine") and self.importance == "harmful"
        return probes or any(map(self.uses, ("booster", "repnoise", "tar")))


def make_defense(config: AlignConfig):
    """model -> the `Defense` that the flags describe."""
    def make(model: Llama | None) -> defenses.Defense:
        loss_fn = causal_lm_loss(model)
        by_name = {
            "sft": lambda: defenses.sft(loss_fn),
            "vaccine": lambda: defenses.vaccine(loss_fn, config.rho, config.direction),
            "t_vaccine": lambda: defenses.t_vaccine(
                loss_fn, config.rho, config.layers, config.sample_every, config.probe_every, freeze=config.freeze,
                importance=config.importance, draw=config.draw, direction=config.direction, in_mlp=in_mlp),
            "booster": lambda: defenses.booster(
                loss_fn, config.lam, config.alpha, base=by_name[config.base_defense](), exact=config.exact),
            "repnoise": lambda: defenses.repnoise(
                loss_fn, noise_and_ascent(model), config.ascent_weight, config.noise_weight),
            "tar": lambda: defenses.tar(
                loss_fn, negative_entropy(model), loss_and_hidden_distance(model), adversary(config),
                config.inner_steps, config.tamper_weight, config.retain_weight),
        }
        return by_name[config.defense]()

    return make


def adversary(config: AlignConfig) -> optax.GradientTransformation:
    """The optimizer of TAR's simulated attack; AdamW with PyTorch's weight decay."""
    if config.adversary == "sgd":
        return optax.sgd(config.inner_learning_rate)
    return optax.adamw(config.inner_learning_rate, weight_decay=0.01)


def load_data(config: AlignConfig) -> dict[str, list[data.Example]]:
    """The examples that the alignment reads."""
    examples = {"alignment": common.load_sources(config.alignment_data)}
    if config.needs_harmful():
        examples["harmful"] = common.load_sources(config.harmful_data)
    if config.uses("repnoise"):
        harmless = common.load_sources(config.harmless_data) if config.harmless_data else examples["alignment"]
        examples["harmless"] = data.harmless_answers(examples["harmful"], harmless)
    return examples


def batch_sources(config: AlignConfig, tokenized: Mapping[str, data.TokenizedExamples]
                  ) -> dict[str, tuple[data.TokenizedExamples, int]]:
    """What `data.training_batches` draws a step's batches from, given the tokenized examples of `load_data`."""
    sizes = {"alignment": config.batch_size, "harmful": config.harmful_batch_size,
             "harmless": config.harmful_batch_size}
    sources = {name: (rows, sizes[name]) for name, rows in tokenized.items()}
    if config.uses("tar"):
        sources["adversary"] = (tokenized["harmful"], config.harmful_batch_size * config.inner_steps)
    return sources


def align(config: AlignConfig) -> None:
    """Carries out the run; returns at once if it has finished."""
    examples = load_data(config)
    architecture = common.read_architecture(config.model)
    if config.uses("t_vaccine"):
        common.require(config, "layers", config.layers <= architecture.num_layers,
                       f"at most the model's {architecture.num_layers} layers")
    tokenizer = data.load_tokenizer(hugging_face.resolve_model(config.model))
    data.check_vocabulary(tokenizer, architecture.vocab_size)
    tokenized = {name: data.tokenize_examples(tokenizer, rows, config.max_length) for name, rows in examples.items()}

    result, operational = common.result_flags(config)
    unused = {name for method, names in METHOD_FLAGS.items() if not config.uses(method) for name in names}
    result = {name: value for name, value in result.items() if name not in unused}
    run_dir = runs.open_run(config.run_dir, "align", result, {
        "hashes": {name: runs.examples_hash(rows) for name, rows in examples.items()},
        "dropped": {name: rows.dropped for name, rows in tokenized.items()},
        "prompts": {name: common.prompts_of(rows) for name, rows in examples.items()},
    }, operational, config.overwrite)
    if common.is_finished(config.run_dir):
        return
    lora = common.lora_of(config)
    base = common.load_base(config.model, config.dtype)
    adapter = init_adapter(base.model.clone(lora=lora), common.fresh_key(config))
    common.train(config, run_dir, base, lora, adapter, make_defense(config), batch_sources(config, tokenized),
                 config.model, f"Alignment with {config.defense}")


def main(argv: list[str]) -> None:
    with common.readable_errors("align", argv):
        align(config_flags.read(AlignConfig, preset=presets.ALIGN.get(flags.FLAGS.preset)))


if __name__ == "__main__":
    config_flags.define(AlignConfig)
    flags.DEFINE_enum("preset", None, sorted(presets.ALIGN), "Published recipe; flags that are given go before it.")
    app.run(main)
