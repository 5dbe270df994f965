"""Alignment-stage defenses against harmful fine-tuning, as pure JAX functions over a model's parameters."""

from jaxvaccine import defenses
from jaxvaccine.checkpoints.hugging_face import load_model, save_model
from jaxvaccine.checkpoints.peft import load_adapter, save_adapter
from jaxvaccine.llama import Llama, init_adapter, init_frozen
from jaxvaccine.llama_config import LlamaConfig, LoraConfig
from jaxvaccine.losses import causal_lm_loss
from jaxvaccine.merging import freeze_adapter, merge_adapter
from jaxvaccine.optim import OptimizerConfig, layer_masked_adamw, layer_masked_optimizer
from jaxvaccine.training import TrainState, fit, init_train_state, make_train_step

__all__ = [
    "Llama", "LlamaConfig", "LoraConfig", "OptimizerConfig", "TrainState", "causal_lm_loss", "defenses", "fit",
    "freeze_adapter", "init_adapter", "init_frozen", "init_train_state", "layer_masked_adamw", "layer_masked_optimizer",
    "load_adapter", "load_model", "make_train_step", "merge_adapter", "save_adapter", "save_model",
]  # fmt: skip
