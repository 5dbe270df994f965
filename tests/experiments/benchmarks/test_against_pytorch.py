"""Both sides of a training step at their smallest: the same computation, and an error where it is not."""

import math

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch

from experiments.benchmarks import against_pytorch, our_step, pytorch_step
from tests.experiments import small

pytestmark = pytest.mark.usefixtures("quick_compile")

SMALL = {"rows": 2, "length": 8, "supervised": 4, "rank": 2, "remat": "none"}


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    monkeypatch.setattr(against_pytorch, "PAUSE", 0.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def rows_of(text):
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in lines[2:]}


def test_the_benchmark(shape_dir):
    text = against_pytorch.benchmark(against_pytorch.AgainstConfig(
        model=shape_dir, methods=("vaccine",), repeats=2, **SMALL))
    assert "2 rows of 8 tokens, 4 supervised, LoRA rank 2 on q_proj, k_proj, v_proj" in text
    assert "without checkpointing" in text and "Medians of 2 rounds" in text
    (ours, theirs, ratio, loss, norm), = rows_of(text).values()
    assert float(ours) > 0 and float(theirs) > 0 and "–" in ratio
    # Not merely within what is allowed: rounding.
    assert float(loss) < 1e-6 and float(norm) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("dtype, methods", [
    ("float32", ("sft", "vaccine", "t_vaccine", "booster", "repnoise", "tar")), ("bfloat16", ("t_vaccine", "booster"))])
def test_every_method(shape_dir, dtype, methods):
    text = against_pytorch.benchmark(against_pytorch.AgainstConfig(
        model=shape_dir, methods=methods, repeats=1, dtype=dtype, checkpointing=True, **SMALL))
    rows = rows_of(text)
    assert [name for name in rows if "," not in name] == list(methods)
    assert {"t_vaccine, a step with its probe", "t_vaccine, with a probe every 200 steps"} < set(rows)
    for name, cells in rows.items():
        assert float(cells[3]) < (1e-6 if dtype == "float32" else 1e-3), name
        assert float(cells[4]) < (1e-5 if dtype == "float32" else 2e-2), name


def test_another_computation_is_an_error(shape_dir, monkeypatch):
    loss = pytorch_step.UsersModel.loss
    monkeypatch.setattr(pytorch_step.UsersModel, "loss", lambda self, batch: 1.01 * loss(self, batch))
    config = against_pytorch.AgainstConfig(model=shape_dir, methods=("sft",), repeats=1, **SMALL)
    with pytest.raises(FloatingPointError, match=r"sft, step 1: loss: found .* \(jaxvaccine\) and .* \(PyTorch\)"):
        against_pytorch.benchmark(config)


def test_differences():
    part = our_step.StepPart(dtype="bfloat16")
    assert our_step.differences(part, "sft", {"loss": 1.0, "gradient_norm": 2.0},
                                {"loss": 1.009, "gradient_norm": 2.1}) == []
    wrong = our_step.differences(part, "sft", {"loss": 1.02, "gradient_norm": math.nan},
                                 {"loss": 1.0, "gradient_norm": 2.0})
    assert [text.split(":")[1] for text in wrong] == [" loss", " gradient_norm"]


def found_by(shape_dir, method, **changes):
    part = our_step.StepPart(model=shape_dir, **SMALL, **changes)
    side = pytorch_step.Theirs(part, part.method(method, every=1), pytorch_step.make_model(part, "cpu"))
    side.draws = [1]
    found = []
    for _ in range(2):
        side.step()
        found += side.last()[:2]
    return found


@pytest.mark.parametrize("method", ["vaccine", "t_vaccine", "booster"])
def test_pytorchs_options_change_no_number(shape_dir, method):
    """Checkpointing runs hooks twice, which perturb; logits can be left out where nothing is supervised."""
    usual = found_by(shape_dir, method)
    assert found_by(shape_dir, method, checkpointing=True) == pytest.approx(usual, rel=1e-5)
    assert found_by(shape_dir, method, supervised_logits=True) == pytest.approx(usual, rel=1e-5)


def test_a_probes_share():
    of = against_pytorch.Compared(against_pytorch.Times([1.0], [2.0]), against_pytorch.Times([3.0], [10.0]), 0.0, 0.0)
    rows = list(against_pytorch.lines(against_pytorch.AgainstConfig(probe_every=4), "t_vaccine", of))
    assert [row[1:4] for row in rows] == [
        ["1", "2", "2.00 (2.00–2.00)"], ["3", "10", "3.33 (3.33–3.33)"], ["1.5", "4", "2.67 (2.67–2.67)"]]


def test_flags_are_checked():
    for flag, message in (("--rows=0", "--rows: found 0"), ("--supervised=128", "--supervised: found 128"),
                          ("--methods=lisa", "--methods: found"), ("--targets=qkv", "--targets: found"),
                          ("--repeats=0", "--repeats: found 0")):
        with pytest.raises(SystemExit, match=message):
            small.call(against_pytorch.VERB, flag)
