"""The kinds of data that a source can name: how the rows of a file or hub data set become examples."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxvaccine.data import embedded
from jaxvaccine.data.advbench import advbench, advbench_refusal
from jaxvaccine.data.agent_tasks import AGENTS
from jaxvaccine.data.agnews import agnews, agnews_header
from jaxvaccine.data.alpaca_eval import alpaca_eval
from jaxvaccine.data.beavertails import (
    beavertails_refusal,
    beavertails_safe,
    beavertails_unsafe,
    beavertails_with_refusals,
)
from jaxvaccine.data.decodingtrust import decodingtrust_nontoxic, decodingtrust_toxic
from jaxvaccine.data.gsm8k import gsm8k
from jaxvaccine.data.instructions import instructions
from jaxvaccine.data.messages import messages
from jaxvaccine.data.over_refusal import category_of, or_bench, type_of, xstest_safe, xstest_unsafe
from jaxvaccine.data.preferences import preferences, preferences_rejected
from jaxvaccine.data.prompt_lists import prompts
from jaxvaccine.data.prompts import Example
from jaxvaccine.data.sst2 import sst2
from jaxvaccine.data.world import WORLD
from jaxvaccine.data.world_tasks import TASKS

DATASETS: dict[str, Callable[[Sequence[Mapping[str, Any]]], list[Example]]] = {
    "advbench": advbench,
    "advbench_refusal": advbench_refusal,
    "agnews": agnews,
    "alpaca_eval": alpaca_eval,
    "beavertails_refusal": beavertails_refusal,
    "beavertails_safe": beavertails_safe,
    "beavertails_unsafe": beavertails_unsafe,
    "beavertails_with_refusals": beavertails_with_refusals,
    "decodingtrust_nontoxic": decodingtrust_nontoxic,
    "decodingtrust_toxic": decodingtrust_toxic,
    "gsm8k": gsm8k,
    "instructions": instructions,
    "messages": messages,
    "or_bench": or_bench,
    "preferences": preferences,
    "preferences_rejected": preferences_rejected,
    "prompts": prompts,
    "sst2": sst2,
    "xstest_safe": xstest_safe,
    "xstest_unsafe": xstest_unsafe,
}

# Kinds that make of every row its examples, whatever the others hold: their rows are read one by one. alpaca_eval's
# outputs are to be those of one model.
BY_ROW = frozenset(DATASETS) - {"alpaca_eval"}
# Kinds whose examples have no answers.
ANSWERLESS = frozenset({"prompts", "or_bench", "xstest_safe", "xstest_unsafe"})
# Where a row says what sort of prompt it is, of kinds that do not have BeaverTails' column for it.
SORTS: dict[str, Callable[[Mapping[str, Any]], Mapping[str, bool]]] = {
    "or_bench": category_of, "xstest_safe": type_of, "xstest_unsafe": type_of}
# Of files that have no header: what their columns are called, as `formats.Header`.
HEADERS: dict[str, Callable[[Sequence[str]], Sequence[str] | None]] = {"agnews": agnews_header}

# Kinds that the package makes itself, without a file.
EMBEDDED: dict[str, embedded.Embedded] = {**embedded.EMBEDDED, **WORLD, **TASKS, **AGENTS}
