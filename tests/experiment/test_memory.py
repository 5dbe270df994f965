"""What fits, the largest batch and the flag that helps, by the formula; a GPU is one that a test describes."""

import dataclasses
import functools
import types
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks.memory import SIZES
from jaxvaccine import optim
from jaxvaccine.experiment import memory, methods
from jaxvaccine.experiment.memory import FRACTION, GIB, Step, Target
from jaxvaccine.llama import Llama
from jaxvaccine.llama_config import LoraConfig
from tests import tiny


def step(size="llama-2-7b", method=None, rows=10, harmful_rows=10, length=256, dtype=jnp.bfloat16, remat="full",
         microbatch=0, quantisation="none"):
    model = Llama(SIZES[size], LoraConfig(8), dtype, remat=remat, microbatch_size=microbatch)
    return Step(model, method or methods.Booster(), rows, harmful_rows, length, quantisation)


@pytest.mark.parametrize("method", [methods.Sft(), methods.Vaccine(), methods.RepNoise(), methods.Tar(), methods.Kl()])
def test_the_largest_batch(method):
    """It fits, and one row more does not."""
    room = memory.card("rtx_4090").largest
    rows = memory.largest_batch(step(method=method), room)
    assert 10 < rows < 200
    peaks = [dataclasses.replace(step(method=method), rows=n, harmful_rows=n).estimate().peak for n in (rows, rows + 1)]
    assert peaks[0] <= room < peaks[1]
    assert memory.largest_batch(step("llama-2-13b", method), room) == 0


@pytest.mark.parametrize("given, less, flag, more", [
    ({"remat": "none"}, 8, "--remat=full", None),
    ({"dtype": jnp.float32}, 8, "--dtype=bfloat16", None),
    ({"rows": 60, "harmful_rows": 8}, 2, "--microbatch_size={0}", 1),
    ({"rows": 60, "harmful_rows": 60, "method": methods.Vaccine()}, 8, "--quantisation=nf4", None),
    ({"rows": 60, "harmful_rows": 60, "method": methods.Vaccine(), "quantisation": "nf4"}, 8, "--batch_size={0}", 1),
    ({"rows": 60, "harmful_rows": 60, "method": methods.Booster(base=methods.Vaccine()), "quantisation": "nf4"}, 8,
     "--batch_size={0} --harmful_batch_size={1}", 1),
    ({"quantisation": "nf4", "rows": 1, "harmful_rows": 1, "length": 2048}, 1, "--max_length={0}", 64),
    ({"quantisation": "nf4", "rows": 1, "harmful_rows": 1, "length": 64, "method": methods.TVaccine(layers=32)}, 0.004,
     "--layers={0}", 1),
])
def test_the_flag_that_helps(given, less, flag, more):
    """The first that makes it fit, so many GiB below, and the least change: more of what it sets does not fit."""
    of = step(**given)
    room = of.estimate().peak - int(less * GIB)
    found, peak, enough = memory.helpful_flag(of, room, 64)
    assert enough and peak <= room
    value = int(found.rpartition("=")[2]) if more else 0
    assert found == flag.format(value, value)
    if more:
        changed = next(changed for text, changed, values in of.changes(64) if text.format(value) == found)
        assert changed(value).estimate().peak == peak and changed(value + more).estimate().peak > room


def test_where_no_flag_is_enough():
    """An attack's backbone is kept as the alignment's."""
    of = functools.partial(step, "llama-2-13b", methods.Lisa())
    found, peak, enough = memory.helpful_flag(of(), memory.card("rtx_4090").largest, 64)
    assert not enough and found == "--batch_size=1"
    assert peak == of(rows=1, harmful_rows=1).estimate().peak
    least = step(rows=1, harmful_rows=1, length=1, method=methods.Lisa())
    assert memory.helpful_flag(least, GIB, 64)[0].startswith("--rank=")


def test_rows_computed_at_a_time():
    """The memory of these rows, and of the gradients' sum a tree more; perturbations are there of all rows."""
    apart, alike = step(rows=20, harmful_rows=8, microbatch=5).estimate(), step(rows=5, harmful_rows=5).estimate()
    assert apart.boundaries == alike.boundaries and apart.gradients == alike.gradients + alike.adapter
    assert step(rows=20, harmful_rows=5, microbatch=5).estimate().gradients == alike.gradients
    apart, alike = (step(rows=rows, microbatch=5, method=methods.Vaccine()).estimate() for rows in (20, 5))
    assert apart.perturbations == (4 + 2) * alike.perturbations


def device(platform="gpu", **stats):
    return types.SimpleNamespace(platform=platform, device_kind="A GPU", memory_stats=lambda: stats or None)


