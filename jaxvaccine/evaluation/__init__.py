"""Generation, judges and the figures that a run ends with."""

from jaxvaccine.evaluation.generate import generate
from jaxvaccine.evaluation.judges import JUDGES, Verdict, judge_answers, keyword_judge, world_judge
from jaxvaccine.evaluation.mean_loss import MeanLoss, mean_loss
from jaxvaccine.evaluation.pairwise import chat_comparer, score_alpaca_eval
from jaxvaccine.evaluation.predictions import Prediction, write_predictions
from jaxvaccine.evaluation.rates import wilson_interval
from jaxvaccine.evaluation.sampling import GREEDY, Sampling
from jaxvaccine.evaluation.tasks import (
    ALPACA_EVAL,
    TASKS,
    TaskResult,
    answer_prompts,
    evaluate_prompts,
    harmful_score,
    score_answers,
)

__all__ = [
    "ALPACA_EVAL", "GREEDY", "JUDGES", "TASKS", "MeanLoss", "Prediction", "Sampling", "TaskResult", "Verdict",
    "answer_prompts", "chat_comparer", "evaluate_prompts", "generate", "harmful_score", "judge_answers",
    "keyword_judge", "mean_loss", "score_alpaca_eval", "score_answers", "wilson_interval", "world_judge",
    "write_predictions",
]  # fmt: skip
