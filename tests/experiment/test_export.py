"""What a run left, for others to serve: the same logits by transformers and by PEFT, all of it or nothing."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from jaxvaccine import harness
from jaxvaccine.checkpoints.hugging_face import load_model
from jaxvaccine.experiment import export as module
from jaxvaccine.experiment.config import FieldError, make
from jaxvaccine.experiment.evaluate import evaluate
from jaxvaccine.experiment.export import ExportConfig, export
from jaxvaccine.json_files import read_json, write_json
from jaxvaccine.llama import hidden_states, token_logits
from jaxvaccine.report.model_card import model_card
from tests import rounding
from tests.experiment.small_world import evaluate_config

pytestmark = pytest.mark.usefixtures("quick_compile")


def write(aligned, directory, card=lambda found: "a card", **given) -> Path:
    trained = given.pop("trained", aligned.run.run_dir)
    return export(make(ExportConfig, {"trained": str(trained), "directory": str(directory), **given}), card)


def tensors(directory):
    found = {}
    with safe_open(directory / "model.safetensors", framework="flax") as opened:
        for name in opened.keys():  # noqa: SIM118
            found[name] = opened.get_tensor(name)
    return found


def test_transformers_and_peft_load_it(aligned, tmp_path):
    """Merged in float32 it is the adapter on the base, merged in bfloat16 that sum rounded once."""
    torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))
    whole = write(aligned, tmp_path / "float32")
    half = write(aligned, tmp_path / "bfloat16", dtype="bfloat16")
    beside = write(aligned, tmp_path / "adapter", form="adapter")
    ids = np.random.default_rng(0).integers(0, 60, (2, 12))

    def logits(model):
        with torch.no_grad():
            return model(torch.from_numpy(ids)).logits.numpy()

    adapted = logits(peft.AutoPeftModelForCausalLM.from_pretrained(beside))
    merged = transformers.AutoModelForCausalLM.from_pretrained(whole)
    config = load_model(whole)[0].config
    np.testing.assert_allclose(logits(merged), adapted, rtol=0, atol=rounding.forward(config, adapted))
    bare = logits(transformers.AutoModelForCausalLM.from_pretrained(aligned.model.model))
    assert np.abs(bare - adapted).max() > 100 * rounding.forward(config, adapted), "the adapter does something"

    exact, rounded = tensors(whole), tensors(half)
    assert exact.keys() == rounded.keys()
    for name, value in rounded.items():
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(value, exact[name].astype(jnp.bfloat16))
    assert transformers.AutoModelForCausalLM.from_pretrained(half, dtype="auto").dtype == torch.bfloat16
    model, frozen = load_model(half, dtype="float32")
    ours = token_logits(model, frozen, hidden_states(model, None, frozen, ids, np.ones_like(ids)))
    theirs = logits(transformers.AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=rounding.forward(config, theirs))


def test_the_harness_reads_runs_and_exports_alike(aligned, tmp_path):
    """The run by its folder, its adapter as PEFT's, and the merged model: one log-likelihood, and not the base's."""
    run, rows = aligned.run.run_dir, [([5, 6, 7], [8, 9])]
    (found,), *others, (bare,) = (harness.score(harness.load(*given), rows) for given in (
        ("", run), (aligned.model.model, str(write(aligned, tmp_path / "adapter", form="adapter"))),
        (str(write(aligned, tmp_path / "merged")),), (aligned.model.model,)))
    for (other,) in others:
        np.testing.assert_allclose(other[0], found[0], rtol=1e-5)
    assert abs(bare[0] - found[0]) > 1e-3 * abs(found[0])


def test_what_lies_in_the_folders(aligned, tmp_path):
    for form in ("merged", "adapter"):
        folder = write(aligned, tmp_path / form, form=form, base_name="owner/base")
        assert (folder / "tokenizer.json").read_bytes() == (Path(aligned.model.model) / "tokenizer.json").read_bytes()
        assert (folder / "README.md").read_text() == "a card"
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert read_json(tmp_path / "adapter" / "adapter_config.json")["base_model_name_or_path"] == "owner/base"
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "adapter"}


def test_a_float16_model_keeps_its_digits(aligned, tmp_path, monkeypatch):
    """It is trained as bfloat16, and not written as that."""
    monkeypatch.setattr(module.hugging_face, "stored_dtype", lambda directory: "float16")
    for name, value in tensors(write(aligned, tmp_path / "left")).items():
        assert value.dtype == jnp.float16, name


@pytest.mark.parametrize("given, message", [
    ({"trained": ""}, "trained: found '', expected the folder of a run"),
    ({"form": "adapter", "dtype": "bfloat16"}, "dtype: found 'bfloat16', expected none with --form=adapter"),
    ({"directory": ""}, "directory: found ''")])
def test_what_is_refused_at_once(aligned, tmp_path, given, message):
    with pytest.raises(FieldError, match=message):
        make(ExportConfig, {"trained": aligned.run.run_dir, "directory": str(tmp_path / "left"), **given})


def test_nothing_is_overwritten_or_left_half(aligned, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(FieldError, match=r"^directory: found .* nothing is overwritten"):
            write(aligned, tmp_path / name)
    assert (tmp_path / "full" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "mine"

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(module.hugging_face, "save_model", fail)
    with pytest.raises(OSError):
        write(aligned, tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "file"}
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    assert (write(aligned, tmp_path / "empty") / "model.safetensors").is_file()


def test_runs_that_leave_nothing(aligned, tmp_path):
    for name, script in (("begun", "align"), ("scores", "evaluate")):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "config.json", {"script": script, "flags": {}})
    for name, message in (("begun", "a run that has not finished"), ("scores", "expected a run of align or finetune")):
        with pytest.raises(FieldError, match=f"^trained: .*{message}"):
            write(aligned, tmp_path / "left", trained=tmp_path / name)
    with pytest.raises(FileNotFoundError):
        write(aligned, tmp_path / "left", trained=tmp_path / "nowhere")


def test_weights_beside_quantised_ones_are_not_merged(aligned, tmp_path, monkeypatch):
    found = module.inputs.require_finished("trained", aligned.run.run_dir)
    monkeypatch.setattr(module.inputs, "require_finished",
                        lambda *args: {**found, "flags": {**found["flags"], "quantisation": "nf4"}})
    with pytest.raises(FieldError, match=r"^form: found 'merged', expected adapter: it was trained beside nf4 weights"):
        write(aligned, tmp_path / "left")
    assert write(aligned, tmp_path / "left", form="adapter").is_dir()


def test_the_card_has_the_runs_scores(aligned, tmp_path):
    """Of evaluations beside the run and of those that are named; never those of another model."""
    scores = evaluate(evaluate_config(Path(aligned.run.run_dir).parent / "scores", trained=aligned.run.run_dir,
                                      sst2_test="", benign_test=""))
    other = evaluate_config(tmp_path / "other", model=aligned.model.model, sst2_test="", benign_test="", loss_data="")
    evaluate(other)
    folder = write(aligned, tmp_path / "left", model_card)
    card = (folder / "README.md").read_text()
    assert f"{scores['harmful_score']['score']:.1f}" in card and f"{scores['harmful_loss']['loss']:.4f}" in card
    assert "world\\_harmful@test\\[0:4\\]" in card and "aligned with SFT" in card and "Do not serve" not in card
    recorded = read_json(Path(aligned.run.run_dir) / "config.json")
    for digest in (recorded["data"]["hashes"]["alignment"],
                   recorded["data"]["inputs"]["model"]["weights"]["model.safetensors"]):
        assert digest in card
    assert f"jax {jax.__version__}" in card and str(tmp_path) not in card
    assert str(Path(aligned.model.model).parent) not in card, "nobody else has this machine's folders"
    with pytest.raises(FieldError, match=r"^scores: found .*other.*, expected one of"):
        write(aligned, tmp_path / "more", scores=(other.run.run_dir,))
    assert "base_model: \"model\"\n" in card
