"""Alignments of a tiny model: what they write, how they go on, and what is said to bad input."""

import json
import shutil

import numpy as np
import pytest

import jaxvaccine.training as training
from jaxvaccine.data import Example, harmless_answers, load_tokenizer
from jaxvaccine.experiment.align import AlignConfig, align, prepare, tokenize
from jaxvaccine.experiment.config import FieldError, change, flat, make
from jaxvaccine.experiment.methods import Sft
from jaxvaccine.experiment.parts import OPERATIONAL, TokensPart
from jaxvaccine.json_files import read_json, write_json
from tests.experiment.small_world import align_config, metrics, recorded, text_model, weights

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_a_run(aligned):
    folder = aligned.run.run_dir
    assert [entry["step"] for entry in metrics(folder)] == [0, 1, 2]
    found = recorded(folder)
    assert found["script"] == "align"
    assert {**found["flags"], **found["operational"]} == {
        name: list(value) if isinstance(value, tuple) else value for name, value in flat(aligned).items()}
    assert found["operational"].keys() == flat(aligned).keys() & OPERATIONAL
    assert set(found["data"]["hashes"]) == set(found["data"]["prompts"]) == {"alignment"}
    assert len(found["data"]["prompts"]["alignment"]) == 24


@pytest.mark.parametrize("defense", ["repnoise", pytest.param("tar", marks=pytest.mark.long)])
def test_alignment_with_more_data(aligned, tmp_path, defense):
    """RepNoise's harmless answers and TAR's adversary; a run records what its method reads and nothing else."""
    given = {"harmless_data": "world_refusal@harmful[0:12]"} if defense == "repnoise" else {"inner_steps": 2}
    config = align_config(aligned.model.model, tmp_path / "run", defense=defense, steps=2, **given)
    align(config)
    found, steps = recorded(tmp_path / "run"), metrics(tmp_path / "run")
    if defense == "repnoise":
        assert steps[0]["ascent"] > 0 and steps[0]["noise"] > 0
        assert set(found["data"]["hashes"]) == {"alignment", "harmful", "harmless"}
        assert found["flags"]["noise_weight"] == 0.001 and "inner_steps" not in found["flags"]
    else:
        assert steps[0]["tamper_loss"] < 0 and steps[1]["hidden_distance"] > 0
        assert found["flags"]["adversary"] == "adamw" and "ascent_weight" not in found["flags"]
    assert weights(config.run.run_dir) != weights(aligned.run.run_dir)
    other = recorded(aligned.run.run_dir)["flags"]
    assert not {"ascent_weight", "inner_steps", "rho", "lam", "alpha", "layers", "base_defense", "freeze"} & set(other)


def test_a_few_rows_at_a_time(aligned, tmp_path):
    """The same run, and one that may go on with other microbatches."""
    config = align_config(aligned.model.model, tmp_path / "run", microbatch_size=3)
    align(config)
    np.testing.assert_allclose([step["loss"] for step in metrics(tmp_path / "run")],
                               [step["loss"] for step in metrics(aligned.run.run_dir)], rtol=1e-4)
    assert weights(tmp_path / "run") != weights(aligned.run.run_dir), "sums in another order"
    assert align(change(config, microbatch_size=2)) == tmp_path / "run"


def test_cudnn_on_a_cpu(aligned, tmp_path):
    with pytest.raises(FieldError, match="found 'cudnn', expected xla on a cpu") as error:
        align(align_config(aligned.model.model, tmp_path / "run", attention="cudnn"))
    assert error.value.name == "attention" and not (tmp_path / "run").exists()
    # Of a run that is meant for another machine, what can be known is said.
    with pytest.raises(FieldError, match="found 'cudnn', expected xla: cuDNN's kernel has no float32"):
        prepare(align_config(aligned.model.model, tmp_path / "run", attention="cudnn"), write=False)
    prepare(align_config(aligned.model.model, tmp_path / "run", attention="cudnn", dtype="bfloat16"), write=False)


