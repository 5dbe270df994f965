"""The federated study: its settings, rows and errors; and end to end at its smallest."""

import json

import jax
import numpy as np
import pytest

from experiments.studies import federated
from experiments.studies.federated import FederatedConfig
from jaxvaccine import data, optim, training
from jaxvaccine.experiment import federated as engine
from jaxvaccine.experiment import federated_cells, lanes, stage
from jaxvaccine.experiment.config import FieldError, make
from jaxvaccine.experiment.federated import FederationPart, Setting, harmful_counts, parse_rule
from jaxvaccine.experiment.results import Cell
from jaxvaccine.report.results import read_results
from tests.experiments import small
from tests.report import synthetic
from tests.report.synthetic import rows_of

pytestmark = pytest.mark.usefixtures("quick_compile")


def flags(model_dir, root, *more):
    return (f"--run_dir={root}", f"--model={model_dir}", *small.FLAGS, "--attack_n=20", "--attack_batch_size=4",
            "--clients=5", "--rounds=2", "--local_steps=2", "--score_rounds=1", "--defenses=sft",
            f"--sst2_test={small.TESTS['sst2_test']}", "--benign_test=", *more)


SMALL = ("--harmful_clients=0,0.4", "--splits=iid,sorted", "--rules=fedavg,trimmed_mean:share=0.4:mu=0.1",
         "--rules_at=0.4")


@pytest.mark.long
def test_end_to_end(model_dir, tmp_path):
    root = tmp_path / "a"
    small.call(federated.VERB, *flags(model_dir, root, *SMALL))
    table = read_results(root)
    attacked = table[table["stage"] == "attack"]
    assert attacked["attack"].nunique() == 5 and set(attacked["step"]) == {1, 2}
    harmful = attacked[attacked["measure"] == "harmful_participants"]
    assert set(zip(harmful["attack"].str.contains("=0.4:"), harmful["value"], strict=True)) == {(False, 0), (True, 2)}
    text = (root / "report.md").read_text()
    assert "Missing so far" not in text and {"rounds0.png", "rounds1.png"} <= {path.name for path in root.glob("*.png")}
    # Nothing is computed again, and nothing else goes into the same folder.
    before = {path: path.stat().st_mtime_ns for path in root.glob("*/**/*.json")}
    small.call(federated.VERB, *flags(model_dir, root, *SMALL))
    assert before == {path: path.stat().st_mtime_ns for path in root.glob("*/**/*.json")}
    for flag, found in (("--server_learning_rate=0.5", "federation.server_learning_rate: found 1.0, expected 0.5"),
                        ("--attack_learning_rate=1.0", "learning_rate")):
        with pytest.raises(SystemExit, match=found):
            small.call(federated.VERB, *flags(model_dir, root, *SMALL, flag))
    # A cell that was lost is made again, as it was.
    lost = next(path for path in before if "harmful_clients=0.4_split=sorted" in path.name and "seed5" in str(path))
    old = json.loads(lost.read_text())
    lost.unlink()
    small.call(federated.VERB, *flags(model_dir, root, *SMALL))
    new = json.loads(lost.read_text())
    assert new["clients"] == old["clients"] and [(row["measure"], row["step"]) for row in new["rows"]] == [
        (row["measure"], row["step"]) for row in old["rows"]]
    values = [[row["value"] for row in of["rows"] if "norm" in row["measure"]] for of in (old, new)]
    np.testing.assert_allclose(*values, rtol=1e-4)


def config_of(**given):
    return make(FederatedConfig, {"run_dir": "r", "seeds": ("0", "1"), **given})


def test_settings():
    config = config_of(defenses=("sft", "booster"), harmful_clients=("0", "0.2"), splits=("iid", "sorted"),
                       rules=("fedavg", "median"), rules_at="0.2")
    assert list(config.settings) == [
        "harmful_clients=0:split=iid:rule=fedavg", "harmful_clients=0.2:split=iid:rule=fedavg",
        "harmful_clients=0:split=sorted:rule=fedavg", "harmful_clients=0.2:split=sorted:rule=fedavg",
        "harmful_clients=0.2:split=iid:rule=median"]
    assert len(config.make_plan().pairs) == 10 and len(config.panels()) == 3


