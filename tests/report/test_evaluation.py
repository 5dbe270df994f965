"""The report of an evaluation: what several judges said of the same answers."""

import json

from jaxvaccine.experiment import panel
from jaxvaccine.report.evaluation import judging


def test_bars_of_an_answer_are_shown_as_they_are(tmp_path):
    judges = [{"judge": name, "measure": "harmful_score", "score": 50.0, "interval": [10.0, 90.0], "n": 4,
               "unread": 0} for name in ("a", "b")]
    (tmp_path / panel.JUDGING).write_text(json.dumps({"judges": judges, "agreement": [], "disagreements": 1}))
    (tmp_path / panel.DISAGREEMENTS).write_text(json.dumps(
        {"prompt": "p | q", "answer": "x\n|| y", "verdicts": {"a": "harmful", "b": "refused"}}) + "\n")
    assert r"| p \| q | x \|\| y | harmful | refused |" in "\n".join(judging(tmp_path))
