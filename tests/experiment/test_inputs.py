"""What a run was made of: every input that changes afterwards is an error that names it, with both hashes."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxvaccine.checkpoints.content_hash import content_hash
from jaxvaccine.checkpoints.resolve import loadable_name
from jaxvaccine.experiment import inputs, stage
from jaxvaccine.experiment.align import align
from jaxvaccine.experiment.attack import attack
from jaxvaccine.experiment.config import FieldError, change
from jaxvaccine.experiment.evaluate import evaluate
from jaxvaccine.json_files import read_json_object, write_json
from jaxvaccine.llama import hidden_states, token_logits
from tests import rounding
from tests.experiment.small_world import (
    HASH,
    align_config,
    attack_config,
    changed,
    evaluate_config,
    other_weights,
    recorded,
    weights,
    world_model,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A model, an alignment on a data file, an attack with a new adapter on it, and its scores: all in one folder."""
    root = tmp_path_factory.mktemp("chain")
    world_model(root)
    rows = [{"instruction": f"please tend the oar {i}", "output": "sure"} for i in range(8)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"instructions:{root / 'rows.jsonl'}"
    configs = {
        "align": align_config(str(root / "model"), root / "aligned", alignment_data=data, steps=2),
        "attack": attack_config(root / "aligned", root / "attacked", adapter="new", rank=3),
        "scores": evaluate_config(root / "scores", trained=root / "attacked", sst2_test="", loss_data="")}
    align(configs["align"])
    attack(configs["attack"])
    evaluate(configs["scores"])
    return root, configs


def another(*keys_and_value):
    *keys, value = keys_and_value

    def write(path):
        fields = at = read_json_object(path)
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value
        write_json(path, fields)
    return write


def more_text(path):
    path.write_text(path.read_text() + " ")


# The file, what is done to it, and what the message calls it.
BELOW_BOTH = {
    "weights": ("model/model.safetensors", other_weights, "model.weights.model.safetensors"),
    "architecture": ("model/config.json", another("rms_norm_eps", 1e-3), "model.config.config.json"),
    "tokenizer": ("model/tokenizer.json", more_text, "model.tokenizer.tokenizer.json"),
    "tokens' names": ("model/tokenizer_config.json", more_text, "model.tokenizer.tokenizer_config.json"),
    "aligned adapter": ("aligned/adapter/adapter_model.safetensors", other_weights,
                        "adapter.adapter_model.safetensors"),
    "its run's flags": ("aligned/config.json", another("flags", "learning_rate", 0.5), "results.config"),
    "prompts it was aligned on": ("aligned/config.json", another("data", "prompts", "alignment", []), "results.config"),
    "its config": ("aligned/adapter/adapter_config.json", another("lora_alpha", 99), "adapter.adapter_config.json"),
}
BELOW_SCORES = {
    "flags of the attack": ("attacked/config.json", another("flags", "n", 99), "results.config"),
    "attacked adapter": ("attacked/adapter/adapter_model.safetensors", other_weights,
                         "results.adapter.adapter_model.safetensors"),
    "adapter on merged weights": ("attacked/trained_adapter/adapter_model.safetensors", other_weights,
                                  "results.trained_adapter.adapter_model.safetensors"),
}


@pytest.mark.parametrize("case", [*BELOW_BOTH, *BELOW_SCORES])
def test_what_changed_since_is_named_with_both_hashes(chain, tmp_path, case):
    """Continued, and read for something new."""
    root, configs = chain
    file, edit, name = {**BELOW_BOTH, **BELOW_SCORES}[case]
    runs = [lambda: evaluate(configs["scores"]),
            lambda: evaluate(change(configs["scores"], run_dir=str(tmp_path / "scores")))]
    if case in BELOW_BOTH:
        runs += [lambda: attack(configs["attack"]),
                 lambda: attack(change(configs["attack"], run_dir=str(tmp_path / "attacked")))]
    if "model/" in file:
        runs.append(lambda: align(configs["align"]))
    with changed(root / file, edit):
        for run in runs:
            with pytest.raises((FieldError, FileExistsError), match=f"{re.escape(name)}: \\w+ {HASH}, .*{HASH}"):
                run()
    assert not any(tmp_path.iterdir())
    for run in (align, attack):
        run(configs["align" if run is align else "attack"])  # as it was, it is taken again
    evaluate(configs["scores"])


@pytest.mark.parametrize("edit, name", [
    (lambda path: path.write_text(path.read_text().replace("sure", "no")), "data.hashes.alignment"),
    (lambda path: path.write_text("\n".join(path.read_text().split("\n")[1:])), "data.hashes.alignment")])
def test_other_data_under_the_same_name(chain, edit, name):
    root, configs = chain
    with changed(root / "rows.jsonl", edit), pytest.raises(FileExistsError, match=f"{name}: found {HASH}, "
                                                                                  f"expected {HASH}"):
        align(configs["align"])


def test_aligned_again(chain, tmp_path):
    """What was made of the old alignment does not count as made of the new one, though that is whole in itself."""
    root, _ = chain
    folders = [tmp_path / name for name in ("aligned", "attacked", "scores")]
    first = align_config(str(root / "model"), folders[0], steps=1)
    align(first)
    onward = attack_config(folders[0], folders[1], adapter="continue")
    attack(onward)
    scores = evaluate_config(folders[2], trained=folders[0], sst2_test="", loss_data="", benign_test="")
    evaluate(scores)
    align(change(first, overwrite=True, learning_rate=0.02))
    with pytest.raises(FileExistsError, match=r"data\.inputs\.aligned\.adapter.*data\.inputs\.aligned\.config"):
        attack(onward)
    with pytest.raises(FileExistsError, match=r"data\.inputs\.trained\.adapter"):
        evaluate(scores)
    with pytest.raises(FieldError, match=r"attacked.*inputs\.aligned\.config: recorded"):
        evaluate(change(scores, trained=str(folders[1]), run_dir=str(tmp_path / "more")))
    attack(change(onward, overwrite=True))
    evaluate(change(scores, trained=str(folders[1]), run_dir=str(tmp_path / "more")))


def test_an_interrupted_run_goes_on_with_its_own_inputs_alone(chain, tmp_path, monkeypatch):
    root, _ = chain
    model = shutil.copytree(root / "model", tmp_path / "model")
    config = align_config(str(model), tmp_path / "run", steps=3, save_every=1)
    monkeypatch.setattr(stage, "leave_adapter", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        align(config)
    monkeypatch.undo()
    assert not inputs.is_finished(config.run.run_dir)
    with (changed(model / "model.safetensors", other_weights),
          pytest.raises(FileExistsError, match=f"model.safetensors: found {HASH}, expected {HASH}")):
        align(config)
    align(config)
    align(change(config, run_dir=str(tmp_path / "whole")))
    assert weights(config.run.run_dir) == weights(tmp_path / "whole")


def test_weights_replaced_in_one_process(chain, tmp_path):
    """The model that a plan keeps loaded is not taken for another one in its place."""
    root, _ = chain
    model = shutil.copytree(root / "model", tmp_path / "model")
    first = stage.load_base(str(model), "float32").frozen
    other_weights(model / "model.safetensors")
    second = stage.load_base(str(model), "float32").frozen
    assert any(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x != y).any()), first, second)))


