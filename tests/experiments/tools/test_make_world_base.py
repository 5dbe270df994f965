"""The tool that pretrains a base, at its smallest; tests/test_world_base.py looks at the one in the package."""

import pytest

from experiments.tools import make_world_base
from jaxvaccine import data
from jaxvaccine.data import world
from jaxvaccine.experiment.config import make
from tests.experiments import small

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_flags_are_checked():
    for flags, message in (("--directory=d --steps=1", "--steps: found 1, expected at least 2"),
                           ("--steps=2", "--directory: found '', expected a folder"),
                           ("--directory=d --batch_size=0", "--batch_size: found 0")):
        with pytest.raises(SystemExit, match=message):
            small.call(make_world_base.VERB, *flags.split())


@pytest.mark.long
def test_a_base_that_does_not_pass_is_not_written(tmp_path):
    directory = tmp_path / "base"
    config = make(make_world_base.BaseConfig, {
        "directory": str(directory), "steps": 2, "hidden_size": 16, "intermediate_size": 16, "num_layers": 1,
        "num_heads": 2, "test_size": 4})
    with pytest.raises(ValueError, match=r"not written, the base does not pass: .*accuracy_after: found"):
        make_world_base.make_base(config)
    assert not directory.exists()


def test_gates_name_what_does_not_hold():
    for gates in (kind.gates for kind in make_world_base.KINDS.values()):
        check_gates(gates)


def check_gates(gates):
    good = {name: (least + most) / 2 for name, least, most in gates}
    assert make_world_base.failures(good, gates) == []
    for name, least, _ in gates:
        found = make_world_base.failures({**good, name: least - 1}, gates)
        assert len(found) == 1 and found[0].startswith(f"{name}: found {least - 1:.1f}%, expected {least} to ")


def test_a_model_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError):
        make_world_base.make_base(make_world_base.BaseConfig(directory=str(tmp_path), steps=2))


@pytest.mark.parametrize("kind", make_world_base.KINDS)
def test_every_row_fits_into_one_shape(kind, tmp_path):
    of = make_world_base.KINDS[kind]
    assert world.write_tokenizer(tmp_path, of.words()) == len(of.words()) + 6
    tokenized = data.tokenize_examples(data.load_tokenizer(tmp_path), data.load_examples(of.source), of.length)
    assert set(tokenized.fates) == {"kept"} and max(map(len, tokenized.input_ids)) > of.length - 4
    unknown = 1
    assert not any((ids == unknown).any() for ids in tokenized.input_ids)
