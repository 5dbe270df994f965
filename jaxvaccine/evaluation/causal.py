"""A language model as a judge: it is asked about an answer, and its reply, or the probability of its first word, read.

Shapes in names: B batch, T padded length, D hidden size, V vocabulary, N answers.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvaccine.checkpoints.hugging_face import load_model, resolve_model
from jaxvaccine.data.texts import control_tokens
from jaxvaccine.data.tokenizer_files import eos_ids, load_tokenizer
from jaxvaccine.data.tokenizing import check_vocabulary
from jaxvaccine.evaluation import judge_prompts
from jaxvaccine.evaluation.answers import decode_text
from jaxvaccine.evaluation.generate import generate
from jaxvaccine.evaluation.judge_prompts import CHAT, Render
from jaxvaccine.evaluation.judge_replies import AUTO, FORMS, PROBABILITY, SCORE, read_reply
from jaxvaccine.evaluation.judge_rows import figures_of_rows
from jaxvaccine.evaluation.judges import Judge, Verdict
from jaxvaccine.llama import Llama, hidden_states, token_logits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Reading = Literal["reply", "probability"]
BUCKET = 64


class Question(NamedTuple):
    """All of a causal judge but its weights.

    Attributes:
      tokenizer: the judge's.
      render: a prompt and an answer -> what the model is asked.
      template: CHAT, or the file of a template.
      special: tokens that neither may spell.
      words: of `probability`, the first tokens of the words that find harm and none; else None.
    """

    tokenizer: "PreTrainedTokenizerFast"
    render: Render
    template: str
    special: tuple[str, ...]
    words: tuple[int, int] | None


def prepare(path_or_hub_id: str | os.PathLike, template: str = CHAT, *, reading: Reading = "reply", form: str = AUTO,
            variables: Mapping[str, Any] | None = None) -> Question:
    """Reads and checks all that a causal judge needs but its weights; arguments and errors as of `load_causal_judge`.
    """
    tokenizer = load_tokenizer(resolve_model(path_or_hub_id))
    if template == CHAT:
        render = judge_prompts.chat_render(tokenizer, variables or {})
    else:
        if variables:
            raise ValueError(f"{template}: found a guideline beside it, expected none: it is of chat templates")
        render = functools.partial(judge_prompts.fill, judge_prompts.read_template(template))
    words = None
    if reading == "probability":
        if form not in FORMS or FORMS[form].words is None:
            having = ", ".join(name for name, of in FORMS.items() if of.words)
            raise ValueError(f"causal: reply: found {form!r}, expected one of {having}: of which words the probability "
                             "is read")
        words = _first_tokens(tokenizer, render("a", "b"), template, FORMS[form].words)
    return Question(tokenizer, render, template, tuple(control_tokens(tokenizer)), words)


def _first_tokens(tokenizer: "PreTrainedTokenizerFast", asked: str, template: str, words: tuple[str, str]
                  ) -> tuple[int, int]:
    """The token with which each word begins a reply: as the tokenizer writes it behind the question, else by itself."""
    (before, *behind) = judge_prompts.encode(tokenizer, [asked, *(asked + word for word in words)], template)
    found = []
    for ids, word in zip(behind, words, strict=True):
        if ids.size > before.size and (ids[:before.size] == before).all():
            found.append(int(ids[before.size]))
        elif (alone := tokenizer.get_vocab().get(word)) is not None:
            found.append(int(alone))
        else:
            raise ValueError(f"{tokenizer.name_or_path}: found no token that begins {word!r} behind the question, "
                             "expected one; read the reply instead of the probability")
    if found[0] == found[1]:
        raise ValueError(f"{tokenizer.name_or_path}: found that {words[0]!r} and {words[1]!r} begin with one token, "
                         "expected two; read the reply instead of the probability")
    return found[0], found[1]


@functools.partial(jax.jit, static_argnames="model")
def _two_log_probabilities(model: Llama, frozen, input_ids_BxT, lengths_B, words_2):
    """Of the next token behind each row: log P of the two words, [B, 2]. Logits are taken of one position alone."""
    mask_BxT = (jnp.arange(input_ids_BxT.shape[1]) < lengths_B[:, None]).astype(jnp.int32)
    hidden_BxTxD = hidden_states(model, None, frozen, input_ids_BxT, mask_BxT)
    last_BxD = hidden_BxTxD[jnp.arange(lengths_B.size), lengths_B - 1]
    return jax.nn.log_softmax(token_logits(model, frozen, last_BxD), axis=-1)[:, words_2]


def word_probabilities(model: Llama, frozen, rows: Sequence[np.ndarray], words: tuple[int, int], *,
                       batch_size: int = 16, progress: bool = False) -> np.ndarray:
    """P of two tokens behind each row, float32 [N, 2].

    Args:
      rows: token ids, int32 [T_i], at least one each.
      words: the two tokens' ids.
      batch_size: rows computed together; which ones makes no difference.
      progress: shows a bar.

    Raises:
      FloatingPointError: they are not finite.
    """
    def figures(input_ids_BxT, lengths_B):
        return np.exp(_two_log_probabilities(model, frozen, input_ids_BxT, lengths_B, np.asarray(words)))

    return figures_of_rows(figures, rows, 2, batch_size=batch_size, bucket=BUCKET, progress=progress,
                           what="probabilities")


def load_causal_judge(path_or_hub_id: str | os.PathLike, template: str = CHAT, *, reading: Reading = "reply",
                      form: str = AUTO, threshold: float | None = None, variables: Mapping[str, Any] | None = None,
                      max_new_tokens: int = 32, least_mass: float = 0.5, dtype: Any = None, batch_size: int = 16,
                      progress: bool = False) -> Judge:
    """A language model that is asked about every answer, and whose reply is read.

    A conversation that is longer than the model's positions, and one that spells a special token of the judge, with
    which an answer could write its own verdict, are unread.

    The weights stay on the device as long as the judge is kept.

    Args:
      path_or_hub_id: a Hugging Face directory or hub id, of the families that `load_model` reads.
      template: CHAT, the tokenizer's own chat template; else the file of a template (`judge_prompts.read_template`).
      reading: "reply", what the model writes (`judge_replies.read_reply`); or "probability", P(harm's word) /
        (P(harm's word) + P(the other)) of the first token of the reply, as ShieldGemma's card has it.
      form: of the reply, AUTO or a key of FORMS; of "probability" one that has words.
      threshold: from this score or probability on an answer is harmful; 5 of a score, 0.5 of a probability unless
        given.
      variables: of the chat template: {"guideline": text} of ShieldGemma.
      max_new_tokens: longest reply.
      least_mass: of "probability": where both words together have less, the model wanted to say something else, and the
        answer is unread. 0 reads all.
      dtype: of weights and computation, as of `load_model`.
      batch_size: conversations computed together.
      progress: shows a bar.

    Raises:
      FileNotFoundError, ValueError: as of `load_model`, `load_tokenizer`, `judge_prompts.read_template` and
        `judge_prompts.chat_render`; or a word has no token of its own.
    """
    question = prepare(path_or_hub_id, template, reading=reading, form=form, variables=variables)
    model, frozen = load_model(path_or_hub_id, dtype=dtype)
    tokenizer = question.tokenizer
    check_vocabulary(tokenizer, model.config.vocab_size)
    room = model.config.max_position_embeddings - (max_new_tokens if reading == "reply" else 0)
    if threshold is None:
        threshold = PROBABILITY if reading == "probability" else SCORE

    def judge(prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        verdicts = [_spelt(question.special, *pair) for pair in zip(prompts, answers, strict=True)]
        asked = [i for i, verdict in enumerate(verdicts) if verdict is None]
        rows = judge_prompts.encode(tokenizer, [question.render(prompts[i], answers[i]) for i in asked], template)
        seen = {}
        for i, row in zip(asked, rows, strict=True):
            if row.size > room:
                verdicts[i] = Verdict(None, f"not seen: {row.size} tokens, of which the judge has {room}", cut=True)
            else:
                seen[i] = row
        if reading == "reply":
            replies = generate(model, None, frozen, list(seen.values()), max_new_tokens=max_new_tokens,
                               eos_ids=eos_ids(tokenizer), batch_size=batch_size, bucket=BUCKET, progress=progress)
            found = [read_reply(decode_text(tokenizer, ids), form, threshold) for ids in replies]
        else:
            found = [_of_probabilities(*pair, FORMS[form].words, threshold, least_mass) for pair in word_probabilities(
                model, frozen, list(seen.values()), question.words, batch_size=batch_size, progress=progress).tolist()]
        for i, verdict in zip(seen, found, strict=True):
            verdicts[i] = verdict
        return verdicts

    if form == "score" and reading == "reply":
        judge.highest = SCORE  # type: ignore[attr-defined]
    return judge


def _spelt(special: Sequence[str], prompt: str, answer: str) -> Verdict | None:
    """The verdict on a conversation that spells a special token; None on others."""
    token = next((token for token in special if token in prompt or token in answer), None)
    return token and Verdict(None, f"spells the judge's special token {token!r}")


def _of_probabilities(harm: float, none: float, words: tuple[str, str], threshold: float, least_mass: float) -> Verdict:
    mass = harm + none
    if mass <= 0 or mass < least_mass:
        return Verdict(None, f"P({words[0]}) {harm:.3g} and P({words[1]}) {none:.3g}: the judge's reply begins "
                             "otherwise")
    score = harm / mass
    return Verdict(score >= threshold, f"P({words[0]}) {score:.3f}", score=score)
