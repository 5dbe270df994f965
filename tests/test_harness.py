"""lm-evaluation-harness: the same figures as its own `hf` model of the same weights, on tasks of local files."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvaccine import harness, llama
from jaxvaccine.checkpoints.hugging_face import load_model
from jaxvaccine.checkpoints.peft import save_adapter
from jaxvaccine.evaluation.log_likelihood import log_likelihoods
from jaxvaccine.llama_config import LoraConfig
from tests.experiment.small_world import text_model

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return text_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter_dir(model_dir, tmp_path_factory):
    model, _ = load_model(model_dir, lora=LoraConfig(rank=2, alpha=4))
    generator = np.random.default_rng(3)
    adapter = jax.tree.map(lambda leaf: jnp.asarray(0.3 * generator.standard_normal(leaf.shape), leaf.dtype),
                           llama.tree_shapes(model)["lora"])
    return str(save_adapter(adapter, model, tmp_path_factory.mktemp("adapter") / "peft", model_dir))


ROWS = [([5, 6, 7], [8]), ([9], [3, 4, 5, 6, 7]), ([3] * 70, [4, 5]), ([7, 7], [9, 9, 9])]


def test_log_likelihoods_are_those_of_whole_rows(model_dir):
    """Beside the softmax over a row by itself, without padding and neighbours."""
    model, frozen = load_model(model_dir)
    found = log_likelihoods(model, None, frozen, ROWS, batch_size=3)
    for (context, continuation), of in zip(ROWS, found, strict=True):
        ids = np.asarray([context + continuation], np.int32)
        logits = llama.token_logits(model, frozen, llama.hidden_states(model, None, frozen, ids, np.ones_like(ids)))[0]
        log_p = jax.nn.log_softmax(logits)[len(context) - 1:-1]
        expected = sum(float(log_p[i, token]) for i, token in enumerate(continuation))
        np.testing.assert_allclose(of.log_p, expected, rtol=1e-5)
        assert of.greedy == (np.argmax(log_p, axis=-1).tolist() == continuation)
        best = [int(np.argmax(log_p[0]))]
        assert log_likelihoods(model, None, frozen, [(context, best)])[0].greedy


@pytest.mark.parametrize("row, message", [(([], [1]), "found 0 \\+ 1 tokens"), (([1], []), "found 1 \\+ 0 tokens"),
                                          (([1] * 512, [1, 1]), "found 512 \\+ 2 tokens, expected at most")])
def test_rows_that_are_refused(model_dir, row, message):
    model, frozen = load_model(model_dir)
    with pytest.raises(ValueError, match=f"^rows: row 1: {message}"):
        log_likelihoods(model, None, frozen, [ROWS[0], row])


def test_what_is_loaded(model_dir, adapter_dir, tmp_path):
    for given, message in (({}, "pretrained: found none"), ({"pretrained": model_dir, "dtype": "int8"}, "dtype: found"),
                           ({"pretrained": model_dir, "max_length": 513}, "max_length: found 513"),
                           ({"adapter": str(tmp_path)}, "pretrained: found none, .*which .* is not"),
                           ({"pretrained": model_dir, "batch_size": 0}, "batch_size: found 0")):
        with pytest.raises(ValueError, match=message):
            harness.load(**given)
    served = harness.load(model_dir, adapter_dir, max_length=20)
    assert served.model.lora.rank == 2 and served.max_length == 20
    with pytest.raises(ValueError, match="found 'num_beams', expected some of"):
        harness.answer(served, ["a"], [], 4, {"num_beams": 2})
    with pytest.raises(ValueError, match="max_gen_toks: found 20"):
        harness.answer(served, ["a"], [], 20, {})


def write_tasks(folder):
    """Two tasks on files: one of choices, one of answers."""
    choices = [{"question": f"Is lamp {i} on?", "choices": ["yes", "no, never", "perhaps"], "answer": i % 3}
               for i in range(7)]
    asked = [{"question": f"Polish the lamp {i}" * (1 + i % 3), "answer": "Done."} for i in range(5)]
    for name, rows in (("choices", choices), ("asked", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = "dataset_path: json\ntest_split: test\ndataset_kwargs:\n  data_files:\n    test: {}\n"
    (folder / "choices.yaml").write_text(
        "task: local_choices\noutput_type: multiple_choice\n" + common.format(folder / "choices.jsonl")
        + "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n")
    (folder / "asked.yaml").write_text(
        "task: local_asked\noutput_type: generate_until\n" + common.format(folder / "asked.jsonl")
        + "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs:\n  until: ['e', ' q']\n  max_gen_toks: 12\n  do_sample: false\n"
        "metric_list:\n  - metric: exact_match\n")


@pytest.mark.long
@pytest.mark.parametrize("adapted", [False, True])
def test_the_same_figures_as_hf(model_dir, adapter_dir, tmp_path, monkeypatch, adapted):
    lm_eval = pytest.importorskip("lm_eval")
    for name in ("torch", "accelerate", *(["peft"] if adapted else [])):
        pytest.importorskip(name)
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tasks(tmp_path)
    harness.model_class()
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    common = {"tasks": ["local_choices", "local_asked"], "task_manager": tasks, "batch_size": 3, "device": "cpu",
              "bootstrap_iters": 0}
    ours = lm_eval.simple_evaluate(model="jaxvaccine", model_args=f"pretrained={model_dir},dtype=float32" + (
        f",adapter={adapter_dir}" if adapted else ""), **common)
    theirs = lm_eval.simple_evaluate(model="hf", model_args=f"pretrained={model_dir},dtype=float32" + (
        f",peft={adapter_dir}" if adapted else ""), **common)
    for task in common["tasks"]:
        found, expected = (of["samples"][task] for of in (ours, theirs))
        assert len(found) == len(expected) > 4
        for one, two in zip(found, expected, strict=True):
            if task == "local_asked":
                assert one["resps"] == two["resps"]
                continue
            for mine, other in zip(one["resps"], two["resps"], strict=True):
                np.testing.assert_allclose(float(mine[0][0]), float(other[0][0]), rtol=1e-4)
                assert str(mine[0][1]) == str(other[0][1])
        figures = [{name: value for name, value in of["results"][task].items() if isinstance(value, float)}
                   for of in (ours, theirs)]
        assert figures[0] == figures[1] and figures[0]
    assert any(text for one in ours["samples"]["local_asked"] for text in one["resps"][0]), "answers are not all empty"


@pytest.mark.long
def test_rolling_windows_as_hf(model_dir):
    pytest.importorskip("lm_eval")
    pytest.importorskip("torch")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    texts = ["Polish the lamp.", "x" * 61, "Is it on? " * 9]
    asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    given = {"pretrained": model_dir, "dtype": "float32", "max_length": 20}
    ours = harness.model_class()(**given, batch_size=2).loglikelihood_rolling(asked, True)
    theirs = HFLM(**given, device="cpu", batch_size=2).loglikelihood_rolling(asked, True)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_without_lm_eval_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(harness, "model_class", harness.model_class.__wrapped__)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match="found no lm_eval, expected it: pip install"):
        harness.main()
