"""Answers survive: a kill, another judge, other options of a judge; they are generated once."""

import json

import pytest

from jaxvaccine.evaluation import tasks
from jaxvaccine.experiment import evaluate as module
from jaxvaccine.experiment.answer_log import answer_log, read_answers
from jaxvaccine.experiment.config import change
from jaxvaccine.experiment.evaluate import evaluate
from jaxvaccine.json_files import read_json
from tests.experiment.small_world import evaluate_config

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def generated(monkeypatch):
    """How many answers every call of `generate` was to give."""
    counts, generate = [], tasks.generate

    def counted(*args, answered=(), **kwargs):
        counts.append(len(args[3]) - len(answered))
        return generate(*args, answered=answered, **kwargs)

    monkeypatch.setattr(tasks, "generate", counted)
    return counts


def test_a_log_that_was_cut(tmp_path):
    """A line that is not whole is no answer; what is not of this form is an error that names its line."""
    path = tmp_path / "answers.jsonl"
    assert read_answers(path) == {}
    with answer_log(path, {3: "drei\n"}) as keep:
        keep({0: "naïve \ud83d", 7: ""})
    whole = path.read_bytes()
    assert read_answers(path) == {3: "drei\n", 0: "naïve \ud83d", 7: ""}
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        found = read_answers(path)
        assert found.items() <= {3: "drei\n", 0: "naïve \ud83d", 7: ""}.items()
        assert len(found) == whole[:cut].count(b"\n")
    path.write_bytes(whole + b"{}\n")
    with pytest.raises(ValueError, match=r"answers\.jsonl, line 4: found '{}'"):
        read_answers(path)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_evaluation_that_was_stopped_goes_on_with_the_rest(model_dir, tmp_path, monkeypatch, generated, temperature):
    """Answered by as much as it lacks, and as if it had never been stopped, drawn answers too."""
    settings = {"harmful_test": "world_harmful@test[0:9]", "benign_test": "", "sst2_test": "", "loss_data": "",
                "temperature": temperature, "model": model_dir}
    whole = evaluate(evaluate_config(tmp_path / "whole", **settings))
    config = evaluate_config(tmp_path / "stopped", **settings)

    def stop_after_some(path, answered):
        log = answer_log(path, answered)

        class Stopping:
            def __enter__(self):
                keep = log.__enter__()

                def keep_and_stop(answers):
                    keep(answers)
                    raise KeyboardInterrupt
                return keep_and_stop

            def __exit__(self, *error):
                return log.__exit__(*error)
        return Stopping()

    with monkeypatch.context() as patch:
        patch.setattr(module, "answer_log", stop_after_some)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config)
    kept = read_answers(tmp_path / "stopped" / "answers_harmful_score.jsonl")
    assert 0 < len(kept) < 9
    assert evaluate(config) == whole
    assert generated == [9, 9, 9 - len(kept)]
    logs = [read_answers(tmp_path / name / "answers_harmful_score.jsonl") for name in ("whole", "stopped")]
    assert logs[0] == logs[1] and kept.items() <= logs[0].items()


def test_judged_again(model_dir, tmp_path, monkeypatch, generated):
    """Another judge takes the answers; the results of each stay, and come back without being judged again."""
    from jaxvaccine.evaluation.judges import keyword_judge
    from jaxvaccine.experiment import judging

    asked = []

    def make(part, progress):
        def judge(prompts, answers):
            asked.append(part.judge_rubric)
            return keyword_judge(prompts, answers)
        return judge

    monkeypatch.setitem(judging.JUDGES, "chat_api", make)
    monkeypatch.setattr(judging, "_probe", lambda part: None)  # nobody listens
    first = evaluate_config(tmp_path / "run", model=model_dir, sst2_test="", benign_test="", judge="chat_api",
                            judge_model="m", judge_url="http://localhost/v1")
    second = change(first, judge_rubric="strongreject")
    found = evaluate(first)
    files = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    evaluate(second)
    assert read_json(tmp_path / "run" / "config.json")["flags"]["judge_rubric"] == "strongreject"
    earlier = next((tmp_path / "run" / "judged").iterdir())
    for name in ("results.json", "predictions_harmful_score.jsonl"):
        assert (earlier / name).read_bytes() == files[name]
    assert evaluate(first) == found and evaluate(second) == found
    assert asked == ["harmfulness", "strongreject"]
    assert generated == [4]
    assert {json.loads(line)["row"] for line in
            (tmp_path / "run" / "answers_harmful_score.jsonl").read_text().splitlines()} == set(range(4))


def test_a_judge_that_failed_leaves_the_answers_to_the_next(model_dir, tmp_path, monkeypatch, generated):
    from jaxvaccine.experiment import judging

    def failing(part, progress):
        def judge(prompts, answers):
            raise ValueError("chat_api: HTTP 404")
        return judge

    monkeypatch.setitem(judging.JUDGES, "chat_api", failing)
    monkeypatch.setattr(judging, "_probe", lambda part: None)  # nobody listens
    first = evaluate_config(tmp_path / "run", model=model_dir, sst2_test="", benign_test="", judge="chat_api",
                            judge_model="m", judge_url="http://localhost/v1")
    with pytest.raises(ValueError, match="HTTP 404"):
        evaluate(first)
    evaluate(change(first, judge="keyword"))
    assert generated == [4] and not (tmp_path / "run" / "judged").exists()
