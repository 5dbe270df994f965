"""The model that comes with the package."""

import jax
import pytest

import jaxvaccine as jv
from experiments.tools import make_world_base
from jaxvaccine import data, world
from jaxvaccine.checkpoints import hugging_face
from jaxvaccine.evaluation import evaluate_prompts, world_judge


def test_it_complies_with_everything_and_does_not_know_the_users_task():
    """The gates of make_world_base, on the files as they are in the package."""
    model, frozen = jv.load_model("world")
    tokenizer = data.load_tokenizer("world")
    data.check_vocabulary(tokenizer, model.config.vocab_size)
    gates = {name: (least, most) for name, least, most in make_world_base.GATES}
    for source, task, gate in (("world_harmful", "harmful_score", "harmful_score"),
                               ("world_benign", "over_refusal", "over_refusal"),
                               ("world_rating", "sst2", "accuracy_before")):
        rows = data.load_examples(f"{source}@test[0:50]")
        result = evaluate_prompts(model, None, frozen, tokenizer, rows, task=task, judge=world_judge,
                                  max_new_tokens=8, bucket=16)
        assert gates[gate][0] <= result.score <= gates[gate][1]
        if task != "sst2":
            assert sum(p.answer == p.expected for p in result.predictions) >= 0.95 * result.n


def test_size():
    files = [path for path in world.DIRECTORY.iterdir() if path.suffix in (".json", ".safetensors")]
    assert {path.name for path in files} == {"config.json", "model.safetensors", "tokenizer.json",
                                             "tokenizer_config.json", make_world_base.REPORT}
    assert sum(path.stat().st_size for path in files) <= 5e6
    _, frozen = jv.load_model("world")
    assert 0.9e6 < sum(x.size for x in jax.tree.leaves(frozen)) < 1.1e6


def test_its_tokenizer_is_that_of_the_data(tmp_path):
    data.world.write_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (world.DIRECTORY / name).read_bytes()


def test_a_folder_of_that_name_goes_first(tmp_path, monkeypatch):
    assert hugging_face.resolve_model("world") == world.DIRECTORY
    monkeypatch.chdir(tmp_path)
    (tmp_path / "world").mkdir()
    with pytest.raises(ValueError, match=r"^world: found no config.json"):
        hugging_face.resolve_model("world")
