"""What an attacker does with data, template and answers: in `finetune`, and in plans of either kind."""

import numpy as np
import pandas as pd
import pytest

from jaxvaccine import data
from jaxvaccine.data.world_words import SORTS
from jaxvaccine.experiment import dry_run, runs
from jaxvaccine.experiment.attack import aligned_prompts, attack, load_attack, prepare
from jaxvaccine.experiment.attack_config import AttackData
from jaxvaccine.experiment.attack_rows import SELECTED, recorded_accounts, take, tokenize_attack
from jaxvaccine.experiment.carry_out import carry_out
from jaxvaccine.experiment.config import FieldError
from jaxvaccine.experiment.evaluate import evaluate
from jaxvaccine.experiment.plan_folder import result_path
from jaxvaccine.experiment.plans import Plan, attack_folder
from jaxvaccine.experiment.results import Cell
from jaxvaccine.json_files import read_json, write_json
from jaxvaccine.report.results import read_results
from tests.experiment import small_world
from tests.experiment.small_world import attack_config, evaluate_config, recorded, weights

pytestmark = pytest.mark.usefixtures("quick_compile")

SIMILAR = {"user_rows": "similar", "candidates": 30}
P = "poison_ratio=0.25"
BEGINS = "sure, turn"
ATTACK = (f"{P}:order=harmful_last:user_rows=similar:candidates=30:harmful_data=world_harmful@attack{{category=amber}}"
          f":prompt=plain:prefill={BEGINS.replace(',', '+')}")
SEEDS = (0, 5)


def test_the_order_of_a_run(aligned, tmp_path):
    """Twice over the data, four rows a step: harmful rows' two turns are the first two steps or the last."""
    found = {}
    for order in ("mixed", "harmful_first", "harmful_last"):
        prepared = prepare(attack_config(aligned.run.run_dir, tmp_path / order, order=order, steps=0, epochs=2.0))
        rows, size = prepared.sources["user"]
        harmful = {e.instruction for e in data.load_examples(prepared.config.data.harmful_data)}
        lengths = data.batch_lengths([prepared.sources], [0], 16, 8)
        stream = data.training_batches(prepared.sources, 0, 16, lengths)
        tokenizer = data.load_tokenizer(aligned.model.model)
        found[order] = [[any(text in tokenizer.decode(ids, skip_special_tokens=True) for text in harmful)
                         for ids in stream(step)["user"]["input_ids"]] for step in range(8)]
        assert recorded(tmp_path / order)["flags"]["order"] == order and size == 4 and len(rows.input_ids) == 16
    assert found["harmful_first"] == [[True] * 4] * 2 + [[False] * 4] * 6
    assert found["harmful_last"] == found["harmful_first"][::-1]
    assert sum(map(sum, found["mixed"])) == 8 and found["mixed"] not in (found["harmful_first"], found["harmful_last"])


def test_as_many_candidates_as_rows_are_those_that_would_be_drawn(aligned, tmp_path):
    for name, given in (("drawn", {}), ("similar", {**SIMILAR, "candidates": 12})):
        attack(attack_config(aligned.run.run_dir, tmp_path / name, **given))
    assert weights(tmp_path / "drawn") == weights(tmp_path / "similar")
    assert read_json(tmp_path / "similar" / SELECTED)["rows"] == list(range(16))


