"""How a plan scores an attacked model: as its user asks it."""

import dataclasses

from jaxvaccine.experiment.attack_config import AttackConfig
from jaxvaccine.experiment.evaluate_config import EvaluateConfig


def as_attacked(scores: EvaluateConfig, attacked: AttackConfig) -> EvaluateConfig:
    """A plan's evaluation, with the prompt that the attack trains with, its system prompt, and the answer that it
    begins with, if it does."""
    generation = scores.generation
    if attacked.data.prefill is not None:
        generation = dataclasses.replace(generation, prefill=attacked.data.prefill)
    return dataclasses.replace(scores, generation=generation,
                               tests=dataclasses.replace(scores.tests, prompt=attacked.data.prompt,
                                                         system_prompt=attacked.data.system_prompt))