def rows_for(part, setting, seed=0, n=60):
    config = config_of(recipe="world")
    of = federated.study_of(config, {}, {"n": n}, {})
    return engine.client_rows(of.settings, Cell("world", "sft", "", seed), setting, part, {},
                              data.load_tokenizer("world"))


def test_rows_of_clients():
    """Honest clients keep theirs when others become harmful; those become so one after the other."""
    part = FederationPart(clients=5, harmful_rows=0.5)
    by_share = {share: rows_for(part, Setting(share, "sorted", "fedavg")) for share in ("0", "0.2", "0.4")}
    forbidden = {data.fingerprint(e) for e in data.load_examples("world_harmful@attack")}

    def bad(rows):
        return [sum(data.fingerprint(e) in forbidden for e in of) for of in rows]

    counts = {share: harmful_counts(part, 60, float(share), 0).tolist() for share in by_share}
    assert {share: bad(rows) for share, rows in by_share.items()} == counts
    assert [sorted(of) for of in counts.values()] == [[0] * 5, [0] * 4 + [6], [0] * 3 + [6, 6]]
    for share, rows in by_share.items():
        prints = [data.fingerprint(e) for of in rows for e in of]
        assert len(set(prints)) == len(prints) == 60
        for of, first, count in zip(rows, by_share["0"], counts[share], strict=True):
            assert of[count:] == first[count:] and len(of) == 12
    assert all(b <= c for b, c in zip(counts["0.2"], counts["0.4"], strict=True))
    labels = [{e.output for e in of} for of in by_share["0"]]
    assert sum(len(of) == 1 for of in labels) >= 4


def test_a_federation_of_one_is_the_users_training(model_dir):
    """Lane by lane, rates by a schedule over all rounds: what the plain step makes of the same batches, with SGD."""
    align = small.align_config(str(model_dir))
    config = small.attack_config(optimizer="sgd", learning_rate=0.5, schedule="linear", steps=4)
    tokenizer, _, start = small.moved_lanes(str(model_dir), align)
    rows = data.tokenize_examples(tokenizer, data.load_examples("world_rating@attack[0:10]"), 16, "alpaca")
    part, seen = FederationPart(clients=1, rounds=2, local_steps=2), {}
    engine.train(start, [engine.Run([rows], np.array([False]), seed) for seed in small.SEEDS], "fedavg", part,
                 config.training, 16, lambda number, of, measured: seen.update({number: of}))
    assert sorted(seen) == [1, 2] and seen[2].count == 2
    seed = small.SEEDS[1]
    stream = data.training_batches({"user": (rows, 4)}, data.batching.stream_seed(seed, "client 0"),
                                   lengths={"user": np.full(4, 16)})
    adapter, frozen = start.lane(1)
    client = config.method.make(start.model, 1, None)
    optimizer = optim.layer_masked_optimizer(config.training.optimizer(), 4)
    state, step = training.init_train_state(adapter, client, optimizer), training.make_train_step(client, optimizer)
    for number in range(4):
        state, _ = step(state, frozen, stream(number), stage.training_key(seed))
    moved = max(float(abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (state.adapter, adapter)), strict=True))
    assert moved > 1e-3
    for found, expected in zip(*map(jax.tree.leaves, (lanes.take(seen[2].adapters, 1), state.adapter)), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-3 * moved)  # float32 sums, compiled otherwise


def test_rules():
    assert parse_rule("fedavg", 4).mu == 0 and parse_rule("fedprox", 4).mu == engine.MU
    assert parse_rule("fedprox:mu=0.5", 4).mu == 0.5 and parse_rule("median:mu=2", 4).mu == 2
    ones = {"w": np.arange(5.0)[:, None]}
    assert float(parse_rule("trimmed_mean:share=0.4", 5).aggregate(ones, np.ones(5))["w"][0]) == 2
    assert federated.rule_name("trimmed_mean:share=0.4") == "trimmed mean (share = 0.4)"