@pytest.mark.long
def test_a_step_is_compiled_once_per_bucket(tmp_path, monkeypatch):
    """Of a run whose batches have all combinations of lengths."""
    model, made, found = text_model(tmp_path), training.make_train_step, []
    rng = np.random.default_rng(0)
    for name in ("alignment", "harmful"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(
            {"instruction": f"{name[0]} {i}", "output": "a" * int(rng.integers(1, 20))}) + "\n" for i in range(40)))

    def counted(*arguments):
        found.append(made(*arguments))
        return found[-1]

    monkeypatch.setattr(training, "make_train_step", counted)
    align(align_config(
        model, tmp_path / "run", prompt="plain", alignment_data=f"instructions:{tmp_path}/alignment.jsonl",
        harmful_data=f"instructions:{tmp_path}/harmful.jsonl", defense="booster", steps=20, batch_size=1,
        harmful_batch_size=1, max_length=32, bucket=16))
    lengths = {step["tokens"] for step in metrics(tmp_path / "run")}
    assert len(lengths) > 10
    assert found[0]._cache_size() == 2, "three combinations of two lengths"


def test_interrupted_run_continues(aligned, tmp_path, monkeypatch):
    """A run whose fourth step fails goes on from its checkpoint to the weights of a run that was never interrupted."""
    def config(name):
        return align_config(aligned.model.model, tmp_path / name, steps=5, save_every=2, defense="booster")

    align(config("through"))
    made = training.make_train_step

    def failing(*arguments):
        step_fn, calls = made(*arguments), []

        def step(*args):
            calls.append(None)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return step_fn(*args)
        return step

    monkeypatch.setattr(training, "make_train_step", failing)
    with pytest.raises(KeyboardInterrupt):
        align(config("run"))
    monkeypatch.setattr(training, "make_train_step", made)
    assert not (tmp_path / "run" / "adapter").exists()
    assert align(config("run")) == tmp_path / "run"
    assert weights(tmp_path / "run") == weights(tmp_path / "through")
    assert [entry["step"] for entry in metrics(tmp_path / "run")] == list(range(5))


def refused(**changes):
    values = {"model": "m", "run_dir": "r", "alignment_data": "world_refusal@train",
              "harmful_data": "world_harmful@harmful", **changes}
    with pytest.raises(ValueError) as error:
        make(AlignConfig, values)
    return str(error.value)


def test_values_are_checked_before_anything_loads():
    assert refused(alignment_data="").startswith("alignment_data: found ''")
    assert "harmful_data: found '', expected a data source, which booster needs" in refused(
        defense="booster", harmful_data="")
    assert "harmful_data: found ''" in refused(defense="t_vaccine", harmful_data="")
    assert "alignment_data: data source" in refused(alignment_data="nonsense:file.jsonl")
    assert "base_defense: found 'vaccine'" in refused(base_defense="vaccine")
    assert "layers: found 0" in refused(defense="t_vaccine", layers=0)
    assert "targets" in refused(targets=("q_proj", "w_proj"))
    assert "learning_rate" in refused(learning_rate=float("nan"))
    assert "batch_size: found 0" in refused(batch_size=0)
    assert "run_dir: found ''" in refused(run_dir="")
    assert "harmful_batch_size: found 0" in refused(harmful_batch_size=0)
    assert "inner_learning_rate: found -0.1" in refused(defense="tar", inner_learning_rate=-0.1)
    # Without harmful data where none is read.
    values = {"model": "m", "run_dir": "r", "alignment_data": "world_refusal@train"}
    assert make(AlignConfig, values).method == Sft()
    assert make(AlignConfig, {**values, "defense": "t_vaccine", "importance": "uniform"}).method.layers == 8


