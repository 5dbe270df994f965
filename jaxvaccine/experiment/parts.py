"""The parts that the configs of several stages have in common."""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any, Literal, Self

import jax

from jaxvaccine import data, optim
from jaxvaccine.attention import cudnn_lacks
from jaxvaccine.experiment.config import FieldError, Part, field, library_errors, require
from jaxvaccine.llama import Llama
from jaxvaccine.llama_config import TARGETS, LlamaConfig, LoraConfig
from jaxvaccine.quantisation import Kind

Dtype = Literal["checkpoint", "float32", "bfloat16", "float16"]
# Nothing scales the loss: in float16 the gradient of a small one is zero.
TrainedDtype = Literal["checkpoint", "float32", "bfloat16"]
# What follows an alignment has its prompt, and its protocol unless another is asked for.
AS_ALIGNED = "aligned"
LaterPrompt = Literal["aligned", "alpaca", "plain", "chat"]
LaterProtocol = Literal["aligned", "distinct", "rows"]
AUTO = "auto"
# Flat names of how something is computed, and not what: a run may change them when it is continued.
COMPUTED = ("remat", "microbatch_size", "attention")
BAD_ROWS = ("Rows that cannot be read, of all data of this command: error ends it at the first; skip leaves them out "
            "and counts them by what is wrong.")
SYSTEM_PROMPT = "--prompt=chat: the system prompt of conversations that have none; "
SOURCE = ("kind:path-or-hub-id@split{category=name;name}[start:stop], several separated by commas; hub-id#revision has "
          "one")


@dataclasses.dataclass(frozen=True)
class ComputationPart(Part):
    """Model."""

    dtype: TrainedDtype = field(
        "checkpoint", "Type of the frozen weights and of the computation; the adapter is float32. checkpoint reads "
        "float16 files as bfloat16, since nothing scales the loss.")
    remat: Literal["auto", "none", "dots", "full"] = field(
        "auto", "What is recomputed in the backward pass: nothing, all but matrix products, or everything in a layer; "
        "auto as little as there is memory for, on a CPU at least all but products.")
    microbatch_size: int = field(
        0, "Rows that are computed at a time; 0 is all. Gradients and norms are those of the whole batch. RepNoise "
        "compares its harmful rows with each other, and takes them whole.", at_least=0)
    attention: Literal["xla", "cudnn"] = field(
        "xla", "By XLA's products; or by cuDNN's kernel, on a GPU and in bfloat16, with less memory for long rows.")

    def check_attention(self, architecture: LlamaConfig, dtype: str, here: bool = True) -> None:
        """Raises FieldError if cuDNN is to compute what it can't: of this model in this type, or, `here`, at all."""
        if self.attention == "cudnn":
            require(not here or jax.default_backend() == "gpu", "attention", self.attention,
                    f"xla on a {jax.default_backend()}: cuDNN's kernel needs an NVIDIA GPU")
            lacking = cudnn_lacks(architecture, dtype)
            require(lacking is None, "attention", self.attention, f"xla: cuDNN's kernel has no {lacking}")

    def on(self, model: Llama) -> Llama:
        """The model, computed so; where remat is left open, with the most of it (`memory.with_remat` knows more)."""
        chosen = {name: getattr(self, name) for name in COMPUTED}
        return model.clone(**chosen | {"remat": "full" if self.remat == AUTO else self.remat})


@dataclasses.dataclass(frozen=True)
class ModelPart(ComputationPart):
    """Model."""

    model: str = field("", "Model to align: a Hugging Face directory, a hub id or a .gguf file.")
    revision: str = field("", "Branch, tag or commit of a model on the hub; its main branch unless given.")
    quantisation: Kind = field(
        "none", "In what the layers' frozen matrices are kept: int8 halves bfloat16's memory, nf4 takes a quarter of "
        "it. What follows the alignment has the same.")

    def __post_init__(self):
        super().__post_init__()
        require(self.is_named, "model", self.model, "a directory, a hub id or a .gguf file")

    @property
    def is_named(self) -> bool:
        return bool(self.model)


@dataclasses.dataclass(frozen=True)
class AdapterPart(Part):
    """Adapter."""

    rank: int = field(8, "LoRA rank.")
    lora_alpha: float = field(4.0, "LoRA alpha: the adapter's output is scaled by alpha / rank.")
    dropout: float = field(0.0, "LoRA dropout.")
    targets: tuple[str, ...] = field(TARGETS, "Projections with an adapter.")

    def __post_init__(self):
        super().__post_init__()
        with library_errors(self):
            self.lora()

    def lora(self) -> LoraConfig:
        return LoraConfig(self.rank, self.lora_alpha, self.dropout, tuple(self.targets))