@pytest.mark.parametrize("text, expected", [
    ("krum", "one of fedavg, median"), ("median:share=0.1", "no other setting than mu"),
    ("fedprox:mu=x", "a number in the place of 'x'"), ("fedprox:mu=-1", "mu of at least 0"),
    ("trimmed_mean:share=0.1", "0.1 of 5 clients a round, which cuts none"), ("clipped_mean:norm=0", "above 0")])
def test_rules_that_are_none(text, expected):
    with pytest.raises(FieldError, match=f"rules: found .*{expected}"):
        parse_rule(text, 5)


def test_labels_of_clients():
    rows = [[data.prompts.Example("q", "", of) for of in answers] for answers in ("aab", "ca", "d")]
    assert federated_cells._labels(rows) == [{"a": 2}, {"a": 1}, {}]


def test_where_rules_are_compared():
    with pytest.raises(FieldError, match="rules_at: found 2"):
        config_of(rules_at="2")
    alone = config_of(rules=("fedavg",), clients=1, harmful_clients=("1",))
    assert alone.compared == [] and len(alone.settings) == 2


@pytest.mark.parametrize("flag, expected", [
    ("--harmful_clients=0.3", "--harmful_clients: found 0.3.*whole number"), ("--harmful_clients=x", "a number from 0"),
    ("--participation=0.5", "--participation: found 0.5"), ("--participation=1.2", "--participation: .*at most 1"),
    ("--splits=even", "--splits: found 'even'"), ("--rules=krum", "--rules: found 'krum'"),
    ("--score_rounds=3", "--score_rounds: .*from 1 to 2"),
    ("--defenses=sft+lisa", "--defenses: found 'sft\\+lisa'"), ("--attack_n=4", "--attack_n: found 4 rows for 5"),
    ("--harmful_rows=0.01", "--harmful_rows: found 0.01"), ("--attack_steps=3", "attack_steps"),
    ("--harmful_clients=0.4,0.40", "--harmful_clients: .*each part once"),
    ("--server_learning_rate=inf", "--server_learning_rate: found inf, expected a finite number"),
    ("--lam=1", "--lam: found 1.0, expected nothing: no method of the plan reads it")])
def test_flags(model_dir, tmp_path, flag, expected):
    with pytest.raises(SystemExit, match=expected):
        small.call(federated.VERB, *flags(model_dir, tmp_path / "a", "--harmful_clients=0.4", "--rules=fedavg",
                                          "--rules_at=0.4", flag))
    assert not (tmp_path / "a").exists()


def test_the_report(tmp_path):
    config = config_of(defenses=("sft", "booster"), harmful_clients=("0", "0.2"), splits=("iid",),
                       rules=("fedavg", "median"), rules_at="0.2", score_rounds=("5",))
    rows = []
    for method, seed in ((m, s) for m in config.methods for s in (0, 1)):
        rows.append(synthetic.rate("harmful_score", 0, method=method, seed=seed))
        for text, setting in config.settings.items():
            place = {"method": method, "seed": seed, "attack": text, "stage": "attack"}
            end = 300 * float(setting.harmful_clients) * (0.5 if setting.rule == "median" else 1)
            rows += [synthetic.rate("harmful_score", end / 3 + seed, step=5, **place),
                     synthetic.rate("harmful_score", end * (method == "sft") + seed, step=20, **place),
                     synthetic.rate("sst2", 90, step=20, **place), synthetic.row("update_norm_others", 0.25, step=20,
                                                                                  **place)]
    text = federated.report(config, synthetic.frame(rows), tmp_path)
    over = rows_of(text, "HS %, mean ± standard deviation over runs:")
    assert over[0][2:] == ["round 0", "round 5", "round 20"]
    assert [[cell.split(" ±")[0] for cell in row] for row in over[1:]] == [
        ["0", "SFT", "0.0", "0.5", "0.5"], ["0", "Booster", "0.0", "0.5", "0.5"],
        ["0.2", "SFT", "0.0", "20.5", "60.5"], ["0.2", "Booster", "0.0", "20.5", "0.5"]]
    assert "FedAvg" in text and "| SFT | median | 0.0" in text and "Missing so far" not in text
    assert (tmp_path / "rounds0.png").stat().st_size > 1000 and (tmp_path / "panel1.png").exists()
