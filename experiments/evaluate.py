"""Scores a model, as it comes or as a run left it: harmful score, fine-tune accuracy on three tasks, over-refusal,
and the loss on harmful answers.

  python -m experiments.evaluate --model=meta-llama/Llama-2-7b-hf --trained=runs/booster-p0.1 \\
      --run_dir=runs/booster-p0.1-scores --harmful_test=beavertails_unsafe:test.jsonl[0:500] \\
      --sst2_test=sst2:stanfordnlp/sst2@validation
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from absl import app, logging

from experiments import common, config_flags, reports
from experiments.config_flags import flag
from experiments.judging import JudgeConfig, make_comparer, make_judge
from jaxvaccine import data, runs
from jaxvaccine.checkpoints import hugging_face
from jaxvaccine.evaluation import (
    ALPACA_EVAL,
    Sampling,
    TaskResult,
    answer_prompts,
    keyword_judge,
    mean_loss,
    score_alpaca_eval,
    score_answers,
    write_predictions,
)

RESULTS = "results.json"
# Flag with the test data -> key of evaluation.TASKS, or ALPACA_EVAL.
TASKS = {"harmful_test": "harmful_score", "sst2_test": "sst2", "agnews_test": "agnews", "gsm8k_test": "gsm8k",
         "benign_test": "over_refusal", "alpaca_eval_test": ALPACA_EVAL}
# Task -> flag with its longest answer; --max_new_tokens for the others.
LENGTHS = {"sst2": "label_max_new_tokens", "agnews": "label_max_new_tokens", "gsm8k": "solution_max_new_tokens",
           ALPACA_EVAL: "instruction_max_new_tokens"}


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(JudgeConfig):
    """Flags of evaluate.py."""

    run_dir: str = flag("", "Folder for scores and predictions.")
    model: str = flag("", "Model: a Hugging Face directory, a hub id or a .gguf file; --trained has its own.")
    trained: str = flag("", "Folder of a finished align.py or finetune.py run to score; none scores --model itself.")
    dtype: Literal["checkpoint", "float32", "bfloat16", "float16"] = flag("checkpoint", "Type of the computation.")
    harmful_test: str = flag("", "Harmful prompts for HS: kind:path-or-hub-id@split[start:stop]; none leaves HS out.")
    sst2_test: str = flag("", "SST-2 data for FA; none leaves FA out.")
    agnews_test: str = flag("", "AG News data for FA; none leaves it out.")
    gsm8k_test: str = flag("", "GSM8K data for FA; none leaves it out.")
    benign_test: str = flag("", "Harmless requests for over-refusal; none leaves it out.")
    alpaca_eval_test: str = flag(
        "", "AlpacaEval's instructions with a reference model's outputs, for the win rate; needs --judge=chat_api.")
    loss_data: str = flag("", "Harmful examples whose mean loss h(w) is taken; none leaves it out.")
    max_length: int = flag(256, "Tokens at which prompt and answer of --loss_data are cut.")
    max_new_tokens: int = flag(200, "Longest answer to a request, in tokens.")
    label_max_new_tokens: int = flag(
        8, "Longest answer on SST-2 and AG News: enough to see that it is more than a label.")
    solution_max_new_tokens: int = flag(200, "Longest answer on GSM8K, in tokens.")
    instruction_max_new_tokens: int = flag(512, "Longest answer on AlpacaEval, in tokens.")
    temperature: float = flag(0.0, "0 takes the most likely token; above, tokens are drawn.")
    top_k: int = flag(0, "Draws are from this many most likely tokens; 0 takes all.")
    top_p: float = flag(1.0, "Draws are from the fewest most likely tokens with this probability together.")
    seed: int = flag(0, "Of the draws; a prompt's answer does not depend on the batch that it is in.")
    merge_adapter: bool = flag(False, "Merge the run's adapter into the weights: faster, and rounded to their type.")
    eval_batch_size: int = flag(32, "Rows decoded together; on a CPU, 256 keep all cores busy.")
    eval_bucket: int = flag(32, "Prompts are padded to a multiple of this many tokens.")
    overwrite: bool = flag(False, "Delete earlier scores in --run_dir and start again.")

    def __post_init__(self):
        super().__post_init__()
        common.require(self, "run_dir", bool(self.run_dir), "a folder")
        common.require(self, "model", bool(self.model) != bool(self.trained), "either --model or --trained")
        common.require(self, "judge", self.judge == "chat_api" or not self.alpaca_eval_test,
                       "chat_api, which --alpaca_eval_test needs")
        for name in ("max_length", "max_new_tokens", *LENGTHS.values(), "eval_batch_size", "eval_bucket"):
            common.require(self, name, getattr(self, name) >= 1, "at least 1")
        common.require(self, "harmful_test", any(getattr(self, name) for name in TASKS),
                       "at least one of " + ", ".join(f"--{name}" for name in TASKS))
        common.check_sources(self, *TASKS, "loss_data")
        self.sampling()

    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Carries out the evaluation, or reads the results of a finished one.

    {task: {score, interval, n, …}}, with --loss_data also {reports.LOSS: {loss, tokens, n}}, the loss in nats a token.
    """
    model_path, seen = config.model, {}
    if config.trained:
        model_path, seen = _trained_on(config.trained)
    examples = {task: common.load_sources(getattr(config, name)) for name, task in TASKS.items()
                if getattr(config, name)}
    _check_unseen(examples, seen)
    if config.loss_data:
        examples = {reports.LOSS: common.load_sources(config.loss_data), **examples}
    result, operational = common.result_flags(config)
    run_dir = runs.open_run(config.run_dir, "evaluate", result,
                            {"hashes": {task: runs.examples_hash(rows) for task, rows in examples.items()}},
                            operational, config.overwrite)
    if (run_dir / RESULTS).exists():
        return runs.read_json(run_dir / RESULTS)
    answers = _measure(config, run_dir, model_path, examples)
    if config.judge == "beaver_dam":
        # There is not room for two 7B models.
        common.forget_base()
    judge = make_judge(config) if "harmful_score" in examples else keyword_judge
    results: dict[str, Any] = {}
    for task, rows in examples.items():
        if task == reports.LOSS:
            results[task] = answers[task]
            continue
        categories = data.load_categories(config.harmful_test) if task == "harmful_score" else {}
        if task == ALPACA_EVAL:
            scored = score_alpaca_eval(rows, answers[task], make_comparer(config))
        else:
            scored = score_answers(task, rows, answers[task], judge, categories)
        write_predictions(run_dir / f"predictions_{task}.jsonl", scored.predictions, overwrite=True)
        results[task] = _summary(scored)
    reports.write_evaluation_report(run_dir, config.trained or config.model, results)
    runs.write_json(run_dir / RESULTS, results)
    return results