@dataclasses.dataclass(frozen=True)
class TrainingPart(Part):
    """Optimizer."""

    kind: optim.Kind = field(
        "adamw", "AdamW, the papers'; SGD, with a momentum of 0.9 or none; Adafactor; Muon; or SGD with steps of the "
        "learning rate's length, as Booster simulates one. All with decoupled weight decay.", name="optimizer")
    learning_rate: float = field(5e-4, "Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = field("constant", "Learning rate after the warm-up.")
    warmup_ratio: float = field(0.0, "Part of all steps over which the learning rate rises from 0.")
    weight_decay: float = field(0.1, "Decoupled weight decay.")
    clip_norm: float = field(1.0, "Largest global norm of a gradient; 0 turns clipping off. normalised_sgd has none.")
    batch_size: int = field(10, "Rows of a batch.", at_least=1)
    epochs: float = field(20.0, "Passes over the data; not used if --steps is given.", above=0)
    steps: int = field(0, "Training steps; 0 takes --epochs.", at_least=0)

    def __post_init__(self):
        super().__post_init__()
        with library_errors(self):
            self.optimizer()

    def optimizer(self) -> optim.OptimizerConfig:
        return optim.OptimizerConfig(
            self.learning_rate, self.schedule, self.warmup_ratio, self.weight_decay, self.clip_norm, self.kind)

    def count_steps(self, examples: int) -> int:
        """How many steps a run on so many examples makes."""
        return self.steps or data.steps_for(examples, self.batch_size, self.epochs)


@dataclasses.dataclass(frozen=True)
class TokensPart(Part):
    """Data."""

    prompt: data.PromptForm = field(
        "alpaca", "What is put around an example: alpaca, the template of both papers' programs; plain, nothing but a "
        "line break behind the instruction and behind the input; or chat, the chat template of the model's tokenizer, "
        "which an instruct model was trained with.")
    system_prompt: str | None = field(
        None, f"{SYSTEM_PROMPT}what the template does itself unless given.")
    supervise: data.Supervise = field(
        "all", "--prompt=chat: of a conversation with several answers, whether all of them are learnt or the last one.")
    data_protocol: data.Protocol = field(
        "distinct", "distinct: every prompt once, and what a model was aligned on is in no harmful data of an attack "
        "and no harmful test. rows: rows as they are, as the papers' programs take them, of an attack the first ones; "
        "what sets have in common is counted.")
    bad_rows: data.BadRows = field("error", BAD_ROWS)
    max_length: int = field(256, "Tokens at which prompt and answer are cut.", at_least=1)
    bucket: int = field(64, "Batches are padded to a multiple of this many tokens.", at_least=1)

    @property
    def form(self) -> data.Prompt:
        """What is put around examples, and which of their answers are learnt."""
        return form_of(self)


def form_of(part: Any) -> data.Prompt:
    """The prompt of a part; where it is open there was no run, and it is the papers'."""
    return data.Prompt("alpaca" if part.prompt == AS_ALIGNED else part.prompt, part.system_prompt or "",
                       part.supervise)


def aligned_form(flags: Mapping[str, Any]) -> data.Prompt:
    """The prompt of an alignment, given its flags; of one from before it had them, with no system prompt."""
    return data.Prompt(flags["prompt"], flags.get("system_prompt") or "", flags.get("supervise", "all"))


def check_system(system: str | None, prompt: str) -> None:
    """Raises FieldError for a system prompt of what has none."""
    require(not system or prompt in ("chat", AS_ALIGNED), "system_prompt", system, "none, unless --prompt=chat")


@dataclasses.dataclass(frozen=True)
class RunPart(Part):
    """Run."""

    run_dir: str = field("", "Folder of this run, such as runs/booster. Re-running the same command continues it.")
    seed: int = field(0, "Everything random derives from it.", at_least=0, below=2**32)
    progress: bool = field(True, "Draw progress bars.")
    overwrite: bool = field(False, "Delete an earlier run in --run_dir and start again.")

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.run_dir), "run_dir", self.run_dir, "a folder")


