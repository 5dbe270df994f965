"""How the papers' programs test a model, as settings of an evaluation."""

import pytest

from jaxvaccine.data import DataSource
from jaxvaccine.experiment.config import flat, make
from jaxvaccine.experiment.evaluate_config import TESTS, EvaluateConfig
from jaxvaccine.experiment.paper_tests import EVALUATION, SLICES
from jaxvaccine.experiment.recipes import METHODS


@pytest.mark.parametrize("paper, harmful, instructions, rule, rows", [
    ("booster", 512, 256, "equals", 1000), ("t_vaccine", 128, 256, "contains", 500)])
def test_a_papers_evaluation(paper, harmful, instructions, rule, rows):
    """Every length is a flag of its own; slices are ones that a source takes."""
    given = {**EVALUATION[paper], "model": "m", "run_dir": "-", "harmful_test": "beavertails_unsafe:t.jsonl[0:1]"}
    found = make(EvaluateConfig, given)
    lengths = [found.generation.longest(task) for task in ("harmful_score", "sst2", "agnews", "gsm8k", "alpaca_eval")]
    assert lengths == [harmful, 200, 200, 200, instructions]
    assert (found.generation.label_rule, found.judge.judge, found.judge.judge_max_length) == (rule, "beaver_dam", 256)
    assert set(EVALUATION[paper]) <= set(flat(found)) and paper in METHODS
    sources = {name: DataSource.parse(f"sst2:t.jsonl{text}") for name, text in SLICES[paper].items()}
    assert set(sources) <= set(TESTS)
    assert (sources["harmful_test"].stop, sources["sst2_test"].stop) == (rows, min(rows, 872))
    assert sources["alpaca_eval_test"].start == -104, "of 805, those with an index above 700"