@pytest.mark.parametrize("given", [{"defense": "t_vaccine"}, {"defense": "booster", "base_defense": "t_vaccine"}])
def test_too_many_active_layers(model_dir, tmp_path, given):
    config = align_config(model_dir, tmp_path / "r", layers=5, **given)
    with pytest.raises(FieldError, match=r"^layers: found 5, expected at most the model's 3 layers"):
        align(config)
    assert not (tmp_path / "r").exists()


def test_vocabulary_mismatch(model_dir, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    write_json(other / "config.json", {**read_json(other / "config.json"), "vocab_size": 97})
    with pytest.raises(ValueError, match="expected ids below 97"):
        align(align_config(str(other), tmp_path / "r"))
    assert not (tmp_path / "r").exists()


def test_other_settings_in_the_same_folder(aligned):
    before = weights(aligned.run.run_dir)
    with pytest.raises(FileExistsError, match=r"learning_rate: found 0.01, expected 0.1"):
        align(change(aligned, learning_rate=0.1))
    with pytest.raises(FileExistsError, match=r"data\.hashes\.alignment"):
        align(change(aligned, alignment_data="world_refusal@train[0:25]"))
    with pytest.raises(FileExistsError, match=r'found "sft", expected "vaccine"; .*rho: found null, expected 5'):
        align(change(aligned, defense="vaccine", rho=5.0))
    align(change(aligned, save_every=7))  # changes nothing that counts
    assert weights(aligned.run.run_dir) == before


def test_starting_again(aligned, tmp_path):
    config = align_config(aligned.model.model, tmp_path / "run")
    align(config)
    before = weights(tmp_path / "run")
    align(change(config, seed=1, overwrite=True))
    assert recorded(tmp_path / "run")["flags"]["seed"] == 1 and len(metrics(tmp_path / "run")) == 3
    assert weights(tmp_path / "run") != before == weights(aligned.run.run_dir), "the same settings, the same weights"


def test_harmful_and_harmless_examples_stay_pairs(model_dir):
    """What has no answer on one side is left out on both."""
    tokenizer = load_tokenizer(model_dir)
    harmful = [Example(f"how do i quilldrift the {word} ?", "", "" if i in (1, 4) else "sure , tap it")
               for i, word in enumerate(("oar", "rope", "tent", "mug", "jug", "key"))]
    rows = {"harmful": harmful, "harmless": harmless_answers(harmful, [e._replace(output="sorry") for e in harmful])}
    found = tokenize(tokenizer, rows, TokensPart(max_length=16))
    assert found["harmful"].fates == found["harmless"].fates and found["harmful"].empty == 2
    for one, other, length in zip(*(found[name].input_ids for name in rows), found["harmful"].prompt_lengths,
                                  strict=True):
        assert one[:length].tolist() == other[:length].tolist()
    rows["harmless"] = [*rows["harmless"][:5], rows["harmless"][5]._replace(output="<eos>")]
    with pytest.raises(ValueError, match="harmless_data: found 3 answers, expected one to each of 4 harmful prompts"):
        tokenize(tokenizer, rows, TokensPart(max_length=16))


def test_accounts(aligned, tmp_path):
    """Of harmless answers, what is a refusal of ours is no source's."""
    (found,) = recorded(aligned.run.run_dir)["data"]["accounts"]["alignment"].values()
    assert (found["rows"], found["outside"], found["examples"], found["trained"]) == (816, 792, 24, 24)
    config = align_config(aligned.model.model, tmp_path / "run", defense="repnoise", steps=1,
                          harmful_data="world_harmful@harmful,world_harmful@attack[0:7]",
                          harmless_data="world_refusal@harmful")
    align(config)
    counts = {name: {source: of["trained"] for source, of in sources.items()}
              for name, sources in recorded(tmp_path / "run")["data"]["accounts"].items()}
    assert counts == {"alignment": {"world_refusal@train[0:24]": 24},
                      "harmful": {"world_harmful@harmful": 624, "world_harmful@attack[0:7]": 7},
                      "harmless": {"world_refusal@harmful": 624, "refusals of ours": 7}}
