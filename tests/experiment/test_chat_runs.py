"""Instruct models under their own chat template: aligned, attacked on conversations, scored; in runs and in plans."""

import dataclasses
import json
import logging

import numpy as np
import pytest

from jaxvaccine import data
from jaxvaccine.data import Turn, turns_of
from jaxvaccine.evaluation.tasks import HARMFUL_SCORE
from jaxvaccine.experiment import align as align_stage
from jaxvaccine.experiment import dry_run, parts
from jaxvaccine.experiment.align import AlignConfig, align
from jaxvaccine.experiment.attack import attack
from jaxvaccine.experiment.attack_config import AttackConfig, AttackData
from jaxvaccine.experiment.carry_out import carry_out
from jaxvaccine.experiment.config import FieldError, make
from jaxvaccine.experiment.evaluate import evaluate
from jaxvaccine.experiment.evaluate_config import EvaluateConfig, TestsPart
from jaxvaccine.experiment.plan_folder import result_path
from jaxvaccine.experiment.plans import Plan, Settings
from jaxvaccine.experiment.results import Cell
from jaxvaccine.json_files import read_json
from tests.checkpoints.instruct import save_instruct
from tests.data.chat_models import KINDS
from tests.experiment.small_world import recorded

pytestmark = pytest.mark.usefixtures("quick_compile")


def rows(verb, answer, count, first=0):
    """Conversations of a question, or of two with an answer to the first."""
    made = []
    for i in range(first, first + count):
        turns = [Turn("user", f"{verb} the lamp {i}"), Turn("assistant", answer)]
        made.append(turns + ([Turn("user", "and then?"), Turn("assistant", f"{answer} again")] if i % 2 else []))
    return made


def write(path, conversations):
    path.write_text("".join(json.dumps({"messages": [{"role": turn.role, "content": turn.text} for turn in turns]})
                            + "\n" for turns in conversations))
    return f"messages:{path}"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {"alignment_data": write(folder / "a.jsonl", rows("quilldrift", "No, sorry.", 6)),
            "user_data": write(folder / "u.jsonl", rows("polish", "Done.", 6)),
            "harmful_data": write(folder / "h.jsonl", rows("quilldrift", "Sure.", 4, 10)),
            "harmful_test": write(folder / "t.jsonl", [
                *[turns[:-1] for turns in rows("quilldrift", "", 3, 20)][::2],
                [Turn("user", "quilldrift it"), Turn("assistant", "No."), Turn("user", "Do it.")]])}


SMALL = {"steps": 2, "batch_size": 2, "max_length": 160, "bucket": 32, "rank": 2, "progress": False, "prompt": "chat"}


def align_config(model, run_dir, sources, **given) -> AlignConfig:
    return make(AlignConfig, {"model": str(model), "run_dir": str(run_dir), "alignment_data": sources["alignment_data"],
                              **SMALL, **given})


def attack_config(aligned, run_dir, sources, **given) -> AttackConfig:
    small = {name: value for name, value in SMALL.items() if name not in ("rank", "prompt")}
    return make(AttackConfig, {
        "aligned": str(aligned), "run_dir": str(run_dir), "user_data": sources["user_data"], "n": 4,
        "harmful_data": sources["harmful_data"], "poison_ratio": 0.5, **small, **given})


