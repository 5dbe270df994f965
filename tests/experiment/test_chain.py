"""Chains of runs: fine-tuned again and again, aligned again between; what each link trains, leaves and knows of the
others, against equations and against the same steps by hand."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxvaccine import data, defenses, optim, training
from jaxvaccine.checkpoints.hugging_face import load_model
from jaxvaccine.checkpoints.peft import load_adapter, read_lora_config
from jaxvaccine.experiment import attack as attacks
from jaxvaccine.experiment import dry_run, inputs, stage
from jaxvaccine.experiment.align import align
from jaxvaccine.experiment.align import prepare as prepare_alignment
from jaxvaccine.experiment.attack import attack
from jaxvaccine.experiment.attack_config import AttackAdapter
from jaxvaccine.experiment.config import FieldError, change
from jaxvaccine.experiment.evaluate import evaluate
from jaxvaccine.experiment.methods import Ewc, Undefended
from jaxvaccine.json_files import write_json
from jaxvaccine.llama import hidden_states, init_adapter, token_logits
from jaxvaccine.losses import causal_lm_loss
from jaxvaccine.merging import merge_adapter
from jaxvaccine.report import runs as reports
from tests import rounding
from tests.experiment.small_world import (
    HASH,
    align_config,
    attack_config,
    changed,
    evaluate_config,
    other_weights,
    recorded,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

TARGETS = ("down_proj",)  # one site compiles fastest
IDS = np.arange(1, 13).reshape(2, 6)


class Runs:
    """Configs of a chain: aligned, two users' fine-tunings with one adapter, aligned again, a third user."""

    def __init__(self, model: str, root):
        self.model, self.root = model, root
        self.first = align_config(model, root / "first", targets=TARGETS)
        one = {"learning_rate": 1e-2, "harmful_data": "world_harmful@attack[0:20]"}
        self.user1 = attack_config(root / "first", root / "user1", adapter="new", rank=3, seed=1, **one)
        self.user2 = attack_config(root / "user1", root / "user2", adapter="continue", seed=2, poison_ratio=0.0, **one)
        self.again = self.aligned_again("again")
        self.user3 = attack_config(root / "again", root / "user3", adapter="new", rank=3, seed=3, **one)
        self.names = ("first", "user1", "user2", "again", "user3")

    def aligned_again(self, name, **given):
        return align_config("", self.root / name, start=str(self.root / "user2"), **{
            "defense": "t_vaccine", "targets": TARGETS, "seed": 4, **given})

    def carry_out(self):
        for name in self.names:
            config = getattr(self, name)
            (align if name in ("first", "again") else attack)(config)


@pytest.fixture(scope="module")
def runs(model_dir, tmp_path_factory):
    of = Runs(model_dir, tmp_path_factory.mktemp("chain"))
    of.carry_out()
    return of


