"""What an attack's rows become: ids, in their turns; and, where the attacker has candidates, those that he trains on.

The candidates are read and checked before anything is trained; the choice among them needs the weights."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxvaccine import data
from jaxvaccine.attacks import similar_rows
from jaxvaccine.defenses.base import LossFn
from jaxvaccine.experiment import runs
from jaxvaccine.experiment.align import Examples, tokenize
from jaxvaccine.experiment.attack_config import AttackData
from jaxvaccine.experiment.methods import OF_ADAPTERS, OF_ALL_WEIGHTS
from jaxvaccine.json_files import read_json, write_json
from jaxvaccine.llama import Llama

SELECTED = "selected.json"  # in the run's folder: which of the candidates it was


class PoisonedData(NamedTuple):
    """What an attack trains on.

    Attributes:
      examples: the user's data with the harmful part mixed in, n of them, all of which are trained on; with candidates
        in the place of benign rows, all of these.
      harmful: all harmful examples that the part was drawn from.
      poison_ratio: the part of the n examples that is harmful.
      accounts: of the sources, "user" and "harmful"; `trained` is what was drawn, None of candidates.
      shared: how many prompts what was drawn has in common with what the model was aligned on and with the test, as of
        `data.shared_prompts`.
      is_harmful: [N] bool, of the examples.
      n: how many are trained on.
    """

    examples: list[data.Example]
    harmful: list[data.Example]
    poison_ratio: float
    accounts: dict[str, tuple[data.Account, ...]]
    shared: dict[str, dict[str, Any]]
    is_harmful: np.ndarray
    n: int


class Candidates(NamedTuple):
    """Rows of which some are trained on.

    Attributes:
      rows: harmful ones, which all are, and benign candidates.
      poisoned: the same as examples.
      harmful: what the candidates are compared with.
      bucket: multiple, in tokens, to which a row is padded.
    """

    rows: data.TokenizedExamples
    poisoned: PoisonedData
    harmful: data.TokenizedExamples
    bucket: int


class Selection(NamedTuple):
    """Attributes:
      rows: [n] int, ascending: which of the candidates' rows are trained on.
      cosines: [candidates] float32, of the benign ones, in their order.
    """

    rows: np.ndarray
    cosines: np.ndarray


def tokenize_attack(tokenizer: Any, read: Examples, poisoned: PoisonedData, part: AttackData,
                    aligned_prompt: data.Prompt) -> tuple[dict[str, data.TokenizedExamples], Candidates | None]:
    """(the rows by name, candidates if there are any among the user's).

    The attacker's rows have his prompt, the user's among them his order; the provider's have the prompt that the model
    was aligned with.
    part: with nothing left open. Raises as `align.tokenize` does.
    """
    own = {name: rows for name, rows in read.items() if name != "alignment"}
    theirs = {name: rows for name, rows in read.items() if name == "alignment"}
    tokenized = tokenize(tokenizer, own, part) | {
        name: data.tokenize_examples(tokenizer, rows, part.max_length, aligned_prompt) for name, rows in theirs.items()}
    user = tokenized["user"]
    if part.order != "mixed":
        trained = [fate in ("kept", "cut") for fate in user.fates]
        tokenized["user"] = user._replace(
            turns=(poisoned.is_harmful[trained] == (part.order == "harmful_last")).astype(int))
    if part.user_rows != "similar":
        return tokenized, None
    harmful = data.tokenize_examples(tokenizer, poisoned.harmful, part.max_length, part.form)
    return tokenized, Candidates(tokenized["user"], poisoned, harmful, part.bucket)


def take(rows: data.TokenizedExamples, chosen: np.ndarray) -> data.TokenizedExamples:
    """Some of the rows, in the given order."""
    return rows.take(chosen)


def select(of: Candidates, model: Llama, adapter: Any, frozen: Any, loss_fn: LossFn | None = None) -> Selection:
    """All harmful rows, and of the benign ones as many as make n, whose gradient is most like the harmful examples'.

    loss_fn: the model's own unless given; the same function for several adapters compiles once.
    """
    loss_fn = loss_fn or answer_loss(model)

    def batches(rows: data.TokenizedExamples, chosen):
        for i in chosen:
            yield data.collate(rows, [i], data.bucket_length(len(rows.input_ids[i]), of.bucket))

    benign, harmful = np.flatnonzero(~of.poisoned.is_harmful), range(len(of.harmful.input_ids))
    direction = similar_rows.mean_gradient(loss_fn, adapter, frozen, batches(of.harmful, harmful))
    found = similar_rows.cosines(loss_fn, adapter, frozen, batches(of.rows, benign), direction)
    count = of.poisoned.n - int(of.poisoned.is_harmful.sum())
    chosen = np.union1d(np.flatnonzero(of.poisoned.is_harmful), benign[similar_rows.most_similar(found, count)])
    return Selection(chosen, found)


def answer_loss(model: Llama) -> LossFn:
    """The loss of a row's answer, of which `select` takes gradients: of an adapter, of a model without one of all
    weights."""
    return (OF_ALL_WEIGHTS if model.lora is None else OF_ADAPTERS).causal_lm(model.clone(microbatch_size=0))


def selected_in(run_dir: Path, of: Candidates, model: Llama, adapter: Any, frozen: Any) -> data.TokenizedExamples:
    """The rows that a run trains on: those of an earlier call in its folder, or chosen now and recorded there."""
    path = run_dir / SELECTED
    if not path.exists():
        write_json(path, record(of, select(of, model, adapter, frozen)))
    return take(of.rows, np.asarray(read_json(path)["rows"]))


def record(of: Candidates, selection: Selection) -> dict[str, Any]:
    """What is kept of a choice, JSON values: which rows, the hash of their examples, the accounts of the user's sources
    with what is trained on, and how like the harmful ones the chosen and all candidates are."""
    examples = [of.poisoned.examples[i] for i in selection.rows]
    counts = Counter(getattr(getattr(e, "account", None), "source", None) for e in examples)
    accounts = [account._replace(trained=counts[account.source]) for account in of.poisoned.accounts["user"]]
    benign = selection.rows[~of.poisoned.is_harmful[selection.rows]]
    place = np.cumsum(~of.poisoned.is_harmful) - 1
    chosen = selection.cosines[place[benign]]
    return {"rows": selection.rows.tolist(), "hash": runs.examples_hash(examples),
            "accounts": data.record({"user": accounts}), "candidates": len(selection.cosines),
            "cosine": {"of_chosen": float(chosen.mean()), "of_all": float(selection.cosines.mean())}}


def recorded_accounts(run_dir: str | Path) -> dict[str, Any]:
    """The accounts that a run has recorded, with what was chosen among candidates."""
    path, accounts = Path(run_dir) / SELECTED, runs.read_config(run_dir)["data"].get("accounts", {})
    return {**accounts, **read_json(path)["accounts"]} if path.exists() else accounts
