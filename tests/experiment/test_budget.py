"""The budget of a run, against sums by hand and against what its optimizer's schedule gives out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine import optim
from jaxvaccine.experiment import recipes
from jaxvaccine.experiment.align import AlignConfig
from jaxvaccine.experiment.attack_config import AttackConfig
from jaxvaccine.experiment.budget import PUBLISHED, budgets
from jaxvaccine.experiment.config import make, names
from jaxvaccine.experiment.parts import AdapterPart, TrainingPart


def test_by_hand():
    part, adapter = TrainingPart(learning_rate=2e-3, schedule="constant"), AdapterPart(rank=8, lora_alpha=2.0)
    np.testing.assert_allclose(budgets(part, adapter, 3), 0.25 * 2e-3 * np.arange(4), rtol=1e-6)
    line = TrainingPart(learning_rate=1.0, schedule="linear")
    one = AdapterPart(rank=1, lora_alpha=1.0)
    np.testing.assert_allclose(budgets(line, one, 4), [0, 1, 1.75, 2.25, 2.5], rtol=1e-6)


@settings(max_examples=30)
@given(schedule=st.sampled_from(("constant", "linear", "cosine")), warmup=st.floats(0, 1), steps=st.integers(1, 60),
       rank=st.integers(1, 64), alpha=st.floats(0.1, 64))
def test_is_the_schedule_summed(schedule, warmup, steps, rank, alpha):
    part = TrainingPart(learning_rate=1e-3, schedule=schedule, warmup_ratio=warmup)
    found = budgets(part, AdapterPart(rank=rank, lora_alpha=alpha), steps)
    rate = optim.learning_rate_schedule(part.optimizer(), steps)
    assert found.shape == (steps + 1,) and found[0] == 0 and (np.diff(found) >= 0).all()
    expected = alpha / rank * sum(float(rate(step)) for step in range(steps))
    assert found[-1] == pytest.approx(expected, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("paper, expected", [("booster", 250), ("t_vaccine", 800)])
def test_of_the_published(paper, expected):
    """The two papers' own methods, in the recipes' own schedules."""
    anything = {"model": "m", "run_dir": "-", "alignment_data": "world_refusal@train",
                "harmful_data": "world_harmful@harmful", "user_data": "world_rating@attack", "aligned": "-"}

    def part(config_class, values):
        return make(config_class, {name: value for name, value in anything.items() if name in names(config_class)},
                    values)

    aligned = part(AlignConfig, recipes.alignment(paper, paper))
    attacked = part(AttackConfig, recipes.attack(paper, paper))
    adapter = attacked.adapter.resolve({**recipes.alignment(paper, paper)}, attacked.method).sites()
    rows = recipes.rows(paper, paper)["alignment"]
    ratio = (budgets(aligned.training, aligned.adapter, aligned.training.count_steps(rows))[-1]
             / budgets(attacked.training, adapter, attacked.training.count_steps(attacked.data.n))[-1])
    assert ratio == pytest.approx(expected, rel=0.01) and PUBLISHED[0] <= round(ratio) <= PUBLISHED[1]
