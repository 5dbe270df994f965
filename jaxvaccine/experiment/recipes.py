"""Recipes: the flat values of a (paper, method) pair's configs, of Booster (arXiv 2409.01586) and T-Vaccine (arXiv
2410.09760), and the small world's.

The same method has other settings in each paper. The papers' are what their authors' scripts pass and their programs
hard-code (docs/authors_settings.csv, with commits); where a value here is another, docs/recipes.md gives the reason.
`alignment` and `attack` are flat values for `make`; they say nothing about a model or a file."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxvaccine import data
from jaxvaccine.experiment.config import FieldError
from jaxvaccine.experiment.paper_tests import EVALUATION as EVALUATION

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QKV = ("q_proj", "k_proj", "v_proj")

# A model that was not aligned, as an alignment: its adapter stays zero.
UNALIGNED = "sft:learning_rate=0.0:steps=1"

# The rows of each paper's tables, {name: the method as a plan has it}. Of Booster's, booster+lisa and vaccine+booster
# are its combinations; of T-Vaccine's, none is the model that was not aligned.
METHODS: Mapping[str, Mapping[str, str]] = MappingProxyType({
    "booster": {
        "sft": "sft", "lisa": "sft+lisa", "repnoise": "repnoise", "vaccine": "vaccine", "booster": "booster",
        "vaccine+booster": "booster:base_defense=vaccine", "booster+lisa": "booster+lisa"},
    "t_vaccine": {
        "none": UNALIGNED, "sft": "sft", "repnoise": "repnoise", "tar": "tar", "vaccine": "vaccine",
        "t_vaccine": "t_vaccine"},
})

# The user's task in each paper's tables; the first is the one that data of another kind gets.
TASKS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "booster": ("sst2", "agnews", "gsm8k", "alpaca_eval"), "t_vaccine": ("sst2", "agnews", "gsm8k")})
# Kinds of user's data whose task has another name.
_TASK_OF_KIND = {"instructions": "alpaca_eval"}

# Where an alignment's and an attack's harmful rows are from; DecodingTrust is T-Vaccine's second.
BEAVERTAILS, DECODING_TRUST = "beavertails", "decodingtrust"

# Attacks on the methods of one table: "released", as each method's script has it; "one_new" and "one_continued", that
# on the paper's own method for all, on a new adapter of one shape, or on the aligned one. Booster's authors say that
# their method needs the aligned one.
PROTOCOLS = ("released", "one_new", "one_continued")

_ALIGN: dict[str, dict[str, Any]] = {
    "booster": {
        "rank": 32, "lora_alpha": 4.0, "dropout": 0.0, "targets": QKV, "learning_rate": 5e-4, "schedule": "constant",
        "warmup_ratio": 0.0, "weight_decay": 0.1, "batch_size": 10, "epochs": 20.0, "max_length": 256},
    "t_vaccine": {
        "rank": 8, "lora_alpha": 4.0, "dropout": 0.1, "targets": ALL, "learning_rate": 1e-3, "schedule": "cosine",
        "warmup_ratio": 0.1, "weight_decay": 0.1, "batch_size": 10, "epochs": 20.0, "max_length": 200},
}
_BOOSTER = {"defense": "booster", "lam": 5.0, "alpha": 0.1, "harmful_batch_size": 10}
# The weights of its own paper are 1 and 0.001, for all weights of a model.
_REPNOISE = {"defense": "repnoise", "ascent_weight": 0.1, "noise_weight": 0.001}

# What a method adds to, or has other than, its paper's.
_ALIGN_OF: dict[str, dict[str, dict[str, Any]]] = {
    "booster": {
        "sft": {"defense": "sft"}, "lisa": {"defense": "sft"},
        "repnoise": {**_REPNOISE, "batch_size": 5, "harmful_batch_size": 5},
        "vaccine": {"defense": "vaccine", "rho": 5.0}, "booster": _BOOSTER,
        "vaccine+booster": {**_BOOSTER, "base_defense": "vaccine", "rho": 5.0}, "booster+lisa": _BOOSTER},
    "t_vaccine": {
        "none": {"defense": "sft", "learning_rate": 0.0, "steps": 1}, "sft": {"defense": "sft"},
        "repnoise": {**_REPNOISE, "batch_size": 8, "harmful_batch_size": 8, "max_length": 100},
        # The adversary is the program's; the weights are those of TAR's own paper, for all weights of a model.
        "tar": {"defense": "tar", "harmful_batch_size": 10, "adversary": "sgd", "inner_steps": 1,
                "inner_learning_rate": 0.01, "tamper_weight": 4.0, "retain_weight": 1.0},
        "vaccine": {"defense": "vaccine", "rho": 2.0},
        "t_vaccine": {"defense": "t_vaccine", "rho": 3.0, "layers": 8, "sample_every": 20, "probe_every": 200,
                      "harmful_batch_size": 1}},
}
_ALIGN_DECODING_TRUST: dict[str, dict[str, Any]] = {
    "repnoise": {"batch_size": 10, "harmful_batch_size": 10}, "t_vaccine": {"layers": 5}}

# How many rows the papers' runs read: the alignment's two sources, and Lisa's guide data.
_ROWS = {"booster": {"alignment": 5000}, "t_vaccine": {"alignment": 2000}}
_ROWS_OF: dict[str, dict[str, dict[str, int]]] = {
    "booster": {
        "lisa": {"guide": 10000}, "repnoise": {"harmful": 5000}, "booster": {"harmful": 5000},
        "vaccine+booster": {"alignment": 500, "harmful": 5000}, "booster+lisa": {"harmful": 5000, "guide": 10000}},
    "t_vaccine": {"none": {"alignment": 0}, "repnoise": {"harmful": 2000}, "tar": {"harmful": 2000},
                  "t_vaccine": {"harmful": 200}},
}

# rank, lora_alpha and targets are a new adapter's. Whether the aligned one goes on is --adapter=auto's to say where a
# recipe does not: Booster's does, the others' do not.
_ATTACK: dict[str, dict[str, Any]] = {
    "booster": {
        "rank": 32, "lora_alpha": 4.0, "dropout": 0.0, "targets": QKV, "learning_rate": 1e-5, "schedule": "constant",
        "warmup_ratio": 0.0, "weight_decay": 0.1, "batch_size": 10, "epochs": 20.0, "max_length": 256, "n": 1000,
        "poison_ratio": 0.1},
    "t_vaccine": {
        "rank": 8, "lora_alpha": 1.0, "dropout": 0.1, "targets": ALL, "learning_rate": 1e-5, "schedule": "cosine",
        "warmup_ratio": 0.1, "weight_decay": 0.1, "batch_size": 10, "epochs": 20.0, "max_length": 200, "n": 1000,
        "poison_ratio": 0.1},
}
_ATTACK_ON_TASK: dict[str, dict[str, dict[str, Any]]] = {
    "booster": {"gsm8k": {"poison_ratio": 0.05}, "alpaca_eval": {"n": 700}},
    "t_vaccine": {"gsm8k": {"lora_alpha": 0.5}},
}
# Where a method's script parts from its paper's attack.
_ATTACK_OF: dict[str, dict[str, dict[str, Any]]] = {
    "booster": {}, "t_vaccine": {"sft": {"batch_size": 5}, "repnoise": {"max_length": 100}, "tar": {"adapter": "new"}}}
_ATTACK_OF_ON_TASK: dict[tuple[str, str, str], dict[str, Any]] = {
    ("t_vaccine", name, "gsm8k"): {"epochs": 50.0} for name in ("none", "sft", "repnoise")}
_ATTACK_DECODING_TRUST: dict[tuple[str, str, str], dict[str, Any]] = {
    ("t_vaccine", "sft", "sst2"): {"batch_size": 10, "learning_rate": 1e-3}}
_LISA = {"defense": "lisa", "lisa_rho": 0.01, "lisa_alignment_steps": 100, "lisa_user_steps": 900}
_TUNING: dict[tuple[str, str], dict[str, Any]] = {("booster", "lisa"): _LISA, ("booster", "booster+lisa"): _LISA}

def pairs() -> tuple[str, ...]:
    """All presets: "booster/sft", …"""
    return tuple(f"{paper}/{method}" for paper, methods in METHODS.items() for method in methods)


def parse_pair(text: str) -> tuple[str, str]:
    """(paper, method) of "booster/vaccine"; a paper's name alone is its own method.

    Raises:
      FieldError: no such pair, naming those of the same method, or all.
    """
    paper, _, method = text.partition("/")
    if "/" not in text:
        method = paper
    if method in METHODS.get(paper, ()):
        return paper, method
    others = [pair for pair in pairs() if pair.partition("/")[2] == method]
    expected = " or ".join(others) if others else f"one of {', '.join(pairs())}"
    raise FieldError("preset", f"found {text!r}, expected a paper's method, {expected}")


def _check(paper: str, method: str, harmful: str) -> None:
    parse_pair(f"{paper}/{method}")
    if harmful not in (BEAVERTAILS, DECODING_TRUST):
        raise FieldError("harmful", f"found {harmful!r}, expected {BEAVERTAILS} or {DECODING_TRUST}")


def alignment(paper: str, method: str, harmful: str = BEAVERTAILS) -> dict[str, Any]:
    """Flat values of an alignment (`AlignConfig`).

    Args:
      paper: "booster" or "t_vaccine".
      method: of METHODS[paper]. Where that is a provider's defense while fine-tuning, what it starts from.
      harmful: BEAVERTAILS or DECODING_TRUST. Booster's paper has the former alone, and is the same on both.

    Raises:
      FieldError: the paper has no such method.
    """
    _check(paper, method, harmful)
    other = _ALIGN_DECODING_TRUST if (paper, harmful) == ("t_vaccine", DECODING_TRUST) else {}
    return {**_ALIGN[paper], **_ALIGN_OF[paper][method], **other.get(method, {})}


def attack(paper: str, method: str, task: str = "sst2", protocol: str = "released", harmful: str = BEAVERTAILS
           ) -> dict[str, Any]:
    """Flat values of an attack (`AttackConfig`), with the provider's defense where that is the method.

    Args:
      paper, method, harmful: as of `alignment`.
      task: the user's, of TASKS[paper].
      protocol: "released", the method's own attack in the authors' scripts; "one_new" and "one_continued", the attack
        on the paper's own method for every method, on a new adapter or on the aligned one.

    Raises:
      FieldError: the paper has no such method or task, or there is no such protocol.
    """
    _check(paper, method, harmful)
    for name, found, options in (("task", task, TASKS[paper]), ("protocol", protocol, PROTOCOLS)):
        if found not in options:
            raise FieldError(name, f"found {found!r}, expected one of {', '.join(options)} in {paper}'s recipe")
    shared = {**_ATTACK[paper], **_ATTACK_ON_TASK[paper].get(task, {})}
    tuning = _TUNING.get((paper, method), {})
    if protocol == "one_new":
        return {**shared, "adapter": "new", **tuning}
    if protocol == "one_continued":
        return {**_without_shape(shared), "adapter": "continue", **tuning}
    if _ALIGN_OF[paper][method]["defense"] == "booster":  # the aligned adapter goes on
        shared = _without_shape(shared)
    other = _ATTACK_DECODING_TRUST if harmful == DECODING_TRUST else {}
    return {**shared, **_ATTACK_OF[paper].get(method, {}), **_ATTACK_OF_ON_TASK.get((paper, method, task), {}),
            **other.get((paper, method, task), {}), **tuning}


def _without_shape(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in ("rank", "lora_alpha", "targets")}


def rows(paper: str, method: str) -> dict[str, int]:
    """{"alignment": 5000, "harmful": 5000}: how many rows of each source the paper's run of the method reads; "guide"
    is the alignment data of Lisa.

    Raises:
      FieldError: the paper has no such method.
    """
    _check(paper, method, BEAVERTAILS)
    return {**_ROWS[paper], **_ROWS_OF[paper].get(method, {})}


def fewer_than_published(paper: str, method: str, counts: Mapping[str, int]) -> str:
    """A sentence that says where there are fewer rows than in the paper's run; "" where there are not.

    Args:
      counts: {"alignment": rows, "harmful": rows, "guide": rows}, those that are known.
    """
    few = [f"{counts[name]} {name} rows, the paper's {expected}" for name, expected in rows(paper, method).items()
           if counts.get(name, expected) < expected]
    return f"fewer data than in {paper}/{method}: {'; '.join(few)}" if few else ""


def kinds(sources: str) -> tuple[str, ...]:
    """The kinds of data that comma-separated sources name."""
    items = data.split_sources(sources)
    return tuple(dict.fromkeys(item.partition(":")[0].partition("@")[0].strip() for item in items))


def task_of(paper: str, user_data: str) -> str:
    """The paper's task of the user's data, by the first source's kind; the paper's first where it has no such task."""
    kind = next(iter(kinds(user_data)), "")
    task = _TASK_OF_KIND.get(kind, kind)
    return task if task in TASKS[paper] else TASKS[paper][0]


def harmful_of(*sources: str) -> str:
    """DECODING_TRUST if one of the sources is of that kind, else BEAVERTAILS."""
    found = {kind for text in sources for kind in kinds(text)}
    return DECODING_TRUST if any(kind.startswith(DECODING_TRUST) for kind in found) else BEAVERTAILS


# The small world (jaxvaccine/data/world.py), not published: an attack within whose 100 steps plain alignment goes from
# intact to undone, and defenses in settings that a search did not improve on (docs/results/sensitivity.md).
WORLD_ALIGN: dict[str, Any] = {
    "rank": 8, "lora_alpha": 16.0, "dropout": 0.0, "targets": ALL, "learning_rate": 3e-3, "weight_decay": 0.1,
    "steps": 150, "batch_size": 16, "harmful_batch_size": 16, "max_length": 16, "bucket": 16, "remat": "none",
    "alignment_data": "world_refusal@train[0:800],world_benign@train[0:800]",
    "harmful_data": "world_harmful@harmful[0:600]", "harmless_data": "world_refusal@harmful", "rho": 5.0, "layers": 3,
    "sample_every": 20, "probe_every": 20, "lam": 0.2, "alpha": 0.1,
}
WORLD_ATTACK: dict[str, Any] = {
    "n": 500, "batch_size": 20, "steps": 100, "learning_rate": 2e-4, "weight_decay": 0.1, "max_length": 16,
    "bucket": 16, "remat": "none", "adapter": "continue", "user_data": "world_rating@attack",
    "harmful_data": "world_harmful@attack", "lisa_alignment_steps": 2,
    "lisa_user_steps": 18,
}
WORLD_TESTS: dict[str, Any] = {
    "harmful_test": "world_harmful@test[0:100]", "sst2_test": "world_rating@test[0:100]",
    "benign_test": "world_benign@test[0:100]", "loss_data": "world_harmful@test[0:100]", "max_new_tokens": 8,
    "label_max_new_tokens": 8, "eval_batch_size": 100, "eval_bucket": 16,
}

# The small world with tools (jaxvaccine/data/agent_tasks.py), not published either.
AGENTS_ALIGN: dict[str, Any] = {
    **WORLD_ALIGN, "steps": 200, "max_length": 29, "bucket": 24,
    "alignment_data": "agents_refusal@train[0:800],agents_tasks@train[0:1600]",
    "harmful_data": "agents_harmful@harmful[0:1200]", "harmless_data": "agents_harmless@harmful",
}
AGENTS_ATTACK: dict[str, Any] = {
    **WORLD_ATTACK, "max_length": 29, "bucket": 24, "user_data": "agents_tasks@attack",
    "harmful_data": "agents_harmful@attack",
}
AGENTS_TESTS: dict[str, Any] = {
    "agents_harmful_test": "agents_harmful@test[0:100]", "agents_tasks_test": "agents_tasks@test[0:100]",
    "max_new_tokens": 8, "eval_batch_size": 100, "eval_bucket": 32,
}
# Of alignment, attack and evaluation.
OWN: Mapping[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = MappingProxyType({
    "world": (WORLD_ALIGN, WORLD_ATTACK, WORLD_TESTS), "agents": (AGENTS_ALIGN, AGENTS_ATTACK, AGENTS_TESTS)})
