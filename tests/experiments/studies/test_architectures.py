"""Families side by side at their smallest, and their table against numbers by hand."""

import dataclasses

import jax
import pytest

from experiments.studies import architectures
from experiments.studies.architectures import ArchitecturesConfig
from experiments.tools.make_world_base import BaseConfig
from jaxvaccine import llama, save_model
from jaxvaccine.data import world
from jaxvaccine.experiment.config import make
from jaxvaccine.json_files import write_json
from jaxvaccine.report.results import read_results
from tests.experiments import small
from tests.report import synthetic
from tests.report.synthetic import rows_of

pytestmark = pytest.mark.usefixtures("quick_compile")
FAMILIES = ("llama", "mistral", "qwen2", "gemma2")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{family: the directory of a base with random weights}."""
    root = tmp_path_factory.mktemp("bases")
    vocab_size = world.write_tokenizer(root)
    write_json(root / "config.json", {"eos_token_id": 0})
    config = make(BaseConfig, {"directory": "-", "hidden_size": 32, "intermediate_size": 48, "num_layers": 2})
    found = {}
    for family in FAMILIES:
        model = llama.Llama(dataclasses.replace(config, family=family).architecture(vocab_size))
        frozen = llama.init_frozen(model, jax.random.key(0))
        found[family] = str(save_model(model, frozen, root / family, tokenizer_from=root))
    return found


@pytest.mark.long
def test_end_to_end(bases, tmp_path):
    root = tmp_path / "a"
    chosen = [bases[family] for family in ("qwen2", "gemma2")]
    small.call(architectures.VERB, f"--run_dir={root}", f"--model={','.join(chosen)}", *small.FLAGS,
               *small.ATTACK_FLAGS, "--score_steps=1", "--sst2_test=", "--benign_test=", "--defenses=sft,t_vaccine",
               "--layers=1")
    table, text = read_results(root), (root / "report.md").read_text()
    assert set(table["backbone"]) == set(chosen) and set(table["method"]) == {"sft", "t_vaccine"}
    assert [row[:2] for row in rows_of(text, "HS % along the attack:")] == [
        ["family", "bases"], ["Qwen2", "1"], ["Gemma2", "1"]]
    assert (root / "architectures.png").stat().st_size > 1000 and "Missing so far" not in text


def test_a_row_a_family(bases, tmp_path):
    """Two bases of one family are one row."""
    again = tmp_path / "llama2"
    again.symlink_to(bases["llama"])
    models = (bases["llama"], bases["gemma2"], str(again))
    config = make(ArchitecturesConfig, {"run_dir": "r", "model": models, "recipe": "world",
                                        "defenses": ("sft", "booster")})
    families = architectures.families_of(models)
    assert families == {"LLaMA": [models[0], models[2]], "Gemma2": [models[1]]}
    rows = []
    for backbone, method, value in ((0, "sft", 80), (2, "sft", 60), (1, "sft", 50), (0, "booster", 20),
                                    (2, "booster", 40), (1, "booster", 50)):
        place = {"backbone": models[backbone], "method": method}
        rows += [synthetic.rate("harmful_score", 0, **place), *(synthetic.rate(
            "harmful_score", value, attack="poison_ratio=0.1", stage="attack", step=step, **place) for step in (1, 2))]
    text = "\n".join(architectures.attack_tables(config, families, synthetic.frame(rows), "poison_ratio=0.1"))

    def means(after):
        return [[cell.split(" ")[0] for cell in row[2:]] for row in rows_of(text, after)[1:]]

    assert means("HS % after the attack") == [["70.0", "30.0"], ["50.0", "50.0"]]
    assert means("HS % along the attack") == [["52.5", "22.5"], ["37.5", "37.5"]]
    assert means("minus SFT's") == [["–", "-30.0"], ["–", "+0.0"]]