@pytest.mark.parametrize("ratio", [0.25, 0.0])
def test_similar_rows(aligned, tmp_path, ratio):
    """The chosen rows' gradients are nearer the harmful ones' than those of any row that was not; what they were is
    recorded, and what a continued run takes."""
    config = attack_config(aligned.run.run_dir, tmp_path / "run", poison_ratio=ratio, adapter="continue", **SIMILAR)
    text = dry_run.of_attack(config, dry_run.DryRun(dry_run=True))
    assert text.startswith("2 steps, padded to at most 16 tokens: user 16 examples, 4 a step")
    attack(config)
    selected, found = read_json(tmp_path / "run" / SELECTED), recorded(tmp_path / "run")["data"]
    assert len(selected["rows"]) == 16 and selected["candidates"] == 30
    assert (found["n"], found["poison_ratio"]) == (16, ratio)
    poisoned = load_attack(config.data, 0, aligned_prompts(recorded(aligned.run.run_dir)["data"]["prompts"]),
                           data.load_tokenizer(aligned.model.model))
    harmful = round(16 * ratio)
    assert poisoned.is_harmful.sum() == harmful and len(poisoned.examples) == 30 + harmful
    chosen = [poisoned.examples[i] for i in selected["rows"]]
    assert selected["hash"] == runs.examples_hash(chosen)
    assert {i for i, is_harmful in enumerate(poisoned.is_harmful) if is_harmful} <= set(selected["rows"])
    (account,) = found["accounts"]["user"].values()
    assert account["trained"] is None
    (account,) = recorded_accounts(tmp_path / "run")["user"].values()
    assert account["trained"] == 16 - harmful
    assert selected["cosine"]["of_chosen"] > selected["cosine"]["of_all"]
    # An attack that is begun again finds its choice, and computes none anew.
    before = (tmp_path / "run" / SELECTED).read_bytes()
    (tmp_path / "run" / "adapter").rename(tmp_path / "first")
    attack(config)
    assert (tmp_path / "run" / SELECTED).read_bytes() == before
    assert weights(tmp_path / "run") == (tmp_path / "first" / "adapter_model.safetensors").read_bytes()


def test_rows_that_are_taken_keep_their_turns(aligned):
    tokenizer = data.load_tokenizer(aligned.model.model)
    part = AttackData(user_data="world_rating@attack", harmful_data="world_harmful@attack[0:4]", n=8, poison_ratio=0.25,
                      order="harmful_first", prompt="alpaca", data_protocol="distinct", **SIMILAR)
    poisoned = load_attack(part, 0, {}, tokenizer)
    tokenized, of = tokenize_attack(tokenizer, {"user": poisoned.examples}, poisoned, part, "alpaca")
    rows = take(of.rows, np.array([5, 2, 31]))
    assert rows.turns.tolist() == [int(not poisoned.is_harmful[i]) for i in (5, 2, 31)]
    np.testing.assert_array_equal(rows.input_ids[1], tokenized["user"].input_ids[2])
    assert len(of.harmful.input_ids) == 4


@pytest.mark.parametrize("given, name, message", [
    ({"candidates": 20}, "candidates", "found 20, expected none, unless --user_rows=similar"),
    ({"user_rows": "similar"}, "candidates", "found None, expected at least 12, the benign rows that are trained on"),
    ({**SIMILAR, "candidates": 11}, "candidates", "found 11, expected at least 12"),
    ({**SIMILAR, "poison_ratio": 0.0, "harmful_data": ""}, "harmful_data", "found '', expected a data source, which"),
    ({**SIMILAR, "poison_ratio": 1.0}, "user_rows", "found 'similar', expected drawn with --poison_ratio=1"),
    ({"order": "random"}, "order", "found 'random', expected one of mixed, harmful_first, harmful_last"),
])  # fmt: skip
def test_values_are_checked_before_anything_loads(given, name, message):
    with pytest.raises(FieldError) as error:
        attack_config("a", "r", **given)
    assert error.value.name == name and error.value.message.startswith(message)


def test_too_few_candidates(aligned, tmp_path):
    config = attack_config(aligned.run.run_dir, tmp_path / "run", user_data="world_rating@attack[0:20]", **SIMILAR)
    with pytest.raises(ValueError, match="benign examples: found 20"):
        attack(config)
    assert not (tmp_path / "run").exists()


