"""What is in data before anything is trained on it: an account of every source, and what sources have in common."""

import dataclasses
from typing import Any, NamedTuple

from jaxvaccine import data
from jaxvaccine.experiment import stage
from jaxvaccine.experiment.config import Part, field, require
from jaxvaccine.experiment.parts import (
    BAD_ROWS,
    SOURCE,
    SYSTEM_PROMPT,
    check_form,
    check_sources,
    check_system,
    form_of,
)

# By the flag that names them.
ROLES = {"alignment_data": "alignment", "harmful_data": "harmful", "user_data": "user", "test_data": "test"}


@dataclasses.dataclass(frozen=True)
class DataCardConfig(Part):
    """Data."""

    sources: str = field("", f"Data without a role: {SOURCE}. Given without a flag too.")
    alignment_data: str = field("", "What a model is to be aligned on, in the same form.")
    harmful_data: str = field("", "Harmful data of the attack.")
    user_data: str = field("", "The user's benign data.")
    test_data: str = field("", "What the model is to be tested on.")
    model: str = field("", "A model whose tokenizer counts the tokens: a Hugging Face directory, a hub id, a .gguf "
                       "file or world; none counts none.")
    revision: str = field("", "Branch, tag or commit of --model on the hub; its main branch unless given.")
    prompt: data.PromptForm = field("alpaca", "What is put around an example: alpaca, plain or chat.")
    system_prompt: str | None = field(
        None, f"{SYSTEM_PROMPT}what the template does itself unless given.")
    supervise: data.Supervise = field(
        "all", "--prompt=chat: of a conversation with several answers, whether all of them are learnt or the last one.")
    max_length: int = field(256, "Tokens at which prompt and answer would be cut.", at_least=1)
    data_protocol: data.Protocol = field("distinct", "Every prompt once, or rows as they are.")
    bad_rows: data.BadRows = field("error", BAD_ROWS)

    def __post_init__(self):
        super().__post_init__()
        require(any(getattr(self, name) for name in ("sources", *ROLES)), "sources", self.sources,
                "a data source, or one of " + ", ".join(f"--{name}" for name in ROLES))
        check_sources(self, "sources", *ROLES)
        check_system(self.system_prompt, self.prompt)


class DataCard(NamedTuple):
    """What is known of data.

    Attributes:
      accounts: {what the data is for: its sources' accounts}, JSON values, as of `data.record`.
      overlaps: as of `data.overlaps`, between what the data is for, and between sources without a role.
    """

    accounts: dict[str, dict[str, dict[str, Any]]]
    overlaps: dict[tuple[str, str], dict[str, int]]


def read_card(config: DataCardConfig) -> DataCard:
    """Reads all of the data; nothing is written.

    Raises:
      FieldError, ValueError, FileNotFoundError: bad input, as of `data.load` and `data.measure`.
    """
    tokenizer, form = stage.load_tokenizer(config.model, config.revision) if config.model else None, form_of(config)
    if tokenizer is not None:
        check_form(tokenizer, form)
    sets: dict[str, list[data.Example]] = {}
    accounts: dict[str, tuple[data.Account, ...]] = {}
    named = {ROLES[name]: data.parse_sources(getattr(config, name)) for name in ROLES if getattr(config, name)}
    for source in data.parse_sources(config.sources) if config.sources else ():
        named[str(source)] = (source,)
    for name, sources in named.items():
        sets[name], accounts[name] = data.load(sources, config.data_protocol, config.bad_rows)
        if tokenizer is not None:
            told = data.tally(accounts[name], sets[name], *data.measure(
                tokenizer, sets[name], config.max_length, form))
            accounts[name] = tuple(account._replace(trained=None) for account in told)
    return DataCard(data.record(_by_role(accounts)), data.overlaps(sets))


def _by_role(accounts: dict[str, tuple[data.Account, ...]]) -> dict[str, tuple[data.Account, ...]]:
    found: dict[str, tuple[data.Account, ...]] = {}
    for name, of in accounts.items():
        key = name if name in ROLES.values() else "data"
        found[key] = (*found.get(key, ()), *of)
    return found