def test_this_machine(monkeypatch):
    """What JAX took is a part of what the card has, the part that the environment says."""
    monkeypatch.delenv(FRACTION, raising=False)
    monkeypatch.setattr(memory.jax, "local_devices", lambda: [device(bytes_limit=18 * GIB, bytes_in_use=8 * GIB)])
    assert memory.this_machine() == Target("A GPU", 24 * GIB, 18 * GIB)
    assert memory.free_memory() == pytest.approx((1 - memory.MARGIN) * 10 * GIB, abs=1)
    monkeypatch.setenv(FRACTION, "0.9")
    assert memory.this_machine() == Target("A GPU", 20 * GIB, 18 * GIB)
    for none in (device("cpu", bytes_limit=1), device(), device(other=1)):
        monkeypatch.setattr(memory.jax, "local_devices", lambda none=none: [none])
        assert memory.this_machine() is None and memory.free_memory() is None
        assert memory.rows_that_fit(tiny.model(), [np.zeros(3)], 8, 16) is None


def test_rows_follow_from_the_memory(monkeypatch):
    """In eights; what they take is there, and eight more would not be."""
    model = Llama(SIZES["llama-2-7b"], LoraConfig(8), jnp.bfloat16)
    monkeypatch.setattr(memory.jax, "local_devices", lambda: [device(bytes_limit=22 * GIB, bytes_in_use=13 * GIB)])
    rows = memory.rows_that_fit(model, [np.zeros(80), np.zeros(20)], 200, 32)
    of = memory.decoding(model, [np.zeros(80)], 200, 32, 1)
    assert rows % 8 == 0 and rows > 8 and (of.positions, of.prompt) == (288, 96)

    def beside(rows):
        found = dataclasses.replace(of, rows=rows).estimate()
        return found.peak - found.weights - found.adapter

    assert beside(rows) <= memory.free_memory() < beside(rows + 8)
    monkeypatch.setattr(memory.jax, "local_devices", lambda: [device(bytes_limit=GIB, bytes_in_use=GIB)])
    assert memory.rows_that_fit(model, [np.zeros(80)], 200, 32) == 1, "one is tried"


@pytest.mark.parametrize("peak, said", [
    (10, "it fits in the 18.0 that JAX takes when it starts"),
    (20, "it fits, with XLA_PYTHON_CLIENT_MEM_FRACTION=0.84: JAX takes 18.0 when it starts, unless told"),
    (24, "0.5 too few"),
])
def test_the_verdict(peak, said):
    target = Target("some card", 24 * GIB, 18 * GIB)
    assert memory.verdict(peak * GIB, target) == f"some card: of 23.5 GiB beside CUDA's own, {said}"


@pytest.mark.parametrize("gib, remat", [(80, "none"), (30, "dots"), (24, "full"), (1, "full")])
def test_as_little_is_computed_anew_as_there_is_memory_for(monkeypatch, gib, remat):
    """Of this machine's GPU, or of the card that is meant; what was asked for is what there is, on any."""
    target = Target("A GPU", gib * GIB, gib * GIB)
    monkeypatch.setattr(memory, "this_machine", lambda: target)
    of = step(method=methods.Sft())
    expected = dataclasses.replace(of, model=of.model.clone(remat=remat))
    assert memory.with_remat("auto", of) == expected and memory.with_remat("full", of) == of
    assert remat == "full" or expected.estimate().peak < 0.9 * gib * GIB
    monkeypatch.setattr(memory, "this_machine", lambda: None)
    assert memory.with_remat("auto", of, target) == expected


@pytest.mark.parametrize("pages, remat", [(2**23, "dots"), (2**10, "full")])
def test_a_cpu_keeps_products(monkeypatch, pages, remat):
    monkeypatch.setattr(memory.jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(memory, "this_machine", lambda: None)
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": pages}.get)
    of = step("llama-3.2-1b", method=methods.Sft(), rows=2, harmful_rows=2, dtype=jnp.float32)
    assert memory.with_remat("auto", of).model.remat == remat


def test_each_optimizer_counts_what_it_keeps():
    """In bytes beside the adapter [L, in, out], at 4 bytes a number; a few counts aside."""
    adapter = step(method=methods.Sft()).estimate().adapter
    kept = {kind: dataclasses.replace(step(method=methods.Sft()), optimizer=kind).estimate().optimizer / adapter
            for kind in get_args(optim.Kind)}
    assert kept["sgd"] == kept["normalised_sgd"] < 1e-6
    assert {kind: round(kept[kind], 3) for kind in ("adamw", "momentum", "muon")} == {
        "adamw": 2, "momentum": 1, "muon": 1}
    # A mean for each row and each column of a matrix [d, 8].
    assert 1 / 8 < kept["adafactor"] < 1 / 8 + 0.01
