"""A method's config holds what that method reads and nothing else, and becomes the defense that it describes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxvaccine import defenses
from jaxvaccine.experiment import config, methods
from jaxvaccine.llama import in_mlp
from tests import tiny

T_VACCINE = {"rho", "layers", "sample_every", "probe_every", "freeze", "importance", "draw", "direction"}
REPNOISE = {"ascent_weight", "noise_weight"}
TAR = {"inner_steps", "inner_learning_rate", "adversary", "tamper_weight", "retain_weight"}
BOOSTER = {"lam", "alpha", "exact", "last_term", "base_defense"}
# Every method with the flat names that it reads.
ALIGNMENT = {
    methods.Sft(): set(), methods.Vaccine(): {"rho", "direction"}, methods.TVaccine(): T_VACCINE,
    methods.RepNoise(): REPNOISE, methods.Tar(): TAR, methods.Booster(): BOOSTER,
    methods.Booster(base=methods.TVaccine()): BOOSTER | T_VACCINE, methods.Booster(base=methods.Tar()): BOOSTER | TAR}
FINE_TUNING = {
    methods.Undefended(): set(), methods.Lisa(): {"lisa_alignment_steps", "lisa_user_steps", "lisa_rho"},
    methods.Ewc(): {"ewc_lam"}, methods.Kl(): {"kl_lam"}}
ids = {"ids": lambda value: type(value).__name__ if dataclasses.is_dataclass(value) else None}


def looked_at(method, *arguments):
    """The fields of a method that making its defense looks at."""
    seen = set()

    class Spy(type(method)):
        def __getattribute__(self, name):
            seen.add(name)
            return super().__getattribute__(name)

    spy = object.__new__(Spy)
    spy.__dict__.update(vars(method))
    spy.make(*arguments)
    return seen & {field.name for field in dataclasses.fields(method)}


def test_every_method_is_looked_at():
    assert {type(method) for method in ALIGNMENT} == set(methods.ALIGNMENT.values())
    assert {type(method) for method in FINE_TUNING} == set(methods.FINE_TUNING.values())
    assert set(methods.BASES.values()) == set(methods.ALIGNMENT.values()) - {methods.Booster}


@pytest.mark.parametrize("method, names", [*ALIGNMENT.items(), *FINE_TUNING.items()], **ids)
def test_a_method_reads_what_it_holds(method, names):
    assert config.flat(method).keys() == names
    arguments = (None,) if method in ALIGNMENT else (None, 10, None)
    assert looked_at(method, *arguments) == {field.name for field in dataclasses.fields(method)}


@pytest.mark.parametrize("method, batches", [
    (methods.Sft(), ("alignment",)), (methods.Vaccine(), ("alignment",)),
    (methods.TVaccine(layers=2), ("alignment", "harmful")),
    (methods.TVaccine(layers=2, importance="alignment"), ("alignment",)),
    (methods.TVaccine(layers=2, importance="uniform"), ("alignment",)), (methods.Booster(), ("alignment", "harmful")),
    (methods.RepNoise(), ("alignment", "harmful", "harmless")), (methods.Tar(), ("alignment", "harmful", "adversary")),
    (methods.Booster(base=methods.Tar()), ("alignment", "harmful", "adversary")), (methods.Undefended(), ("user",)),
    (methods.Lisa(), ("user", "alignment")), (methods.Kl(), ("user",)),
], **ids)  # fmt: skip
def test_batches(method, batches):
    """What a method says it reads is all that its gradient takes."""
    assert method.batches == batches
    model = tiny.model(rank=2, targets=("v_proj", "up_proj"))
    shapes = jax.eval_shape(lambda: tiny.trees(model))
    defense = method.make(model) if batches[0] == "alignment" else method.make(model, 10, None)
    rows = {name: tiny.batch(rows=4) for name in batches}
    taken = set()

    class Watched(dict):
        def __getitem__(self, name):
            taken.add(name)
            return super().__getitem__(name)

    dtype = jax.eval_shape(lambda: jax.random.key(0))
    jax.eval_shape(lambda a, f, k: defense.gradient(a, f, defense.init(a), Watched(rows), k), *shapes, dtype)
    assert taken == set(batches)


def test_settings_reach_the_library(monkeypatch):
    """What is called with what."""
    calls = []

    def record(name):
        return lambda *args, **more: calls.append((name, args, more)) or name

    for name in ("sft", "vaccine", "t_vaccine", "booster", "repnoise", "tar", "lisa", "ewc", "kl"):
        monkeypatch.setattr(defenses, name, record(name))
    for name in ("causal_lm_loss", "loss_and_kl", "negative_entropy", "loss_and_hidden_distance", "noise_and_ascent"):
        monkeypatch.setattr(methods, name, lambda model, name=name: (name, model))
    monkeypatch.setattr(optax, "sgd", lambda rate: ("sgd", rate))
    loss = ("causal_lm_loss", "M")

    def called(make):
        calls.clear()
        make()
        return calls[-1]

    t_vaccine = methods.TVaccine(0.3, 2, 3, 4, "released", "uniform", "top", "gaussian")
    expected = ("t_vaccine", (loss, 0.3, 2, 3, 4), {"freeze": "released", "importance": "uniform", "draw": "top",
                                                     "direction": "gaussian", "in_mlp": in_mlp})
    assert called(lambda: t_vaccine.make("M")) == expected
    booster = methods.Booster(2.0, 0.3, True, False, t_vaccine)
    assert called(lambda: booster.make("M")) == (
        "booster", (loss, 2.0, 0.3), {"base": "t_vaccine", "exact": True, "last_term": False})
    assert calls[-2] == expected, "the base's own settings"
    tar = methods.Tar(2, 0.1, "sgd", 3.0, 0.5)
    for make, expected in [
        (lambda: methods.Sft().make("M"), ("sft", (loss,), {})),
        (lambda: methods.Vaccine(0.7, "gaussian").make("M"), ("vaccine", (loss, 0.7, "gaussian"), {})),
        (lambda: methods.RepNoise(0.7, 0.02).make("M"), (
            "repnoise", (loss, ("noise_and_ascent", "M"), 0.7, 0.02), {})),
        (lambda: tar.make("M"), ("tar", (loss, ("negative_entropy", "M"), ("loss_and_hidden_distance", "M"),
                                         ("sgd", 0.1), 2, 3.0, 0.5), {})),
        (lambda: methods.Undefended().make("M", 50, None), ("sft", (loss,), {"batch": "user"})),
        # The proximal term acts after a tenth of all steps.
        (lambda: methods.Lisa(1, 2, 0.5).make("M", 50, None), ("lisa", (loss, 1, 2, 0.5, 5.0), {})),
        (lambda: methods.Ewc(7.0).make("M", 50, "F"), ("ewc", (loss, 7.0, "F"), {})),
        (lambda: methods.Kl(0.3).make("M", 50, None), ("kl", (("loss_and_kl", "M"), 0.3), {})),
    ]:
        assert called(make) == expected


def test_the_simulated_attack_has_pytorchs_weight_decay():
    params = {"x": jnp.array([1.0, -2.0])}
    for method, expected in ((methods.Tar(inner_learning_rate=0.1), -0.1 * (1 + 0.01 * np.array([1.0, -2.0]))),
                             (methods.Tar(inner_learning_rate=0.1, adversary="sgd"), [-0.3, -0.3])):
        gradient = {"x": jnp.array([3.0, 3.0])}
        optimizer = method.optimizer()
        update, _ = optimizer.update(gradient, optimizer.init(params), params)
        np.testing.assert_allclose(update["x"], expected, rtol=1e-5)


def test_uses():
    tar = methods.Tar(inner_steps=2)
    assert methods.uses(tar, methods.Tar) is tar and methods.uses(methods.Booster(base=tar), methods.Tar) is tar
    assert methods.uses(methods.Booster(), methods.Tar) is None and methods.uses(methods.Sft(), methods.Booster) is None


@pytest.mark.parametrize("made, message", [
    (lambda: methods.Vaccine(rho=-1.0), "rho: found -1.0"), (lambda: methods.TVaccine(layers=0), "layers: found 0"),
    (lambda: methods.Booster(lam=-1.0), "lam: found -1.0"),
    (lambda: methods.Tar(inner_steps=0), "inner_steps: found 0"),
    (lambda: methods.Tar(inner_learning_rate=-1.0), "inner_learning_rate: found -1.0, expected at least 0"),
    (lambda: methods.RepNoise(noise_weight=float("nan")), "noise_weight: found nan, expected a finite number"),
    (lambda: methods.RepNoise(ascent_weight=-1.0), "ascent_weight: found -1.0"),
    (lambda: methods.Lisa(user_steps=0), "lisa_user_steps: found 0, expected at least 1"),
    (lambda: methods.Lisa(rho=-1.0), "lisa_rho: found -1.0"),
    (lambda: methods.Ewc(lam=-1.0), "ewc_lam: found -1.0"), (lambda: methods.Kl(lam=-1.0), "kl_lam: found -1.0"),
    (lambda: methods.Vaccine(direction="up"), "direction: found 'up', expected one of gradient, gaussian"),
])  # fmt: skip
def test_what_is_refused(made, message):
    """By the name of the flag, not of the library's parameter."""
    with pytest.raises(config.FieldError, match=f"^{message}"):
        made()