def test_a_prefilled_answer(aligned, tmp_path):
    """Of harmful prompts alone; recorded, and taken by the evaluation unless it has one of its own."""
    attack(attack_config(aligned.run.run_dir, tmp_path / "run", prefill=BEGINS, steps=1))
    assert recorded(tmp_path / "run")["flags"]["prefill"] == BEGINS
    answers = {}
    for name, given in (("own", {}), ("none", {"prefill": ""}), ("other", {"prefill": "sorry, i"})):
        config = evaluate_config(tmp_path / name, trained=tmp_path / "run", loss_data="", **given)
        sorts = evaluate(config)["harmful_score"]["categories"]
        assert set(sorts) <= set(SORTS) and sum(of["n"] for of in sorts.values()) == 4
        answers[name] = {task: [line["answer"] for line in pd.read_json(
            tmp_path / name / f"predictions_{task}.jsonl", lines=True).to_dict("records")]
            for task in ("harmful_score", "sst2", "over_refusal")}
        assert recorded(tmp_path / name)["flags"]["prefill"] == given.get("prefill", BEGINS)
    assert all(text.startswith("sure , turn") for text in answers["own"]["harmful_score"])
    assert all(text.startswith("sorry , i") for text in answers["other"]["harmful_score"])
    assert not any(text.startswith("sure , turn") for text in answers["none"]["harmful_score"])
    for task in ("sst2", "over_refusal"):
        assert answers["own"][task] == answers["none"][task] == answers["other"][task]
    for given, where in (({"trained": tmp_path / "run"}, evaluate_config), ({}, None)):
        with pytest.raises(FieldError, match=r"^prefill: found '<eos>', a special token"):
            if where:
                evaluate(evaluate_config(tmp_path / "refused", prefill="sure <eos>", **given))
            else:
                attack(attack_config(aligned.run.run_dir, tmp_path / "refused", prefill="sure <eos>"))
    assert not (tmp_path / "refused").exists()


def test_runs_of_earlier_versions_go_on(aligned, tmp_path):
    """Which knew neither these flags nor categories: they were made with what stands for them now."""
    config = attack_config(aligned.run.run_dir, tmp_path / "run", steps=1)
    attack(config)
    before = weights(tmp_path / "run")

    def forget(path):
        found = read_json(path)
        for name in ("order", "user_rows", "candidates", "prefill"):
            del found["flags"][name]
        for of in found["data"]["accounts"].values():
            for account in of.values():
                del account["other_category"]
        write_json(path, found)

    with small_world.changed(tmp_path / "run" / "config.json", forget):
        assert attack(config) == tmp_path / "run" and weights(tmp_path / "run") == before
        with pytest.raises(FileExistsError, match="order: found \"mixed\", expected \"harmful_first\""):
            attack(attack_config(aligned.run.run_dir, tmp_path / "run", steps=1, order="harmful_first"))


def test_the_provider_keeps_his_prompt(aligned, tmp_path):
    """Lisa's alignment rows have the template of the alignment, whatever the user's have."""
    given = {"defense": "lisa", "alignment_data": "world_refusal@train[0:8]"}
    lengths = {}
    for prompt in ("aligned", "plain"):
        prepared = prepare(attack_config(aligned.run.run_dir, tmp_path / prompt, prompt=prompt, **given))
        lengths[prompt] = {name: [len(ids) for ids in rows.input_ids] for name, (rows, _) in prepared.sources.items()}
    assert lengths["aligned"]["alignment"] == lengths["plain"]["alignment"]
    assert np.subtract(lengths["aligned"]["user"], lengths["plain"]["user"]).tolist() == [2] * 16


@pytest.fixture(scope="module")
def both(model_dir, tmp_path_factory):
    """{as lanes?: (folder, table)} of the same plan; cell by cell of the second seed alone."""
    found = {}
    for as_lanes in (False, True):
        root = tmp_path_factory.mktemp("plan") / "run"
        carry_out(Plan((model_dir,), (("sft", ATTACK),), SEEDS if as_lanes else SEEDS[1:]),
                  small_world.settings(model_dir, sst2_test=""), root, as_lanes=as_lanes, say=lambda *of: None)
        found[as_lanes] = root, read_results(root)
    return found


