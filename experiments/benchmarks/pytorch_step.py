"""PyTorch's side of the benchmarks: a training step of every method as its users write it.

transformers' model and its own loss, PEFT's LoRA, hooks for perturbations (`experiments.parity`), torch.optim, eager;
in bfloat16 under autocast, as with the Trainer's bf16=True. The weights are `random_weights`', the batches lie on the
device. Needs torch and peft (the `parity` extra).
"""

import contextlib
from typing import Any

import numpy as np
import torch
import transformers

from experiments.benchmarks import random_weights
from experiments.benchmarks.our_step import OPTIMIZER, SEED, Last, StepPart
from experiments.parity import pytorch_methods, steps
from experiments.parity import pytorch_reference as reference
from jaxvaccine.experiment.methods import AlignmentMethod
from jaxvaccine.llama_config import LlamaConfig


class UsersModel(reference.TorchModel):
    """The reference's model with transformers' own loss, or with logits of the supervised positions alone."""

    supervised_logits = False

    def loss(self, batch: reference.Batch) -> torch.Tensor:
        tensors = reference.tensors_of(batch, self.device)
        if not self.supervised_logits:
            return self.adapted(**tensors, use_cache=False).loss
        labels = tensors.pop("labels")[:, 1:]
        hidden = self.base.model(**tensors, use_cache=False).last_hidden_state[:, :-1][labels != -100]
        logits = pytorch_methods.output_head(self, hidden)
        return torch.nn.functional.cross_entropy(logits.float(), labels[labels != -100])


def make_base(architecture: LlamaConfig, dtype: str, device: str, attention: str) -> transformers.PreTrainedModel:
    """transformers' model on the device, with `random_weights`."""
    config = transformers.AutoConfig.for_model(**architecture.to_hugging_face())
    with torch.device(device):
        base = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attention)
    random_weights.fill(base, architecture)
    return base


def make_model(part: StepPart, device: str) -> UsersModel:
    base = make_base(part.architecture(), part.dtype, device, part.pytorch_attention)
    model = UsersModel(base, part.lora(), random_weights.adapter(part.llama()))
    model.supervised_logits = part.supervised_logits
    if part.checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
        model.adapted.train()  # transformers checkpoints in training alone; there is no dropout
    return model


class Theirs:
    """A training step and its state; a model serves one at a time."""

    def __init__(self, part: StepPart, method: AlignmentMethod, model: UsersModel):
        self.part, self.method, self.model = part, method, model
        self.adapter = random_weights.adapter(part.llama())
        self.batches = {name: reference.tensors_of(batch, model.device)
                        for name, batch in part.batches().items() if name in method.batches}
        self.shared_noise = steps.Problem(steps.tiny_config(defense="repnoise", seed=SEED), part.dtype, "-", None, ())
        self.draws: list[int] | None = None  # what T-Vaccine draws next; None is its own
        self.start_again()

    def start_again(self) -> None:
        self.model.set_adapter(self.adapter)
        self.done, self.found, rng = 0, (), np.random.default_rng(SEED)

        def draw(step: int, probabilities: np.ndarray, count: int) -> Any:
            return self.draws or rng.choice(len(probabilities), count, replace=False, p=probabilities)

        self.gradient = pytorch_methods.gradient_of(
            self.method, pytorch_methods.scheduled(self.method, draw), self._noise)
        self.optimizer = reference.TorchOptimizer(self.model, OPTIMIZER, steps=1000)

    def _noise(self, layer: int, shape: tuple[int, ...]) -> np.ndarray | torch.Tensor:
        """In the first step ours, by which the two sides are compared; then PyTorch's, which take it less time."""
        if self.done == 0:
            return steps.repnoise_noise(self.shared_noise, 0, layer, shape)
        return torch.randn(shape, device=self.model.device)

    def step(self) -> None:
        device = self.model.device.type
        # Booster and TAR change the adapter within a step: a copy in bfloat16 must not outlive it.
        half = (torch.autocast(device, torch.bfloat16, cache_enabled=False) if self.part.dtype == "bfloat16"
                else contextlib.nullcontext())
        with half:
            loss = self.gradient(self.model, self.batches)
        self.found, self.done = (loss, self.optimizer.step()), self.done + 1

    def wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()

    def last(self) -> Last:
        return Last(*(float(value) for value in self.found))