@dataclasses.dataclass(frozen=True)
class TrainingRunPart(RunPart):
    """Run."""

    save_every: int = field(500, "Steps between checkpoints; 0 saves at the end only.", at_least=0)


# Flat names that do not change a run's result: recorded, and free to change when it is continued.
OPERATIONAL = frozenset((
    *COMPUTED, "run_dir", "overwrite", "save_every", "progress", "judge_key_variable", "judge_timeout",
    "judge_attempts", "judge_workers", "judge_cache", "judge_price_in", "judge_price_out"))


def split_operational(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flat values as (those that determine the result, the operational ones)."""
    return ({name: value for name, value in values.items() if name not in OPERATIONAL},
            {name: value for name, value in values.items() if name in OPERATIONAL})


def resolve_prompt(asked: LaterPrompt, flags: Mapping[str, Any], name: str) -> data.PromptForm:
    """The prompt of what follows a run, given that run's flags.

    Raises:
      FieldError: asked for is another than that of the run, which `name` names; or the run has recorded none.
    """
    require("prompt" in flags, "prompt", asked, f"a run that has recorded its prompt, unlike {name}, which is of a "
            "version whose prompt had no line break at its end; re-run its command with --overwrite")
    found = flags["prompt"]
    require(asked in (AS_ALIGNED, found), "prompt", asked, f"{found}, with which {name} was trained")
    return found


class AfterAlignment:
    """Of a part whose `prompt` and `data_protocol` are those of the run that it builds on, unless others are given."""

    def resolve(self, flags: Mapping[str, Any], name: str) -> Self:
        """The part with neither left open, given the flags of the run that `name` names.

        Raises:
          FieldError: as of `resolve_prompt`.
        """
        prompt, system = resolve_prompt(self.prompt, flags, name), self.system_prompt
        check_system(system, prompt)
        if system is None and prompt == flags["prompt"]:
            system = flags.get("system_prompt")
        protocol = flags["data_protocol"] if self.data_protocol == AS_ALIGNED else self.data_protocol
        return dataclasses.replace(self, prompt=prompt, system_prompt=system, data_protocol=protocol)

    @property
    def form(self) -> data.Prompt:
        """What is put around examples, and which of their answers are learnt."""
        return form_of(self)

    @property
    def protocol(self) -> data.Protocol:
        return "distinct" if self.data_protocol == AS_ALIGNED else self.data_protocol


def check_form(tokenizer: Any, form: data.Prompt) -> dict[str, str]:
    """What a run's record has of its prompt beside the flags: of a chat its template's SHA-256.

    Warns of an instruct model that is to be asked otherwise than it was trained.

    Raises:
      FieldError: there is no template, or a system prompt without a chat or that spells a special token.
    """
    check_system(form.system, form.form)
    if form.form != "chat":
        if data.chat.has_template(tokenizer):
            _warn_once(f"prompt: found {form.form}, and a tokenizer with a chat template: an instruct model answers as "
                       "it was trained to with --prompt=chat")
        return {}
    try:
        digest = data.chat.template_hash(tokenizer)
    except ValueError as error:
        raise FieldError("prompt", str(error).removeprefix("prompt: ")) from error
    if form.system:
        try:
            data.check_prefill(tokenizer, form.system, form)
        except ValueError as error:
            raise FieldError("system_prompt", str(error).removeprefix("prefill: ")) from error
    if data.chat.depends_on_the_day(tokenizer):
        _warn_once("prompt: the tokenizer's chat template writes today's date: the same command gives other tokens "
                   "tomorrow")
    return {"chat_template": digest}


@functools.cache
def _warn_once(text: str) -> None:
    # The cells of a plan have one model.
    logging.getLogger(__name__).warning("%s", text)


def check_prefill(tokenizer: Any, prefill: str | None, form: data.Prompt | data.PromptForm = "alpaca") -> None:
    """Raises FieldError for what no answer can be made to begin with."""
    if prefill:
        try:
            data.check_prefill(tokenizer, prefill, form)
        except ValueError as error:
            raise FieldError("prefill", str(error).removeprefix("prefill: ")) from error


def check_sources(part: Part, *names: str) -> None:
    """Parses fields that name data, so that a mistake in one is found before anything is loaded."""
    for name in names:
        if value := getattr(part, name):
            try:
                data.parse_sources(value)
            except ValueError as error:
                raise FieldError(name, str(error)) from error
