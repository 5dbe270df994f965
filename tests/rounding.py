"""What float32 may leave of a number, by what it is made of; not by what one machine left of it."""

import numpy as np

from jaxvaccine.llama_config import LlamaConfig


def forward(config: LlamaConfig, values, dtype=np.float32) -> float:
    """Largest difference of two forward passes of a model that sum in different orders, of logits or hidden states.

    A sum of n terms in any order rounds by about eps · √n of its scale. A layer has four products in a row (queries or
    keys, attention, up, down; others stand beside them), and the output head is one more. Four times that: each of
    the passes rounds, and random weights make of a layer's difference up to twice as much.

    Args:
      values: whose largest is the scale.
    """
    longest = max(config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
    products = 4 * config.num_layers + 1
    return float(4 * products * np.sqrt(longest) * np.finfo(dtype).eps * np.abs(np.asarray(values)).max())
