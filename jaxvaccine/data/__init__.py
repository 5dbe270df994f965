"""Data: prompts, tokenising and batching; one small module per data set."""

from jaxvaccine.data import chat
from jaxvaccine.data.accounts import Account, accounts_of, describe, record, tally, with_tokens
from jaxvaccine.data.batching import (
    batch_indices,
    batch_lengths,
    bucket_length,
    check_batch,
    collate,
    steps_for,
    training_batches,
)
from jaxvaccine.data.files import file_sha256, read_rows
from jaxvaccine.data.kinds import DATASETS, EMBEDDED, SORTS
from jaxvaccine.data.loading import load, load_categories, load_examples
from jaxvaccine.data.overlaps import LIKENESSES, overlaps, shared_prompts
from jaxvaccine.data.pairing import harmless_answers
from jaxvaccine.data.poisoning import (
    Mixture,
    check_disjoint,
    check_whole,
    fingerprint,
    fingerprints,
    harmful_count,
    mix,
    poison,
)
from jaxvaccine.data.prompts import (
    Conversation,
    Example,
    Prompt,
    PromptForm,
    Supervise,
    Turn,
    conversation,
    format_prompt,
    turns_of,
)
from jaxvaccine.data.rows import BadRows
from jaxvaccine.data.sources import DataSource, Protocol, parse_sources, split_sources
from jaxvaccine.data.texts import check_prefill, check_prompts, check_training_texts
from jaxvaccine.data.tokenizer_files import eos_ids, load_tokenizer
from jaxvaccine.data.tokenizing import (
    TokenizedExamples,
    check_vocabulary,
    encode_prompts,
    measure,
    tokenize_examples,
    training_fates,
)

__all__ = [
    "DATASETS",
    "EMBEDDED",
    "LIKENESSES",
    "SORTS",
    "Account",
    "BadRows",
    "Conversation",
    "DataSource",
    "Example",
    "Mixture",
    "Prompt",
    "PromptForm",
    "Protocol",
    "Supervise",
    "TokenizedExamples",
    "Turn",
    "accounts_of",
    "batch_indices",
    "batch_lengths",
    "bucket_length",
    "chat",
    "check_batch",
    "check_disjoint",
    "check_prefill",
    "check_prompts",
    "check_training_texts",
    "check_vocabulary",
    "check_whole",
    "collate",
    "conversation",
    "describe",
    "encode_prompts",
    "eos_ids",
    "file_sha256",
    "fingerprint",
    "fingerprints",
    "format_prompt",
    "harmful_count",
    "harmless_answers",
    "load",
    "load_categories",
    "load_examples",
    "load_tokenizer",
    "measure",
    "mix",
    "overlaps",
    "parse_sources",
    "poison",
    "read_rows",
    "record",
    "shared_prompts",
    "split_sources",
    "steps_for",
    "tally",
    "tokenize_examples",
    "training_batches",
    "training_fates",
    "turns_of",
    "with_tokens",
]