def updates(folder):
    """{name of a weight in the model's files: (alpha / r) B A} of a PEFT adapter, float64, by its definition."""
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(
        folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    return {name.removeprefix("base_model.model.").replace("lora_A.weight", "weight"): scale * (
        tensors[name.replace("lora_A", "lora_B")].astype(float) @ tensors[name].astype(float))
        for name in tensors if "lora_A" in name}


@functools.partial(jax.jit, static_argnums=0)
def logits(model, adapter, frozen):
    return token_logits(model, frozen, hidden_states(model, adapter, frozen, IDS, np.ones_like(IDS)))


def logits_of(weights, runs, tmp_path):
    """Of a model with these weights, which its directory gets."""
    directory = tmp_path / "merged"
    directory.mkdir(exist_ok=True)
    save_file({name: value.astype(np.float32) for name, value in weights.items()}, directory / "model.safetensors",
              metadata={"format": "pt"})
    shutil.copy(f"{runs.model}/config.json", directory)
    model, frozen = load_model(directory, dtype="float32")
    return model.config, np.asarray(logits(model, None, frozen))


def logits_left(run_dir, merge=False):
    flags = recorded(run_dir)["flags"]
    base = stage.load_base(flags["model"], "float32", run_dir, merge)
    return logits(base.model.clone(lora=base.lora), base.adapter, base.frozen)


def test_every_link_computes_the_sum_of_all_updates(runs, tmp_path):
    """W + s0 B0 A0 + s1 B1 A1 + …: of the adapters that are merged below, and of the one that trained last. In adapter/
    they are one, of the model as it comes; what is merged and evaluated is the same."""
    base = {name: value.astype(float) for name, value in load_file(f"{runs.model}/model.safetensors").items()}
    own = {name: runs.root / name / ("adapter" if name == "first" else "trained_adapter") for name in runs.names}
    stacks = {"first": ["first"], "user1": ["first", "user1"], "user2": ["first", "user2"],
              "again": ["first", "user2", "again"], "user3": ["first", "user2", "again", "user3"]}
    seen = []
    for name, stack in stacks.items():
        whole = dict(base)
        for link in stack:
            for key, update in updates(own[link]).items():
                whole[key] = whole[key] + update
        config, expected = logits_of(whole, runs, tmp_path)
        tolerance = rounding.forward(config, expected)
        for merge in (False, True):
            np.testing.assert_allclose(logits_left(runs.root / name, merge), expected, atol=tolerance, rtol=0)
        folder = runs.root / name / "adapter"
        model, frozen = load_model(runs.model, dtype="float32")
        model = model.clone(lora=read_lora_config(folder))
        as_one = logits(model, load_adapter(folder, model), frozen)
        np.testing.assert_allclose(as_one, expected, atol=tolerance, rtol=0)
        assert all(np.abs(other - expected).max() > 20 * tolerance for other in seen)
        seen.append(expected)
    assert [read_lora_config(runs.root / name / "adapter").rank for name in runs.names] == [2, 5, 5, 7, 10]


def by_hand(config, estimator, sources, model, adapter, frozen):
    """A run's steps, one after the other."""
    steps, seed = stage.count_steps(config.training, sources), config.run.seed
    optimizer = optim.layer_masked_optimizer(config.training.optimizer(), steps)
    # A step is given its state.
    state = training.init_train_state(jax.tree.map(jnp.copy, adapter), estimator, optimizer)
    train_step = training.make_train_step(estimator, optimizer)
    lengths = data.batch_lengths([sources], [seed], config.data.bucket, steps)
    batches = data.training_batches(sources, seed, config.data.bucket, lengths)
    for step in range(steps):
        state, _ = train_step(state, frozen, batches(step), stage.training_key(seed))
    return state.adapter


def assert_same(adapter, folder, model):
    for one, other in zip(jax.tree.leaves(adapter), jax.tree.leaves(load_adapter(folder, model)), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_a_chain_is_its_steps_by_hand(runs):
    """Two users' fine-tunings in a row with one adapter, and an alignment on what they left: on the merged weights, and
    with that adapter."""
    bare, frozen = load_model(runs.model)
    aligned = bare.clone(lora=read_lora_config(runs.root / "first" / "adapter"))
    frozen = jax.jit(merge_adapter, static_argnums=0)(
        aligned, load_adapter(runs.root / "first" / "adapter", aligned), frozen)
    model = runs.user1.model.on(bare.clone(lora=read_lora_config(runs.root / "user1" / "trained_adapter")))
    adapter = init_adapter(model, stage.fresh_key(1))
    for name in ("user1", "user2"):
        config = getattr(runs, name)
        sources = attacks.prepare(config, write=False).sources
        adapter = by_hand(config, defenses.sft(causal_lm_loss(model), batch="user"), sources, model, adapter, frozen)
        assert_same(adapter, runs.root / name / "trained_adapter", model)
    for name, how in (("again", {}), ("again_continued", {"adapter": "continue", "rank": 3, "defense": "sft"})):
        config = runs.aligned_again(name, **how)
        align(config)
        sources = prepare_alignment(config, write=False).sources
        start, of_model, under = adapter, model, frozen
        if not how:
            under = jax.jit(merge_adapter, static_argnums=0)(model, adapter, frozen)
            of_model = model.clone(lora=config.adapter.lora())
            start = init_adapter(of_model, stage.fresh_key(4))
        trained = by_hand(config, config.method.make(of_model), sources, of_model, start, under)
        assert_same(trained, runs.root / name / "trained_adapter", of_model)


def test_the_chain_is_recorded_and_named(runs, tmp_path):
    below = {name: recorded(runs.root / name)["data"].get("chain") for name in runs.names}
    assert below["first"] is None and below["user1"] is None
    assert [[link["run_dir"].rpartition("/")[2] for link in below[name]] for name in runs.names[2:]] == [
        ["first", "user1"], ["first", "user1", "user2"], ["first", "user1", "user2", "again"]]
    assert {name: below["user3"][2][name] for name in ("script", "defense", "poison_ratio", "adapter")} == {
        "script": "finetune", "defense": "none", "poison_ratio": 0, "adapter": "continue"}
    root = runs.root
    reports.write(root / "user3")
    assert (f"Stands on 4 runs, one after the other: `{root}/first` (aligned with SFT) → `{root}/user1` (fine-tuned, "
            f"p = 0.25, new adapter) → `{root}/user2` (fine-tuned, p = 0, the same adapter) → `{root}/again` (aligned "
            "again with T-Vaccine, new adapter).\n") in reports.read(root / "user3")
    scores = evaluate_config(tmp_path / "scores", trained=root / "again", sst2_test="", benign_test="", loss_data="")
    evaluate(scores)
    assert [link["run_dir"] for link in recorded(tmp_path / "scores")["data"]["chain"]] == [
        str(root / name) for name in runs.names[:4]]
    shared = recorded(tmp_path / "scores")["data"]["shared"]
    assert set(shared) == {"harmful_score"}
    reports.write(tmp_path / "scores")
    assert "aligned again with T-Vaccine" in reports.read(tmp_path / "scores")
    reports.write(root / "again")
    assert reports.read(root / "again").startswith(f"# Alignment of {root}/user2 with T-Vaccine")


def test_what_the_alignments_read_is_in_no_harmful_data(runs, tmp_path):
    """Of all alignments of the chain: the last one has read harmful data, the first none."""
    same = {"harmful_data": "world_harmful@harmful[0:12]"}
    with pytest.raises(ValueError, match="the alignment's harmful data"):
        attack(change(runs.user3, run_dir=str(tmp_path / "a"), **same))
    attacks.prepare(change(runs.user2, run_dir=str(tmp_path / "a"), **same), write=False)
    # What the first user trained on, whom a benign user, an alignment and another one have followed.
    with pytest.raises(FieldError, match=r"harmful_test: found \d+ of 20 prompts also in the .* data of "):
        evaluate(evaluate_config(tmp_path / "s", trained=runs.root / "user2",
                                 harmful_test="world_harmful@attack[0:20]"))


def test_a_link_that_changed(runs, tmp_path):
    """Whatever stands on it is refused, however far above, with both hashes."""
    later = [lambda: attack(change(runs.user3, run_dir=str(tmp_path / "a"))),
             lambda: evaluate(evaluate_config(tmp_path / "s", trained=runs.root / "user3")),
             lambda: align(change(runs.again, run_dir=str(tmp_path / "b")))]
    for file in ("first/adapter/adapter_model.safetensors", "user1/trained_adapter/adapter_model.safetensors"):
        with changed(runs.root / file, other_weights):
            for run in later:
                with pytest.raises(FieldError, match=f"adapter_model.safetensors: recorded {HASH}, there is {HASH}"):
                    run()
    assert not any(tmp_path.iterdir())
    for run, name in ((attack, "user2"), (align, "again")):  # as it was, it is taken again
        assert run(getattr(runs, name)) == runs.root / name


def test_what_is_refused(runs, tmp_path):
    def refused(error, run, config, **given):
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            run(change(config, **{"run_dir": str(tmp_path / "r"), **given}))
        assert not (tmp_path / "r").exists()

    refused(r"rank: found 4, expected 3, as the continued adapter", attack, runs.user2, rank=4)
    refused(r"rank: found 2, expected 3, as the adapter that .*user2 left", align, runs.again, adapter="continue")
    refused(r"model: found 'elsewhere', expected .*, of .*user2, or none", align, runs.again, model="elsewhere")
    refused(r"quantisation: found 'int8', expected 'none'", align, runs.again, quantisation="int8")
    refused("not found", align, runs.again, start=str(tmp_path / "none"))
    with pytest.raises(FieldError, match="adapter: found 'continue', expected new, unless --start"):
        change(runs.first, adapter="continue")
    with pytest.raises(FieldError, match="model: found ''"):
        align_config("", "r")
    # --overwrite would delete what the run is made of.
    for run, config, name in ((attack, runs.user3, "user1"), (attack, runs.user3, "again"),
                              (align, runs.again, "first")):
        with pytest.raises(FieldError, match=f"run_dir: found .*{name}"):
            run(change(config, run_dir=str(runs.root / name), overwrite=True))
        assert inputs.is_finished(runs.root / name)


def test_auto_goes_by_the_last_alignment():
    shape = {"rank": 2, "lora_alpha": 4.0, "dropout": 0.0, "targets": TARGETS}
    for defense, expected in (("booster", "continue"), ("t_vaccine", "new")):
        assert AttackAdapter().resolve({**shape, "defense": defense}, Undefended()).adapter == expected
    resolve = {"aligned": {**shape, "defense": "booster"}, "has_adapter": False}
    assert AttackAdapter().resolve(method=Undefended(), **resolve).adapter == "new"
    with pytest.raises(FieldError, match=r"adapter: found 'continue', expected auto or new: .*a whole model"):
        AttackAdapter(adapter="continue").resolve(method=Undefended(), **resolve)
    with pytest.raises(FieldError, match="defense: found 'ewc', expected another"):
        AttackAdapter().resolve(method=Ewc(), **resolve)


def test_a_dry_run_reads_chains(runs, tmp_path):
    dry = dry_run.DryRun(True, "rtx_4090")
    before = sorted(runs.root.rglob("*"))
    for of, config in ((dry_run.of_attack, change(runs.user3, run_dir=str(tmp_path / "r"))),
                       (dry_run.of_alignment, change(runs.again, run_dir=str(tmp_path / "r"))),
                       (dry_run.of_evaluation, evaluate_config(tmp_path / "r", trained=runs.root / "user3"))):
        assert "peak" in of(config, dry)
    assert sorted(runs.root.rglob("*")) == before


def test_an_alignment_from_before_there_were_chains_goes_on(runs, tmp_path):
    config = change(runs.first, run_dir=str(tmp_path / "old"), steps=1)
    align(config)
    found = recorded(tmp_path / "old")
    write_json(tmp_path / "old" / "config.json", {**found, "flags": {
        name: value for name, value in found["flags"].items() if name not in ("start", "adapter")}})
    assert align(config) == tmp_path / "old"


@pytest.mark.long
def test_chains_over_whole_models(runs, tmp_path):
    """All weights trained, then an adapter on them, that adapter on, and aligned again: each on what the last left."""
    whole = change(runs.user3, run_dir=str(tmp_path / "whole"), trains="all", adapter="auto", rank=None)
    attack(whole)
    user4 = attack_config(tmp_path / "whole", tmp_path / "user4", rank=2, learning_rate=1e-2, adapter="auto")
    attack(user4)
    user5 = attack_config(tmp_path / "user4", tmp_path / "user5", learning_rate=1e-2, adapter="continue")
    attack(user5)
    again = align_config("", tmp_path / "again", start=str(tmp_path / "user5"), targets=TARGETS)
    align(again)
    base = {name: value.astype(float) for name, value in load_file(tmp_path / "whole/model/model.safetensors").items()}
    runs_model, runs.model = runs.model, str(tmp_path / "whole" / "model")
    try:
        for name, stack in {"user4": ["user4/adapter"], "user5": ["user5/adapter"],
                            "again": ["user5/adapter", "again/trained_adapter"]}.items():
            whole_sum = dict(base)
            for folder in stack:
                for key, update in updates(tmp_path / folder).items():
                    whole_sum[key] = whole_sum[key] + update
            config, expected = logits_of(whole_sum, runs, tmp_path)
            np.testing.assert_allclose(logits_left(tmp_path / name), expected, rtol=0,
                                       atol=rounding.forward(config, expected))
    finally:
        runs.model = runs_model
    assert recorded(tmp_path / "user4")["flags"]["model"] == str(tmp_path / "whole" / "model")
    assert recorded(tmp_path / "user4")["flags"]["adapter"] == "new"
    evaluate(evaluate_config(tmp_path / "scores", trained=tmp_path / "again", sst2_test="", benign_test=""))
    with pytest.raises(FieldError, match=r"adapter: found 'continue', expected new: .*left a whole model"):
        align(align_config("", tmp_path / "r", start=str(tmp_path / "whole"), targets=TARGETS, adapter="continue"))
    with pytest.raises(FieldError, match="adapter: found 'continue', expected auto or new"):
        attack(change(user4, run_dir=str(tmp_path / "r"), adapter="continue"))
    with (changed(tmp_path / "whole" / "model" / "model.safetensors", other_weights),
          pytest.raises(FieldError, match=f"model.safetensors: recorded {HASH}")):
        evaluate(evaluate_config(tmp_path / "r", trained=tmp_path / "again"))
    # All weights again, from the adapter on the whole model.
    attack(attack_config(tmp_path / "user5", tmp_path / "whole2", trains="all"))
    assert inputs.left_model(tmp_path / "whole2")


@pytest.mark.long
def test_a_chain_over_quantised_weights(model_dir, tmp_path):
    """Old adapters are frozen beside the weights, which are the same however many there are."""
    align(align_config(model_dir, tmp_path / "first", targets=TARGETS, quantisation="int8"))
    start = tmp_path / "first"
    for name in ("user1", "user2"):
        attack(attack_config(start, tmp_path / name, adapter="new", learning_rate=1e-2))
        start = tmp_path / name
    align(align_config("", tmp_path / "again", start=str(start), targets=TARGETS))
    found = recorded(tmp_path / "again")["flags"]
    assert found["quantisation"] == "int8" and found["model"] == model_dir
    base = stage.load_base(model_dir, "float32", quantisation="int8")
    one = load_adapter(tmp_path / "again" / "adapter", adapted := base.model.clone(
        lora=read_lora_config(tmp_path / "again" / "adapter")))
    left = stage.load_base(model_dir, "float32", tmp_path / "again", quantisation="int8")
    expected = np.asarray(logits(adapted, one, base.frozen))
    np.testing.assert_allclose(logits(left.model.clone(lora=left.lora), left.adapter, left.frozen), expected, rtol=0,
                               atol=rounding.forward(base.model.config, expected))
