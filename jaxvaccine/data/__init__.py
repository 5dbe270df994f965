"""Data: prompts, tokenising and batching; one small module per data set."""

from jaxvaccine.data.batching import batch_indices, bucket_length, check_batch, collate, steps_for, training_batches
from jaxvaccine.data.kinds import DATASETS, EMBEDDED
from jaxvaccine.data.pairing import harmless_answers
from jaxvaccine.data.poisoning import check_disjoint, fingerprint, poison
from jaxvaccine.data.prompts import Example, format_prompt
from jaxvaccine.data.sources import (
    DataSource,
    file_sha256,
    load_categories,
    load_examples,
    parse_sources,
    read_rows,
)
from jaxvaccine.data.tokenizer_files import eos_ids, load_tokenizer
from jaxvaccine.data.tokenizing import TokenizedExamples, check_vocabulary, encode_prompts, tokenize_examples

__all__ = [
    "DATASETS",
    "EMBEDDED",
    "DataSource",
    "Example",
    "TokenizedExamples",
    "batch_indices",
    "bucket_length",
    "check_batch",
    "check_disjoint",
    "check_vocabulary",
    "collate",
    "encode_prompts",
    "eos_ids",
    "file_sha256",
    "fingerprint",
    "format_prompt",
    "harmless_answers",
    "load_categories",
    "load_examples",
    "load_tokenizer",
    "parse_sources",
    "poison",
    "read_rows",
    "steps_for",
    "tokenize_examples",
    "training_batches",
]
