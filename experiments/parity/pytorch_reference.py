"""The defenses in plain PyTorch, written from the equations: transformers' models, PEFT's LoRA, hooks, torch.optim.

The other side of every comparison, in compare_pytorch.py and in the tests. It does what the released
programs were observed to do, and shares nothing with jaxvaccine but two config classes and the layout of the adapter,
in which weights and gradients are compared. Needs PyTorch and PEFT: pip install 'jaxvaccine[parity]'.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import peft
import torch
import transformers

from jaxvaccine.llama_config import LoraConfig
from jaxvaccine.optim import OptimizerConfig

NORM_EPSILON = 1e-7
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
Batch = Mapping[str, Any]
# What leaves a gradient in every trained parameter's .grad, and returns the loss, a scalar that is not waited for.
Gradient = Callable[["TorchModel", Mapping[str, Batch]], torch.Tensor]


class Float64Rope(torch.nn.Module):
    """cos and sin [B, T, H] of the rotary embedding without scaling; transformers' are float32 in any model."""

    def __init__(self, config: transformers.PreTrainedConfig):
        super().__init__()
        rope = config.rope_parameters
        if rope["rope_type"] != "default":
            raise ValueError(f"rope_type: found {rope['rope_type']!r}, expected 'default' in float64")
        pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
        self.frequencies = rope["rope_theta"] ** (-pairs / config.head_dim)

    def forward(self, x, position_ids):
        angles = position_ids[..., None].double() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def _float64_norm(module: torch.nn.Module, gemma: bool) -> torch.nn.Module:
    epsilon = module.eps if gemma else module.variance_epsilon
    norm = torch.nn.RMSNorm(module.weight.shape[0], epsilon, dtype=torch.float64)
    norm.weight = torch.nn.Parameter(1 + module.weight) if gemma else module.weight
    return norm


def _capped_attention(module, query, key, value, attention_mask, scaling, softcap, **_):
    """Gemma2's attention, softmax in the scores' dtype; query [B, N, T, H], key and value [B, K, S, H]."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = softcap * torch.tanh(query @ key.mT * (scaling / softcap))
    return (torch.softmax(scores + attention_mask, dim=-1) @ value).transpose(1, 2), None


def load_base(model_dir: str, dtype: str) -> transformers.PreTrainedModel:
    """transformers' model in the given dtype; in float64 with norms, rotary angles and softmax in float64 too."""
    attention = "eager"
    if dtype == "float64":
        # transformers computes these three in float32 whatever the model's dtype.
        attention = "sdpa"
        if transformers.AutoConfig.from_pretrained(model_dir).model_type == "gemma2":
            attention = "capped"  # which sdpa cannot do
            transformers.AttentionInterface.register(attention, _capped_attention)
            transformers.AttentionMaskInterface.register(attention, transformers.masking_utils.eager_mask)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=getattr(torch, dtype), attn_implementation=attention)
    if dtype == "float64":
        for parent in [base.model, *base.model.layers]:
            for name, module in list(parent.named_children()):
                if name.endswith("norm"):
                    setattr(parent, name, _float64_norm(module, attention == "capped"))
        base.model.rotary_emb = Float64Rope(base.config)
    return base