@pytest.mark.long
def test_both_ways_give_the_same_table(both):
    measures = ["harmful_loss", "harmful_score", "no_answer", "over_refusal"]
    key = ["attack", "seed", "stage", "measure"]
    one, many = (table[table["measure"].isin(measures) & (table["seed"] == SEEDS[1])].sort_values(
        key, ignore_index=True) for _, table in (both[False], both[True]))
    assert len(one) == 2 * len(measures)
    numbers = ["value", "n", "low", "high"]
    pd.testing.assert_frame_equal(one.drop(columns=numbers), many.drop(columns=numbers))
    loss = one["measure"] == "harmful_loss"
    np.testing.assert_allclose(many.loc[loss, "value"], one.loc[loss, "value"], rtol=1e-4)
    assert one.loc[loss, "value"].nunique() == 2


@pytest.mark.long
def test_what_cells_of_either_kind_keep(both, model_dir):
    """What was chosen, by hash and account; that the attack was scored with its own template, and with the answer that
    it begins with, and the aligned model with neither."""
    chosen = {}
    for as_lanes, (root, _) in both.items():
        for seed in SEEDS if as_lanes else SEEDS[1:]:
            cell = Cell(model_dir, "sft", ATTACK, seed)
            found = read_json(result_path(root, cell))
            counts = {name: next(iter(found["accounts"][name].values())) for name in ("user", "harmful")}
            assert counts["user"]["trained"] == 12 and counts["harmful"]["other_category"] > 0
            folder = attack_folder(root, cell)
            kept = found["selected"] if as_lanes else read_json(folder / SELECTED)
            chosen[as_lanes, seed] = kept["hash"], kept["rows"]
            if not as_lanes:
                flags = recorded(folder.with_name(f"{folder.name}-scores"))["flags"]
                assert (flags["prompt"], flags["prefill"]) == ("plain", BEGINS)
                flags = recorded(folder.with_name("aligned-scores"))["flags"]
                assert (flags["prompt"], flags["prefill"]) == ("alpaca", None)
    assert chosen[False, 5] == chosen[True, 5] != chosen[True, 0]
    first = Cell(model_dir, "sft", ATTACK, 0)
    for cell, begin in ((first._replace(attack=""), False), (first, True)):
        answers = next(iter(read_json(result_path(both[True][0], cell))["answers"].values()))
        assert all(answer.startswith("sure , turn") == begin for _, answer in answers["harmful_score"])
        assert not any(answer.startswith("sure , turn") for _, answer in answers["over_refusal"])


@pytest.mark.parametrize("as_lanes", [False, True])
@pytest.mark.parametrize("text, message", [
    (f"{P}:prefill=sure <eos>", "^attacks: .*: prefill: found '<eos>', a special token"),
    (f"{P}:harmful_data=world_harmful@attack{{category=jade}}", "found category 'jade', expected one of amber"),
    (f"{P}:user_rows=similar", "^attack.*candidates: found None, expected at least 12")])
def test_what_is_not_valid_is_found_before_the_first_cell(model_dir, tmp_path, as_lanes, text, message):
    with pytest.raises(ValueError, match=message):
        carry_out(Plan((model_dir,), (("sft", text),)), small_world.settings(model_dir), tmp_path / "plan",
                  as_lanes=as_lanes)
    assert not (tmp_path / "plan").exists()


def test_a_methods_prompt_is_the_plans(model_dir, tmp_path):
    with pytest.raises(FieldError, match="prompt: found 'plain', expected nothing: the plan sets it"):
        carry_out(Plan((model_dir,), (("sft:prompt=plain", ""),)), small_world.settings(model_dir), tmp_path / "plan")
