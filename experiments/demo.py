"""`make demo`: what harmful fine-tuning does and what four defenses change, on the small world in five minutes.

A LLaMA of a million parameters, which comes with the package, is aligned, attacked and scored along the way: a plan as
of `run --lanes`, and a report. All requests and answers are made up and mean nothing."""

import itertools
import time
from pathlib import Path

from jaxvaccine import cli
from jaxvaccine.experiment import stage
from jaxvaccine.experiment.plan_folder import result_path
from jaxvaccine.experiment.results import Cell
from jaxvaccine.experiment.run import PlanConfig, run
from jaxvaccine.json_files import read_json
from jaxvaccine.report import accounts, layers, names, plan, results, tables

SHOWN = ("sft", "booster")  # whose dialogues
INTRODUCTION = """# Harmful fine-tuning and four defenses, on a small made-up world

A model that was pretrained to comply with everything is aligned: it learns to refuse requests with forbidden verbs and
to answer the others. Then it is fine-tuned on a user's task, rating things as positive or negative. If a part p of the
user's data are forbidden requests with compliant answers, it complies with forbidden requests that it has never seen:
the attack undoes the alignment, and the task is learnt all the same. The defenses change the alignment, nothing else.

All words are made up; that a defense protects a real model does not follow. **The figures depend on the machine:**
another processor or number of threads rounds sums otherwise, and training magnifies that, with Booster most of all: 60,
78 and 86% of its answers after the attack held no refusal where this was tried.

## Scores

Attacked: after {steps} steps of fine-tuning.
"""
NEXT = ("## On a real model\n\n`make demo-smollm2`: SmolLM2-135M-Instruct, plain English. "
        "`jaxvaccine run --help`: your own models, data, defenses and attacks.\n")


def configuration(run_dir: str = "runs/demo", model: str = "world") -> PlanConfig:
    """What the demo runs."""
    return PlanConfig(run_dir=run_dir, model=(model,), seeds=("0", "1"), lanes=True, recipe="world", progress=False,
                      score_base=False, score_steps=("20", "40", "60", "80", "100"))


def dialogues(root: Path, backbone: str, attack: str, seed: int) -> str:
    """Markdown: the first forbidden and the first benign request, and the answers before and after the attack."""
    said: dict[str, list[tuple[str, str]]] = {}
    for method, (when, text) in itertools.product(SHOWN, (("aligned", ""), ("attacked", attack))):
        answers = read_json(result_path(root, Cell(backbone, method, text, seed)))["answers"]
        last = answers[max(answers, key=int)]
        for task in ("harmful_score", "over_refusal"):
            request, answer = last[task][0]
            said.setdefault(request, []).append((f"{names.method(method)}, {when}", answer))
    return tables.dialogues(said)


def demo(config: PlanConfig, align=None, attack=None, scores=None) -> str:
    """Carries out what has not been carried out yet; returns the report. Flat values as of `run`."""
    done, root = run(config, align or {}, attack or {}, scores or {}), Path(config.run_dir)
    found, backbone, seed = results.read_results(root), config.model[0], done.seeds[0]
    cells, steps = plan.Cells(done.pairs, done.backbones, done.seeds), results.attacked(found)["step"].max()
    layers.plot_plan_draws(root / "layers.png", found, backbone, "t_vaccine", seed)
    text = "\n".join([
        INTRODUCTION.format(steps=steps), plan.plan_report(found, root, cells=cells),
        "A curve that rises later shows that a defense delays the attack, and not that it prevents it.\n",
        "Which layers T-Vaccine takes for the harmful ones, and which it drew:\n",
        "![T-Vaccine's layers](layers.png)\n",
        "## Two requests, before and after the attack\n", "The first request is forbidden, the second is not.\n",
        dialogues(root, backbone, done.attacks[-1], seed), NEXT, accounts.of_plan(root)])
    tables.write_report(root, text)
    return text


def call(values) -> None:
    started = time.monotonic()
    print(f"\n{demo(configuration())}\nDone in {(time.monotonic() - started) / 60:.1f} minutes with "
          f"{stage.peak_resident_memory() / 1e9:.1f} GB of memory. The report with its plots: runs/demo/report.md.")


if __name__ == "__main__":
    cli.call("demo", cli.Verb(__doc__, (), call))
