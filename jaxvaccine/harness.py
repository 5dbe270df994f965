"""lm-evaluation-harness with jaxvaccine's models: `python -m jaxvaccine.harness --model=jaxvaccine …`, all else as of
`lm_eval`.

The harness finds models that others wrote in no entry point, as of 0.4.13: it is started from here, where the model is
registered. lm_eval is the extra `lm_eval`; nothing else imports it.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxvaccine.checkpoints import hugging_face
from jaxvaccine.checkpoints.peft import CONFIG, load_adapter, read_lora_config
from jaxvaccine.data.tokenizer_files import eos_ids
from jaxvaccine.evaluation.answers import decode_text, find_stop, split_stop, tokens_to_stop
from jaxvaccine.evaluation.generate import generate
from jaxvaccine.evaluation.log_likelihood import log_likelihoods
from jaxvaccine.evaluation.sampling import Sampling
from jaxvaccine.experiment import inputs, runs, stage

NAME = "jaxvaccine"
MAX_GEN_TOKS = 256  # hf's
DTYPES = ("checkpoint", "float32", "bfloat16", "float16")
DRAWS = frozenset({"temperature", "top_k", "top_p", "do_sample"})


@dataclasses.dataclass(frozen=True)
class Served:
    """A model with its tokenizer, and how it is asked.

    Attributes:
      model, adapter, frozen: as of `generate`.
      tokenizer: the model's.
      name: what it was loaded by.
      batch_size: rows computed together.
      seed: of what is drawn.
      max_length: longest row, in tokens.
    """

    model: Any
    adapter: Any
    frozen: Any
    tokenizer: Any
    name: str
    batch_size: int
    seed: int
    max_length: int


def load(pretrained: str = "", adapter: str = "", *, dtype: str = "checkpoint", revision: str = "",
         batch_size: int | str = 16, max_length: int | None = None, seed: int = 0) -> Served:
    """A model by itself, with a PEFT adapter, or as a run left it.

    Args:
      pretrained: directory, hub id or GGUF file; the run's own unless given.
      adapter: a PEFT directory, or the folder of a finished run.
      dtype: as of `evaluate`.
      revision: of a hub id.
      batch_size: rows computed together; "auto" is 16.
      max_length: of a context with its continuation; the model's positions unless given.
      seed: of drawn answers.

    Raises:
      ValueError, FileNotFoundError: neither model nor run, another model than the run's, an unknown dtype, or as of
        `load_model`, `load_adapter` and `require_finished`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
    size = 16 if str(batch_size).startswith("auto") else int(batch_size)
    if size < 1:
        raise ValueError(f"batch_size: found {batch_size!r}, expected at least 1")
    run = bool(adapter) and (Path(adapter).expanduser() / runs.CONFIG).is_file() and not (
        Path(adapter).expanduser() / CONFIG).is_file()
    if not pretrained and not run:
        raise ValueError("pretrained: found none, expected a model, or the folder of a run as adapter, which "
                         f"{adapter!r} is not")
    if run:
        config = inputs.require_finished("adapter", adapter)
        flags = config["flags"]
        pretrained, revision = pretrained or flags["model"], revision or flags.get("revision", "")
        base = stage.load_base(pretrained, dtype, adapter, revision=revision,
                               quantisation=runs.flag(config, "quantisation"))
    else:
        base = stage.load_base(pretrained, dtype, revision=revision)
        if adapter:
            lora = read_lora_config(adapter)
            base = base._replace(lora=lora, adapter=load_adapter(adapter, base.model.clone(lora=lora)))
    own = inputs.model_dir(adapter) if run and inputs.left_model(adapter) else hugging_face.resolve_model(
        pretrained, revision or None)
    tokenizer = stage.load_tokenizer(str(own))
    limit = base.model.config.max_position_embeddings
    if max_length is not None and not 1 <= int(max_length) <= limit:
        raise ValueError(f"max_length: found {max_length!r}, expected 1 to the model's positions, {limit}")
    return Served(base.model.clone(lora=base.lora), base.adapter, base.frozen, tokenizer, adapter or pretrained, size,
                  int(seed), int(max_length or limit))


def encode(served: Served, text: str, special: bool | None = None) -> list[int]:
    """Token ids as hf's model has them: what the tokenizer puts around a text, but BOS no second time."""
    if special is None:
        bos = served.tokenizer.bos_token
        special = not (bos and text.startswith(bos))
    return served.tokenizer.encode(text, add_special_tokens=special)


def score(served: Served, rows: Sequence[tuple[Sequence[int], Sequence[int]]], progress: bool = False
          ) -> list[tuple[float, bool]]:
    """(log p, greedy) of (context, continuation); a context that is too long loses its beginning, as hf's does.

    Raises:
      ValueError: a continuation that is longer than the model's positions.
    """
    cut = []
    for context, continuation in rows:
        if len(continuation) > served.max_length:
            raise ValueError(f"continuation: found {len(continuation)} tokens, expected at most {served.max_length}")
        room = served.max_length + 1 - len(continuation)
        cut.append((np.asarray(context[-room:], np.int32), np.asarray(continuation, np.int32)))
    found = log_likelihoods(served.model, served.adapter, served.frozen, cut, batch_size=served.batch_size,
                            progress=progress)
    return [(of.log_p, of.greedy) for of in found]