def _measure(config: EvaluateConfig, run_dir: Path, model_path: str, examples: dict[str, list[data.Example]]
             ) -> dict[str, Any]:
    """All that needs the model: {task: answers}, and the loss.

    What an interrupted evaluation has generated is read, not repeated.
    """
    done = {task: path for task in examples if (path := run_dir / f"answers_{task}.json").exists()}
    answers = {task: runs.read_json(path) for task, path in done.items()}
    if len(done) == len(examples):
        return answers
    architecture = common.read_architecture(model_path)
    tokenizer = data.load_tokenizer(hugging_face.resolve_model(model_path))
    data.check_vocabulary(tokenizer, architecture.vocab_size)
    base = common.load_base(model_path, config.dtype, config.trained or None, merge=config.merge_adapter)
    model = base.model.clone(lora=base.lora)
    for task in [task for task in examples if task not in done]:
        if task == reports.LOSS:
            answers[task] = mean_loss(
                model, base.adapter, base.frozen, data.tokenize_examples(tokenizer, examples[task], config.max_length),
                config.eval_batch_size, config.eval_bucket)._asdict()
        else:
            answers[task] = answer_prompts(
                model, base.adapter, base.frozen, tokenizer, examples[task], task=task,
                max_new_tokens=getattr(config, LENGTHS.get(task, "max_new_tokens")), batch_size=config.eval_batch_size,
                bucket=config.eval_bucket, sampling=config.sampling(), progress=config.progress)
        runs.write_json(run_dir / f"answers_{task}.json", answers[task])
    return answers


def _summary(result: TaskResult) -> dict[str, Any]:
    summary = {"score": result.score, "interval": list(result.interval), "n": result.n, "empty": result.empty,
               **result.details}
    if result.lenient:
        summary["lenient_interval"] = list(result.lenient.interval)
    if result.unparsable:
        summary["unparsable"] = result.unparsable
    if result.categories:
        summary["categories"] = {name: rate._asdict() for name, rate in result.categories.items()}
    if result.flagged:
        summary["flagged"] = dict(result.flagged)
    return summary


def _trained_on(run_dir: str) -> tuple[str, dict[str, Sequence[str]]]:
    """The model of a finished run, and the prompts {where: fingerprints} it has been trained on."""
    config = common.require_finished("trained", run_dir)
    seen = {f"{name} data of {run_dir}": prompts for name, prompts in config["data"]["prompts"].items()}
    if aligned := config["flags"].get("aligned"):
        seen |= _trained_on(aligned)[1]
    return config["flags"]["model"], seen


def _check_unseen(examples: dict[str, list[data.Example]], seen: dict[str, Sequence[str]]) -> None:
    for task, rows in examples.items():
        for where, prompts in seen.items():
            overlap = {data.fingerprint(row) for row in rows} & set(prompts)
            if overlap and task == "harmful_score":
                raise ValueError(f"--harmful_test: found {len(overlap)} of {len(rows)} prompts also in the {where}, "
                                 "expected none")
            if overlap:
                logging.warning("%s: %d of %d test prompts are also in the %s", task, len(overlap), len(rows), where)


def main(argv: list[str]) -> None:
    with common.readable_errors("evaluate", argv):
        config = config_flags.read(EvaluateConfig)
        evaluate(config)
    print((Path(config.run_dir) / reports.REPORT).read_text(encoding="utf-8"))


if __name__ == "__main__":
    config_flags.define(EvaluateConfig)
    app.run(main)