def tensors_of(batch: Batch, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """A batch of arrays or tensors as int64 tensors on a device."""
    return {name: torch.as_tensor(value if isinstance(value, torch.Tensor) else np.array(value), dtype=torch.long,
                                  device=device) for name, value in batch.items()}


def lora_matrices(module: torch.nn.Module) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """PEFT's A [r, in] and B [out, r] of a projection."""
    return module.lora_A["default"].weight, module.lora_B["default"].weight


class TorchModel:
    """A model with PEFT's LoRA in float32 (float64 for a float64 base) that starts at the given adapter."""

    def __init__(self, base: transformers.PreTrainedModel, lora: LoraConfig, adapter):
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # between PEFT and transformers
            self.adapted = peft.get_peft_model(base, peft.LoraConfig(
                r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets)))
        self.base, self.layers = base, base.model.layers
        self.projections = [
            (block, name, getattr(layer.self_attn if block == "attention" else layer.mlp, name), i)
            for i, layer in enumerate(self.layers)
            for name in lora.targets for block in ["attention" if name in ATTENTION else "mlp"]]
        self.set_adapter(adapter)
        self.adapted.eval()

    @property
    def device(self) -> torch.device:
        return self.base.device

    def set_adapter(self, adapter) -> None:
        """All of it trains."""
        with torch.no_grad():
            for block, name, module, i in self.projections:
                for matrix, key in zip(lora_matrices(module), "ab", strict=True):
                    matrix.requires_grad_(True)
                    matrix.copy_(torch.tensor(np.asarray(adapter["layers"][block][name][key][i]).T))

    def parameters(self) -> list[torch.nn.Parameter]:
        """What trains now."""
        return [p for p in self.adapted.parameters() if p.requires_grad]

    def clear_gradients(self) -> None:
        for p in self.adapted.parameters():
            p.grad = None

    def tree(self, read: Callable[[torch.nn.Parameter], np.ndarray]):
        """The adapter's tree of read(parameter), stacked over layers as jaxvaccine has it."""
        stacked: dict[str, dict[str, dict[str, list]]] = {}
        for block, name, module, _ in self.projections:
            pair = stacked.setdefault(block, {}).setdefault(name, {"a": [], "b": []})
            for matrix, key in zip(lora_matrices(module), "ab", strict=True):
                pair[key].append(read(matrix).T)
        return {"layers": {block: {name: {key: np.stack(leaves) for key, leaves in pair.items()}
                                   for name, pair in projections.items()} for block, projections in stacked.items()}}

    def weights(self):
        return self.tree(lambda p: p.detach().numpy().copy())

    def gradients(self):
        """Zeros where there is none."""
        return self.tree(lambda p: (torch.zeros_like(p) if p.grad is None else p.grad).detach().numpy().copy())

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean of −log p over the batch's supervised positions; position i predicts label i + 1."""
        tensors = tensors_of(batch, self.device)
        labels = tensors.pop("labels")[:, 1:].reshape(-1)
        logits = self.adapted(**tensors, use_cache=False).logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels, ignore_index=-100)

    @contextlib.contextmanager
    def attention_hooks(self, hook: Callable[[int, torch.Tensor], torch.Tensor | None],
                        layers: Sequence[int]) -> Iterator[None]:
        """hook(layer index, attention output [B, T, D]: after o_proj, before the residual add) -> its replacement."""
        def make(i):
            def call(module, inputs, output):
                replacement = hook(i, output[0])
                return None if replacement is None else (replacement, *output[1:])
            return call

        handles = [self.layers[i].self_attn.register_forward_hook(make(i)) for i in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def joint_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """One 2-norm over all of them."""
    return torch.sqrt(sum((g**2).sum() for g in gradients))


def activation_gradients(model: TorchModel, batch: Batch, layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """∇_{a_l} of the batch's loss, [B, T, D], for the given layers."""
    outputs = {}

    def remember(i, output):
        # A leaf in the output's place would cut the graph below it, which other layers' gradients need.
        output = output if output.requires_grad else output.requires_grad_()
        output.retain_grad()
        outputs.setdefault(i, output)  # checkpointing comes here twice

    with model.attention_hooks(remember, layers):
        model.loss(batch).backward()
    gradients = {i: output.grad.clone() for i, output in outputs.items()}
    model.clear_gradients()
    return gradients


def sft_gradient(model: TorchModel, batches: Mapping[str, Batch]) -> torch.Tensor:
    model.clear_gradients()
    loss = model.loss(batches["alignment"])
    loss.backward()
    return loss.detach()


def vaccine_gradient(model: TorchModel, batches: Mapping[str, Batch], rho: float,
                     layers: Sequence[int] | None = None) -> torch.Tensor:
    """layers: which are perturbed and make up the norm; all for None."""
    model.clear_gradients()
    layers = range(len(model.layers)) if layers is None else layers
    gradients = activation_gradients(model, batches["alignment"], layers)
    norm = joint_norm(list(gradients.values()))
    with model.attention_hooks(lambda i, a: a + (rho * gradients[i] / (norm + NORM_EPSILON)).to(a.dtype), layers):
        loss = model.loss(batches["alignment"])
        loss.backward()  # in here, for checkpointing
    return loss.detach()


def booster_gradient(model: TorchModel, batches: Mapping[str, Batch], lam: float, alpha: float,
                     base: Gradient, last_term: bool = True) -> torch.Tensor:
    """base: leaves ∇f, or what stands in its place. Parameters that it gave no gradient take no part."""
    loss = base(model, batches)
    parameters = [p for p in model.parameters() if p.grad is not None]
    base_grads = [p.grad.clone() for p in parameters]
    model.clear_gradients()
    model.loss(batches["harmful"]).backward()
    harmful_grads = [p.grad.clone() for p in parameters]
    norm = joint_norm(harmful_grads)
    start = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, g in zip(parameters, harmful_grads, strict=True):
            p -= alpha * g / (norm + NORM_EPSILON)
    model.clear_gradients()
    model.loss(batches["harmful"]).backward()
    perturbed_grads = [p.grad.clone() for p in parameters]
    model.clear_gradients()
    with torch.no_grad():
        for p, w, f, h, h_perturbed in zip(
                parameters, start, base_grads, harmful_grads, perturbed_grads, strict=True):
            p.copy_(w)
            p.grad = f + lam * h - lam * h_perturbed if last_term else f + lam * h
    return loss


def layer_probabilities(model: TorchModel, harmful: Batch) -> np.ndarray:
    """p_l = ‖∇_{a_l} h‖ / Σ, [L] float64."""
    gradients = activation_gradients(model, harmful, range(len(model.layers)))
    norms = np.array([gradients[i].double().norm().item() for i in range(len(gradients))])
    return norms / norms.sum()


class TVaccine:
    """T-Vaccine's schedule and gradient.

    Every `probe_every` steps p is taken from the harmful batch, every `sample_every` steps `count` layers are drawn
    with it; where both fall due, p first. freeze="layer" (the paper): all adapters of the other layers have
    requires_grad off. "released" (the released program): those of their attention only, and inactive layers are under
    re-entrant checkpointing, which gives no gradient to the MLP adapters below the first active layer. In models of
    more than 26 layers the one before the first active layer was observed to keep its MLP's gradient.

    draw: (probabilities [L], count) -> layer indices; numpy.random.choice(L, count, replace=False, p=p) in the
    released program.
    """

    def __init__(self, rho: float, count: int, sample_every: int, probe_every: int, freeze: str,
                 draw: Callable[[np.ndarray, int], Sequence[int]]):
        self.rho, self.count, self.sample_every, self.probe_every, self.freeze, self.draw = (
            rho, count, sample_every, probe_every, freeze, draw)
        self.step, self.probabilities, self.active = 0, None, ()

    def gradient(self, model: TorchModel, batches: Mapping[str, Batch]) -> torch.Tensor:
        if self.step % self.probe_every == 0:
            self.probabilities = layer_probabilities(model, batches["harmful"])
        if self.step % self.sample_every == 0:
            self.active = sorted(int(i) for i in self.draw(self.probabilities, self.count))
            self._freeze(model)
        self.step += 1
        checkpointed = set()
        if self.freeze == "released":
            checkpointed = set(range(len(model.layers))) - set(self.active)
            if len(model.layers) > 26:
                checkpointed.discard(self.active[0] - 1)
        with reentrant_checkpointing(model, checkpointed):
            return vaccine_gradient(model, batches, self.rho, self.active)

    def _freeze(self, model: TorchModel) -> None:
        for block, _, module, i in model.projections:
            frozen = i not in self.active and (block == "attention" or self.freeze == "layer")
            for matrix in lora_matrices(module):
                matrix.requires_grad_(not frozen)


@contextlib.contextmanager
def reentrant_checkpointing(model: TorchModel, layers) -> Iterator[None]:
    """The given layers under torch's re-entrant checkpointing, as the released T-Vaccine runs its inactive ones."""
    def checkpointed(layer):
        forward = type(layer).forward

        def call(hidden, **kwargs):
            return torch.utils.checkpoint.checkpoint(
                lambda hidden: forward(layer, hidden, **kwargs), hidden, use_reentrant=True)
        return call

    for i in layers:
        model.layers[i].forward = checkpointed(model.layers[i])
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad")  # this is the point of it
            yield
    finally:
        for i in layers:
            del model.layers[i].forward


class TorchOptimizer:
    """Clip, AdamW and transformers' schedule, as the authors' trainer steps them.

    AdamW has every adapter matrix; one without a gradient is skipped whole.
    """

    def __init__(self, model: TorchModel, config: OptimizerConfig, steps: int):
        self.parameters, self.clip_norm = model.parameters(), config.clip_norm
        self.adamw = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
        self.schedule = transformers.get_scheduler(
            name, self.adamw, int(np.ceil(steps * config.warmup_ratio)), steps)

    def step(self) -> torch.Tensor | None:
        """Returns the gradient's norm before clipping; None without."""
        norm = None
        if self.clip_norm:
            norm = torch.nn.utils.clip_grad_norm_([p for p in self.parameters if p.grad is not None], self.clip_norm)
        self.adamw.step()
        self.schedule.step()
        return norm
