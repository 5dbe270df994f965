"""RepNoise, TAR and the fine-tuning stage's defenses in plain PyTorch: more of pytorch_reference.py."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from experiments.parity import pytorch_reference as reference
from experiments.parity.pytorch_reference import Batch, Gradient, TorchModel, tensors_of
from jaxvaccine.experiment.methods import AlignmentMethod, Booster, RepNoise, Tar, TVaccine, Vaccine, uses

# (layer, shape) -> RepNoise's Gaussian numbers.
Noise = Callable[[int, tuple[int, ...]], np.ndarray | torch.Tensor]


def upcast(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def activations(model: TorchModel, batch: Batch) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """(what every layer reads, what every MLP gives, what the last norm gives), each [B, T, D]."""
    inputs, outputs, tensors = [], [], tensors_of(batch, model.device)
    handles = [layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0])) for layer in model.layers]
    handles += [layer.mlp.register_forward_hook(lambda module, args, out: outputs.append(out))
                for layer in model.layers]
    final = model.base.model(tensors["input_ids"], attention_mask=tensors["attention_mask"], use_cache=False)
    for handle in handles:
        handle.remove()
    return inputs, outputs, final.last_hidden_state


@contextlib.contextmanager
def at_weights(model: TorchModel, weights: Sequence[torch.Tensor]) -> Iterator[None]:
    """The model with other values in its trained parameters for a while."""
    parameters = model.parameters()
    kept = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p, w in zip(parameters, weights, strict=True):
                p.copy_(w)
        yield
    finally:
        with torch.no_grad():
            for p, w in zip(parameters, kept, strict=True):
                p.copy_(w)


def copies(model: TorchModel) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def output_head(model: TorchModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of the last norm's output, capped where the model caps its own (Gemma2)."""
    logits, cap = model.base.lm_head(hidden), getattr(model.base.config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def supervised_log_probabilities(model: TorchModel, batch: Batch) -> torch.Tensor:
    """log p [N, V] of the next token wherever there is a label for it."""
    tensors = tensors_of(batch, model.device)
    logits = model.adapted(tensors["input_ids"], attention_mask=tensors["attention_mask"], use_cache=False).logits
    return torch.log_softmax(upcast(logits[:, :-1][tensors["labels"][:, 1:] != -100]), dim=-1)


class Lisa:
    """Lisa's gradient: the phases alternate from the first step on, the proximal term waits until after `start`."""

    def __init__(self, alignment_steps: int, user_steps: int, rho: float, start: float):
        self.lengths, self.rho, self.start = {"alignment": alignment_steps, "user": user_steps}, rho, start
        self.phase, self.clock, self.step = "alignment", 0, 0
        self.last: dict[str, list[torch.Tensor]] = {}  # the last point of each phase

    def gradient(self, model: TorchModel, batches: Mapping[str, Batch]) -> torch.Tensor:
        if not self.last:
            self.last = {"alignment": copies(model), "user": copies(model)}
        if self.clock == self.lengths[self.phase]:
            self.last[self.phase] = copies(model)
            self.phase, self.clock = {"alignment": "user", "user": "alignment"}[self.phase], 0
        model.clear_gradients()
        loss = model.loss(batches[self.phase])
        total = loss
        if self.step > self.start:
            other = self.last[{"alignment": "user", "user": "alignment"}[self.phase]]
            total = loss + self.rho / 2 * sum(
                ((p - w) ** 2).sum() for p, w in zip(model.parameters(), other, strict=True))
        total.backward()
        self.clock, self.step = self.clock + 1, self.step + 1
        return loss.detach()


def ewc_gradient(lam: float, alignment: Sequence[Batch]) -> Gradient:
    """The Fisher weights are taken at the first call, from these batches."""
    start, fisher = [], []

    def gradient(model: TorchModel, batches: Mapping[str, Batch]) -> torch.Tensor:
        parameters = model.parameters()
        if not start:
            start.extend(copies(model))
            fisher.extend(torch.zeros_like(p) for p in parameters)
            for batch in alignment:
                grads = torch.autograd.grad(model.loss(batch), parameters)
                for total, g in zip(fisher, grads, strict=True):
                    total += g**2
        model.clear_gradients()
        loss = model.loss(batches["user"])
        penalty = sum((f * (p - s) ** 2).sum() for f, p, s in zip(fisher, parameters, start, strict=True))
        (loss + lam * penalty).backward()
        return loss.detach()

    return gradient


def kl_gradient(lam: float) -> Gradient:
    start: list[torch.Tensor] = []

    def gradient(model: TorchModel, batches: Mapping[str, Batch]) -> torch.Tensor:
        if not start:
            start.extend(copies(model))
        model.clear_gradients()
        with at_weights(model, start), torch.no_grad():
            aligned = supervised_log_probabilities(model, batches["user"])
        loss, current = model.loss(batches["user"]), supervised_log_probabilities(model, batches["user"])
        divergence = (aligned.exp() * (aligned - current)).sum(dim=-1).mean()
        (loss + lam * divergence).backward()
        return loss.detach()

    return gradient


def tar_gradient(adversary: Callable[[Sequence[torch.nn.Parameter]], torch.optim.Optimizer], inner_steps: int,
                 tamper_weight: float, retain_weight: float) -> Gradient:
    """adversary: parameters -> the attack's optimizer."""
    start: list[torch.Tensor] = []

    def gradient(model: TorchModel, batches: Mapping[str, Batch]) -> torch.Tensor:
        if not start:
            start.extend(copies(model))
        here = copies(model)
        optimizer = adversary(model.parameters())
        rows = len(batches["adversary"]["input_ids"]) // inner_steps
        for i in range(inner_steps):
            model.clear_gradients()
            model.loss({k: v[i * rows:(i + 1) * rows] for k, v in batches["adversary"].items()}).backward()
            optimizer.step()
        log_p = supervised_log_probabilities(model, batches["harmful"])
        entropy = -(log_p.exp() * log_p).sum(dim=-1).mean()
        tamper = torch.autograd.grad(-tamper_weight * entropy, model.parameters())
        with at_weights(model, start), torch.no_grad():
            inputs, _, final = activations(model, batches["alignment"])
            reference = [*inputs, final]
        with torch.no_grad():
            for p, w in zip(model.parameters(), here, strict=True):
                p.copy_(w)
        model.clear_gradients()
        counts = tensors_of(batches["alignment"], model.device)["attention_mask"].bool()
        inputs, _, final = activations(model, batches["alignment"])
        # torch.norm's gradient at 0 is 0.
        distances = [torch.norm(upcast(h) - upcast(r), dim=-1)[counts].mean()
                     for h, r in zip([*inputs, final], reference, strict=True)]
        loss = model.loss(batches["alignment"])
        (retain_weight * (loss + sum(distances) / len(distances))).backward()
        for p, g in zip(model.parameters(), tamper, strict=True):
            p.grad += g
        return loss.detach()

    return gradient


def multi_kernel_mmd(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[n, F] each: mean k(x, x') + mean k(y, y') − 2 mean k(x, y), k the sum of 5 Gaussians, factor 2 apart."""
    def squared(a, b):
        return ((a[:, None] - b[None]) ** 2).sum(dim=-1)

    everything = torch.cat([x, y])
    total = len(everything)
    bandwidth = squared(everything, everything).sum().detach() / (total**2 - total)
    scales = [bandwidth * 2.0**i for i in (-2, -1, 0, 1, 2)]

    def kernel(a, b):
        return sum(torch.exp(-squared(a, b) / scale) for scale in scales).mean()

    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)


def repnoise_gradient(alpha: float, beta: float, noise: Noise) -> Gradient:
    """noise: (layer, [B, T, D]) -> the numbers that stand against this layer's MLP outputs in this step."""
    def gradient(model: TorchModel, batches: Mapping[str, Batch]) -> torch.Tensor:
        model.clear_gradients()
        harmful, harmless = (tensors_of(batches[name], model.device) for name in ("harmful", "harmless"))
        differs = (harmful["labels"] != -100) & (
            (harmful["input_ids"] != harmless["input_ids"]) | (harmless["attention_mask"] == 0))
        inputs, outputs, final = activations(model, batches["harmful"])
        discrepancies = []
        for i, output in enumerate(outputs):
            gaussian = torch.as_tensor(noise(i, tuple(output.shape)), device=model.device)
            rows = [(upcast(h) * differs[..., None]).flatten(start_dim=1) for h in (output, gaussian)]
            discrepancies.append(multi_kernel_mmd(*rows))
        targets = harmful["input_ids"][:, 1:][differs[:, 1:]]
        losses = []
        for hidden in [*(model.base.model.norm(h) for h in inputs), final]:
            logits = upcast(output_head(model, hidden))[:, :-1][differs[:, 1:]]
            losses.append(torch.nn.functional.cross_entropy(logits, targets))
        loss = model.loss(batches["alignment"])
        ascent = sum(losses) / len(losses)
        (loss + beta * sum(discrepancies) / len(discrepancies) - alpha * torch.log(ascent + 1)).backward()
        return loss.detach()

    return gradient


def adamw_or_sgd(name: str, learning_rate: float) -> Callable[[Sequence[torch.nn.Parameter]], torch.optim.Optimizer]:
    """TAR's adversary by its flag; PyTorch's AdamW decays by 0.01 unless told otherwise."""
    made = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    return lambda parameters: made(parameters, lr=learning_rate)


def scheduled(method: AlignmentMethod, draw: Callable[[int, np.ndarray, int], Sequence[int]]
              ) -> reference.TVaccine | None:
    """T-Vaccine's schedule, if it is the method or Booster's base.

    draw: (steps done, probabilities [L], count) -> the layers that are drawn.
    """
    if not (of := uses(method, TVaccine)):
        return None
    found = reference.TVaccine(of.rho, of.layers, of.sample_every, of.probe_every, of.freeze,
                               draw=lambda probabilities, count: draw(found.step, probabilities, count))
    return found


def gradient_of(method: AlignmentMethod, t_vaccine: reference.TVaccine | None, noise: Noise) -> Gradient:
    """The gradient of a method; t_vaccine as of `scheduled`, noise is RepNoise's."""
    match method:
        case Booster():
            base = gradient_of(method.base, t_vaccine, noise)
            return lambda model, batches: reference.booster_gradient(
                model, batches, method.lam, method.alpha, base, method.last_term)
        case Vaccine():
            return lambda model, batches: reference.vaccine_gradient(model, batches, method.rho)
        case TVaccine():
            return t_vaccine.gradient
        case RepNoise():
            return repnoise_gradient(method.ascent_weight, method.noise_weight, noise)
        case Tar():
            return tar_gradient(adamw_or_sgd(method.adversary, method.inner_learning_rate), method.inner_steps,
                                method.tamper_weight, method.retain_weight)
    return reference.sft_gradient