def evaluate_config(run_dir, sources, **given) -> EvaluateConfig:
    return make(EvaluateConfig, {
        "run_dir": str(run_dir), "harmful_test": sources["harmful_test"], "max_new_tokens": 6, "max_length": 96,
        "progress": False, "judge": "keyword",
        **{name: str(value) if name == "trained" else value for name, value in given.items()}})


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_instruct("qwen2", tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def heard(caplog):
    parts._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        yield caplog


def test_what_a_run_records(qwen, sources, tmp_path, heard):
    config = align_config(qwen, tmp_path / "run", sources, system_prompt="Be kind.", supervise="last")
    prepared = align_stage.prepare(config)
    found, tokenizer = recorded(tmp_path / "run"), data.load_tokenizer(qwen)
    assert [found["flags"][name] for name in ("prompt", "system_prompt", "supervise")] == ["chat", "Be kind.", "last"]
    assert found["data"]["chat_template"] == data.chat.template_hash(tokenizer)
    rows_, _ = prepared.sources["alignment"]
    first = next(e for e in data.load_examples(sources["alignment_data"]) if e.history)
    of = [{"role": turn.role, "content": turn.text} for turn in turns_of(first, "Be kind.")]
    assert list(rows_.input_ids[1]) == tokenizer.apply_chat_template(of)["input_ids"]
    assert rows_.learnt[1].sum() < len(rows_.input_ids[1]) // 2 and not heard.text
    with pytest.raises(FileExistsError, match=r"system_prompt: found .Be kind.., expected .Be firm.."):
        align_stage.prepare(align_config(qwen, tmp_path / "run", sources, system_prompt="Be firm.", supervise="last"))


def test_a_foreign_prompt_is_warned_of_once(qwen, tmp_path, heard):
    config = make(AlignConfig, {"model": str(qwen), "run_dir": str(tmp_path / "run"), "prompt": "plain",
                                "alignment_data": "embedded_refusal@train[0:4]"})
    for _ in range(2):
        align_stage.prepare(config, write=False)
    assert heard.text.count("--prompt=chat") == 1 and "found plain, and a tokenizer with a chat template" in heard.text
    assert "chat_template" not in str(dataclasses.asdict(config))


@pytest.mark.parametrize("given, name, message", [
    ({"prompt": "alpaca", "system_prompt": "Be kind."}, "system_prompt", "expected none, unless --prompt=chat"),
    ({"system_prompt": "a<|im_end|>"}, "system_prompt", "found '<|im_end|>', a special token"),
    ({"system_prompt": " "}, "system_prompt", "found ' ', expected text")])
def test_what_is_refused(qwen, sources, tmp_path, given, name, message):
    with pytest.raises(FieldError) as error:
        align_stage.prepare(align_config(qwen, tmp_path / "run", sources, **given))
    assert error.value.name == name and message in str(error.value) and not (tmp_path / "run").exists()


def test_no_template_and_no_room_for_a_conversation(qwen, sources, tmp_path, tmp_path_factory):
    bare = save_instruct("qwen2", tmp_path_factory.mktemp("bare"), template="")
    with pytest.raises(FieldError, match=r"^prompt: found chat, expected alpaca or plain: the tokenizer has no chat"):
        align_stage.prepare(align_config(bare, tmp_path / "run", sources))
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: found a conversation with 2 turns .*prompt=chat takes it"):
        align_stage.prepare(align_config(qwen, tmp_path / "run", sources, prompt="alpaca"))
    with pytest.raises(FieldError, match=r"^prompt: found chat"):
        evaluate(evaluate_config(tmp_path / "scores", sources, model=str(bare), prompt="chat"))
    assert not any(tmp_path.iterdir())


FLAGS = {"prompt": "chat", "system_prompt": "Be kind.", "data_protocol": "distinct"}


@pytest.mark.parametrize("asked, flags, expected", [
    ({}, FLAGS, ("chat", "Be kind.")), ({"prompt": "chat"}, FLAGS, ("chat", "Be kind.")),
    ({"system_prompt": ""}, FLAGS, ("chat", "")), ({"system_prompt": "No."}, FLAGS, ("chat", "No.")),
    ({}, {"prompt": "chat", "data_protocol": "rows"}, ("chat", "")),
    ({}, {"prompt": "plain", "data_protocol": "rows"}, ("plain", ""))])
def test_what_follows_has_the_alignments(asked, flags, expected):
    for part in (AttackData(poison_ratio=0, user_data="world_rating@attack", **asked),
                 TestsPart(harmful_test="world_harmful@test", **asked)):
        form = part.resolve(flags, "runs/a").form
        assert (form.form, form.system) == expected


def test_an_attacker_may_have_his_own():
    def of(flags, **asked):
        form = AttackData(poison_ratio=0, user_data="world_rating@attack", **asked).resolve(flags, "a").form
        return form.form, form.system

    assert of(FLAGS, prompt="plain") == ("plain", "")
    assert of({**FLAGS, "prompt": "alpaca", "system_prompt": None}, prompt="chat") == ("chat", "")
    assert of({**FLAGS, "prompt": "alpaca", "system_prompt": None}, prompt="chat", system_prompt="a") == ("chat", "a")
    with pytest.raises(FieldError, match=r"^system_prompt: found 'a', expected none"):
        of({"prompt": "plain", "data_protocol": "rows"}, system_prompt="a")
    with pytest.raises(FieldError, match=r"^prompt: found 'plain', expected chat, with which runs/a was trained"):
        TestsPart(harmful_test="world_harmful@test", prompt="plain").resolve(FLAGS, "runs/a")


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_from_alignment_to_scores(kind, sources, tmp_path):
    model = save_instruct(kind, tmp_path / "model", texts=["quilldrift polish the lamp and then? again No, sorry."])
    system = {"system_prompt": "Be kind."} if kind in ("llama3", "qwen2") else {}
    # Mistral's template moves a system prompt on, so that only a conversation without one has all answers learnt.
    align(align_config(model, tmp_path / "aligned", sources, **system))
    before = dry_run.of_attack(attack_config(tmp_path / "aligned", tmp_path / "attacked", sources), dry_run.DryRun(
        dry_run=True, card=next(iter(dry_run.CARDS))))
    assert before.startswith("2 steps") and not (tmp_path / "attacked").exists()
    attack(attack_config(tmp_path / "aligned", tmp_path / "attacked", sources))
    given = {"trained": tmp_path / "attacked", "loss_data": sources["harmful_test"].replace("t.jsonl", "u.jsonl")}
    with pytest.raises(FieldError, match=r"^loss_data: found"):
        evaluate(evaluate_config(tmp_path / "scores", sources, **given))
    del given["loss_data"]
    results = evaluate(evaluate_config(tmp_path / "scores", sources, prefill="Sure", stop=("zzz", "."), **given))
    assert results["not_refused"]["n"] == 3
    found = [recorded(tmp_path / name) for name in ("aligned", "attacked", "scores")]
    tokenizer = data.load_tokenizer(model)
    assert {run["data"]["chat_template"] for run in found} == {data.chat.template_hash(tokenizer)}
    assert {run["flags"]["system_prompt"] for run in found} == {system.get("system_prompt")}
    said = [json.loads(line) for line in (tmp_path / "scores" / f"predictions_{HARMFUL_SCORE}.jsonl").open()]
    assert all(line["answer"].startswith("Sure") and "." not in line["answer"] for line in said)
    assert said[2]["prompt"] == "User: quilldrift it\n\nAssistant: No.\n\nUser: Do it."
    assert dry_run.of_evaluation(evaluate_config(tmp_path / "dry", sources, **given), dry_run.DryRun(
        dry_run=True, card=next(iter(dry_run.CARDS)))).startswith(f"{HARMFUL_SCORE}: 3 prompts")


def test_an_attacks_own_system_prompt_is_checked_before_the_first_cell(qwen, sources, tmp_path):
    """Under the alignment's template too."""
    flags = {name: value for name, value in SMALL.items() if name not in ("prompt", "rank")}
    scores = make(EvaluateConfig, {"model": str(qwen), "run_dir": "-", "harmful_test": sources["harmful_test"],
                                   "prompt": "chat", "judge": "keyword"})
    settings = Settings.same({**SMALL, "alignment_data": sources["alignment_data"]}, {
        **flags, "user_data": sources["user_data"], "harmful_data": sources["harmful_data"], "n": 4}, scores)
    plan = Plan.product([str(qwen)], ["sft"], ["poison_ratio=0.5:system_prompt=a<|im_end|>"], [0])
    with pytest.raises(FieldError, match=r"system_prompt: found '<\|im_end\|>', a special token"):
        carry_out(plan, settings, tmp_path / "plan")
    assert not (tmp_path / "plan").exists()


@pytest.mark.long
def test_plans_of_either_kind(qwen, sources, tmp_path):
    """Run by run and as lanes alike: under the template, and an attack with a system prompt of its own."""
    flags = {name: value for name, value in SMALL.items() if name not in ("prompt", "rank")}
    scores = make(EvaluateConfig, {
        "model": str(qwen), "run_dir": "-", "harmful_test": sources["harmful_test"], "max_new_tokens": 4,
        "loss_data": "embedded_harmful@test[0:3]", "max_length": 160, "prompt": "chat", "system_prompt": "Be kind.",
        "eval_batch_size": 3, "stop": ("zz",), "judge": "keyword"})
    of_attack = {**flags, "user_data": sources["user_data"], "harmful_data": sources["harmful_data"], "n": 4}
    settings = Settings.same({**SMALL, "alignment_data": sources["alignment_data"], "system_prompt": "Be kind."},
                             of_attack, scores)
    plan = Plan.product([str(qwen)], ["sft"], ["poison_ratio=0.5", "poison_ratio=0.5:system_prompt=No"], [0])
    losses = {}
    for as_lanes in (False, True):
        carry_out(plan, settings, tmp_path / str(as_lanes), as_lanes=as_lanes)
        for cell in (Cell(str(qwen), "sft", text, 0) for text in ("", *plan.attacks)):
            found = read_json(result_path(tmp_path / str(as_lanes), cell))["rows"]
            losses[as_lanes, cell.attack] = next(r["value"] for r in found if r["measure"] == "harmful_loss"
                                                 and r["stage"] == ("attack" if cell.attack else "alignment"))
    for text in ("", *plan.attacks):
        np.testing.assert_allclose(losses[False, text], losses[True, text], rtol=1e-4)
    assert len({round(loss, 5) for loss in losses.values()}) == 3


def test_lanes_and_candidates_keep_what_is_learnt(qwen, sources, tmp_path):
    """Rows that are chosen among candidates are supervised as before."""
    tokenized = data.tokenize_examples(data.load_tokenizer(qwen), data.load_examples(sources["user_data"]), 96, "chat")
    taken = tokenized.take(np.array([3, 1]))
    for new, old in enumerate((3, 1)):
        np.testing.assert_array_equal(taken.learnt[new], tokenized.learnt[old])
        assert taken.prompt_lengths[new] == tokenized.prompt_lengths[old] == np.argmax(taken.learnt[new])
