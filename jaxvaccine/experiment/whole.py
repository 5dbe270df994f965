"""Attacks whose result is a whole model: all weights have trained, or a direction was projected out of them."""

import functools
import os
import shutil
from pathlib import Path
from typing import Any

import jax

from jaxvaccine.attacks import all_weights
from jaxvaccine.attacks.refusal_ablation import Direction, untied
from jaxvaccine.checkpoints.hugging_face import resolve_model, save_model
from jaxvaccine.checkpoints.identity import model_identity
from jaxvaccine.experiment import ablation, inputs, stage
from jaxvaccine.experiment.ablation import AblationBefore, Prompts
from jaxvaccine.llama import Llama
from jaxvaccine.merging import merge_adapter


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _merge_in_place(model: Llama, adapter: Any, frozen: Any) -> Any:
    return merge_adapter(model, adapter, frozen)


def to_base(model: Llama, trained: Any, frozen: Any) -> stage.Base:
    """What was trained as a model without an adapter; `frozen` is given away.

    trained: an adapter at the model's LoRA sites; of a model without them, all weights as of `all_weights.to_train`; or
    None.
    """
    bare = model.clone(lora=None)
    if trained is None:
        return stage.Base(bare, frozen, None, None)
    if model.lora is None:
        return stage.Base(bare, jax.jit(all_weights.to_model, static_argnums=0)(bare, trained), None, None)
    stage.forget_backbone()
    return stage.Base(bare, _merge_in_place(model, trained, frozen), None, None)


def ablated(base: stage.Base, part: AblationBefore, prompts: Prompts) -> tuple[stage.Base, Direction]:
    """A model without an adapter, with its refusal direction projected out, and the direction."""
    found = ablation.find(part, prompts, base.model, None, base.frozen)
    return base._replace(model=untied(base.model), frozen=ablation.ablate(base.model, base.frozen, found.r)), found


def leave_model(run_dir: Path, base: stage.Base, of: stage.Origin, steps: int, found: Direction | None) -> None:
    """Writes what a run leaves into model/, a Hugging Face directory with the tokenizer of the model that it is of, and
    its hashes, so that a run with a model has finished. found: of a refusal ablation."""
    staged = run_dir / f"{inputs.MODEL}.tmp"
    shutil.rmtree(staged, ignore_errors=True)
    save_model(base.model, base.frozen, staged, tokenizer_from=resolve_model(of.model, of.revision or None))
    more = {} if found is None else {"ablation": ablation.record(found)}
    inputs.record_results(run_dir, steps, {inputs.MODEL: model_identity(staged)}, **more)
    os.replace(staged, inputs.model_dir(run_dir))
