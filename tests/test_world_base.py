"""The model that comes with the package."""

import jax
import pytest

import jaxvaccine as jv
from experiments.tools import make_world_base
from jaxvaccine import data, world
from jaxvaccine.checkpoints import hugging_face
from jaxvaccine.evaluation import evaluate_prompts, world_judge
from jaxvaccine.experiment import recipes
from jaxvaccine.experiment.config import make


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2"])
def test_a_base_of_every_family_is_made_and_loads(family, tmp_path, monkeypatch):
    """At the smallest: the weights that are read again are those that were trained. Gemma2's is measured too."""
    kind = make_world_base.KINDS["world"]
    measure = kind.measure if family == "gemma2" else lambda *args: {}
    monkeypatch.setitem(make_world_base.KINDS, "world", kind._replace(gates=(), measure=measure))
    monkeypatch.setitem(recipes.WORLD_ALIGN, "steps", 1)
    monkeypatch.setitem(recipes.WORLD_ATTACK, "steps", 1)
    made, pretrain = [], make_world_base.pretrain

    def noted(config, model, *more):
        made.append((model, pretrain(config, model, *more)))
        return made[0][1]

    monkeypatch.setattr(make_world_base, "pretrain", noted)
    config = make(make_world_base.BaseConfig, {
        "directory": str(tmp_path / "base"), "family": family, "steps": 2, "batch_size": 2, "hidden_size": 32,
        "intermediate_size": 16, "num_layers": 2, "test_size": 2})
    found = make_world_base.make_base(config)
    (trained, weights), (model, frozen) = made[0], jv.load_model(str(tmp_path / "base"))
    assert model.config == trained.config == config.architecture(model.config.vocab_size)
    assert model.config.model_type == family and found["flags"]["family"] == family
    assert jax.tree.structure(frozen) == jax.tree.structure(weights)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(frozen), jax.tree.leaves(weights), strict=True))
    local = {"llama": (False, False), "mistral": (True, True), "qwen2": (False, False), "gemma2": (True, False)}
    assert model.config.local_layers == local[family]


def test_the_bases_form_is_that_of_the_package():
    """The default flags' form, with the package's own sizes."""
    model, _ = jv.load_model("world")
    assert make(make_world_base.BaseConfig, {"directory": "-"}).architecture(model.config.vocab_size) == model.config
