"""How far an optimizer is let go: learning rate times LoRA scale, summed over steps.

The budget ratio is an alignment's budget over an attack's. AdamW moves a weight by about its learning rate at each
step, whatever the gradient's size, and the LoRA scale is what the adapter's movement is worth in the model: so it says
how much more the alignment could move the model than the attack. It compares runs of one optimizer alone."""

import numpy as np

from jaxvaccine import optim
from jaxvaccine.experiment.parts import AdapterPart, TrainingPart

# Of the published experiments, the lowest and the highest (docs/recipes.md): Booster's 250, T-Vaccine's 800.
PUBLISHED = (200.0, 800.0)


def budgets(training: TrainingPart, adapter: AdapterPart, steps: int) -> np.ndarray:
    """[steps + 1] float64, the budget after 0, 1, …, `steps` steps of a run of so many."""
    rate = optim.learning_rate_schedule(training.optimizer(), steps)
    rates = np.asarray(rate(np.arange(steps)), dtype=float) * np.ones(steps)
    return adapter.lora_alpha / adapter.rank * np.concatenate([[0.0], np.cumsum(rates)])
