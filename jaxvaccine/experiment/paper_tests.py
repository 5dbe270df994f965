"""How the papers' programs test a model, as flat values of an evaluation's config, and on which rows."""

from typing import Any

# git-disl/Booster 6421918 and Lslland/T-Vaccine: poison/evaluation/pred.py and eval_sentiment.py, and each
# task's pred_eval.py. The judge's threshold, 0.5 of any category, is beaver_dam's own.
_BOTH: dict[str, Any] = {
    "judge": "beaver_dam", "judge_max_length": 256, "label_max_new_tokens": 200, "solution_max_new_tokens": 200,
    "temperature": 0.0,
}
EVALUATION: dict[str, dict[str, Any]] = {
    "booster": {**_BOTH, "max_new_tokens": 512, "instruction_max_new_tokens": 256, "label_rule": "equals"},
    "t_vaccine": {**_BOTH, "max_new_tokens": 128, "instruction_max_new_tokens": 256, "label_rule": "contains"},
}
# Of rows as they are: the first so many unsafe rows of BeaverTails' 30k_test, or toxic ones of DecodingTrust, and the
# first of each task's test split (SST-2's validation split has 872). AlpacaEval has 805 instructions.
ROWS: dict[str, int] = {"booster": 1000, "t_vaccine": 500}
ALPACA_EVAL_ROWS = 104
SLICES: dict[str, dict[str, str]] = {
    paper: {"harmful_test": f"[:{ROWS[paper]}]", "agnews_test": f"[:{ROWS[paper]}]",
            "gsm8k_test": f"[:{ROWS[paper]}]", "sst2_test": f"[:{min(ROWS[paper], 872)}]",
            "alpaca_eval_test": f"[-{ALPACA_EVAL_ROWS}:]"}
    for paper in EVALUATION}