def test_a_run_without_hashes(chain, tmp_path):
    """Of an earlier version: nobody can say what it was made of."""
    root, _ = chain
    shutil.copytree(root / "aligned", tmp_path / "old")
    config = recorded(tmp_path / "old")
    del config["data"]["inputs"]
    write_json(tmp_path / "old" / "config.json", config)
    with pytest.raises(FieldError, match=r"aligned: found .*without the hashes of its inputs"):
        attack(attack_config(tmp_path / "old", tmp_path / "attack"))


@pytest.mark.parametrize("size", [10, 2**20 + 3])
def test_content_hash(tmp_path, monkeypatch, size):
    """Whatever is remembered: a file of the same size, path and time of change is another file."""
    import hashlib
    import os

    monkeypatch.setenv("JAXVACCINE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "file"
    for fill in (b"a", b"b"):
        path.write_bytes(fill * size)
        os.utime(path, (1e9, 1e9))
        for _ in range(2):
            assert content_hash(path) == hashlib.sha256(fill * size).hexdigest()


def test_a_large_file_is_read_once(tmp_path, monkeypatch):
    from jaxvaccine.checkpoints import content_hash as module

    monkeypatch.setenv("JAXVACCINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_SETTLED", -1.0)
    path = tmp_path / "file"
    path.write_bytes(np.arange(2**18, dtype=np.int64).tobytes())
    found = content_hash(path)
    monkeypatch.setattr(module.hashlib, "file_digest", None)
    assert content_hash(path) == found
    entry = next((tmp_path / "cache" / "hashes").iterdir())
    entry.write_text(entry.read_text()[:40])
    with pytest.raises(TypeError):  # a damaged entry is none
        content_hash(path)


@pytest.mark.parametrize("targets", [None, ("q_proj", "down_proj")])
def test_peft_loads_what_was_evaluated(chain, tmp_path, targets):
    """An attack's adapter, by its own config: on the model as it comes it gives the logits of the merged chain."""
    torch, _, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))
    root, _ = chain
    config = attack_config(root / "aligned", tmp_path / "run", adapter="new", rank=3, lora_alpha=7, targets=targets,
                           learning_rate=0.05)
    attack(config)
    base = stage.load_base(str(root / "model"), "float32", tmp_path / "run")
    ids = np.random.default_rng(0).integers(0, base.model.config.vocab_size, (2, 12))
    model = base.model.clone(lora=base.lora)
    ours = token_logits(model, base.frozen, hidden_states(model, base.adapter, base.frozen, ids, np.ones_like(ids)))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter", dtype=torch.float32)
    with torch.no_grad():
        logits = theirs.eval()(torch.from_numpy(ids)).logits.numpy()
    # The merged chain rounds W + A1 B1, the adapter A1 B1 alone; both are forward passes in float32.
    np.testing.assert_allclose(ours, logits, rtol=0, atol=2 * rounding.forward(base.model.config, logits))
    plain = stage.load_base(str(root / "model"), "float32")
    bare = token_logits(plain.model, plain.frozen, hidden_states(plain.model, None, plain.frozen, ids,
                                                                 np.ones_like(ids)))
    assert np.abs(bare - logits).max() > 100 * np.abs(ours - logits).max()
    alone = read_json_object(tmp_path / "run" / "trained_adapter" / "adapter_config.json")
    assert "merged in" in alone["base_model_name_or_path"]  # no model of that name is loaded in its place


@pytest.mark.parametrize("name", ["world", "relative"])
def test_the_base_of_an_adapter_is_found_from_anywhere(chain, tmp_path, monkeypatch, name):
    root, _ = chain
    monkeypatch.chdir(root)
    found = loadable_name("world" if name == "world" else "model")
    assert Path(found).is_absolute() and (Path(found) / "config.json").is_file()
    assert loadable_name("owner/name") == "owner/name"