def answer(served: Served, contexts: Sequence[str], until: Sequence[str], max_gen_toks: int,
           draws: Mapping[str, Any], progress: bool = False) -> list[str]:
    """What the model writes behind each text, without the first stop string and what follows it.

    Raises:
      ValueError: no room for a context beside max_gen_toks, or a setting of drawing that is none of ours.
    """
    if unknown := sorted(set(draws) - DRAWS):
        raise ValueError(f"generation_kwargs: found {unknown[0]!r}, expected some of until, max_gen_toks, "
                         + ", ".join(sorted(DRAWS)))
    room = served.max_length - max_gen_toks
    if room < 1:
        raise ValueError(f"max_gen_toks: found {max_gen_toks}, expected fewer than the model's positions, "
                         f"{served.max_length}")
    sampled = draws.get("do_sample", draws.get("temperature", 0) > 0)
    sampling = Sampling(float(draws.get("temperature", 1.0)), int(draws.get("top_k") or 0),
                        float(draws.get("top_p") or 1.0), served.seed) if sampled else Sampling()
    prompts = [np.asarray(encode(served, text)[-room:], np.int32) for text in contexts]
    of_stop, stop = split_stop(served.tokenizer, [text for text in until if text])

    def stops(number: int, ids: np.ndarray, seen: int) -> int | None:
        return tokens_to_stop(served.tokenizer, ids, stop, 0, seen)

    found = generate(served.model, served.adapter, served.frozen, prompts, max_new_tokens=max_gen_toks,
                     eos_ids=(*eos_ids(served.tokenizer), *of_stop), batch_size=served.batch_size, sampling=sampling,
                     progress=progress, stops=stops if stop else None)
    texts = [decode_text(served.tokenizer, ids) for ids in found]
    return [text[:find_stop(text, stop)] for text in texts]


@functools.cache
def model_class() -> type:
    """The harness's model, registered as "jaxvaccine".

    Raises:
      ImportError: lm_eval is not installed.
    """
    try:
        from lm_eval import utils
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
        from lm_eval.models.utils import normalize_gen_kwargs
    except ImportError as error:
        raise ImportError("jaxvaccine.harness: found no lm_eval, expected it: pip install 'jaxvaccine[lm_eval]'"
                          ) from error

    @register_model(NAME)
    class JaxVaccineLM(TemplateLM):
        """--model_args pretrained=…,adapter=…,dtype=…,revision=…,max_length=…,seed=…, as of `load`."""

        def __init__(self, pretrained: str = "", adapter: str = "", batch_size: int | str = 16,
                     max_batch_size: Any = None, device: Any = None, **given: Any):
            super().__init__()
            # JAX chooses the device, and a batch is as large as it is told to be.
            del max_batch_size, device
            self.served = load(pretrained, adapter, batch_size=batch_size, **given)
            self.tokenizer = self.served.tokenizer

        @property
        def eot_token_id(self) -> int:
            return self.tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            bos = self.tokenizer.bos_token_id
            return self.eot_token_id if bos is None else bos

        @property
        def tokenizer_name(self) -> str:
            return self.served.name.replace(os.sep, "__")

        @property
        def max_length(self) -> int:
            return self.served.max_length

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return encode(self.served, string, add_special_tokens)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt)

        def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
                                  ) -> list[tuple[float, bool]]:
            found = score(self.served, [pair for _, *pair in requests], not disable_tqdm)
            for (asked, *_), of in zip(requests, found, strict=True):
                if asked is not None:
                    self.cache_hook.add_partial("loglikelihood", asked, of)
            return found

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            windows = [[utils.make_disjoint_window(window) for window in utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1)] for request in requests]
            rest = iter(score(self.served, [window for of in windows for window in of], not disable_tqdm))
            found = [sum(next(rest)[0] for _ in of) for of in windows]
            for request, of in zip(requests, found, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, of)
            return found

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            groups: dict[str, list[int]] = {}
            for i, request in enumerate(requests):
                groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
            texts = [""] * len(requests)
            for numbers in groups.values():
                given = dict(normalize_gen_kwargs(requests[numbers[0]].args[1], MAX_GEN_TOKS))
                until, most = given.pop("until"), given.pop("max_gen_toks")
                found = answer(self.served, [requests[i].args[0] for i in numbers], until, most, given,
                               not disable_tqdm)
                for i, text in zip(numbers, found, strict=True):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
            return texts

    return JaxVaccineLM


def main() -> None:
    """`lm_eval`'s command line, with our model among its models."""
    try:
        model_class()
    except ImportError as error:
        sys.exit(str(error))
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
