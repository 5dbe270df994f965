import numpy as np
import pytest

from jaxvaccine.report import results
from jaxvaccine.report.statistics import estimate_steps
from tests.report.synthetic import frame, plan_table, rate, row


def written(folder, text):
    (folder / results.TABLE).write_text(text, encoding="utf-8")
    return folder


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = plan_table(seeds=(0, 5))
    table.loc[0, "backbone"] = "NA"  # a name like any other
    table.to_csv(tmp_path / results.TABLE, index=False)
    found = results.read_results(tmp_path)
    assert found.columns.tolist() == list(results.COLUMNS) and len(found) == len(table)
    for name in results.COLUMNS:
        assert found[name].tolist() == table[name].tolist() or found[name].isna().all()
    assert found["seed"].dtype == int and found["layer"].dtype == float and found["layer"].isna().all()
    assert (found["attack"] == "").sum() == (table["attack"] == "").sum() > 0


HEADER = ",".join(results.COLUMNS) + "\n"
GOOD = "world,sft,,0,alignment,150,harmful_score,,1.0,100,0,5\n"


@pytest.mark.parametrize("text, message", [
    (HEADER.replace("layer,", "") + GOOD, "found no column 'layer'"),
    (HEADER + GOOD.replace("150", "1.5"), "line 2: column 'step': found '1.5', expected a whole number"),
    (HEADER + GOOD.replace("1.0", "high"), "line 2: column 'value': found 'high', expected a number"),
    (HEADER + GOOD.replace("alignment", "alined"), "column 'stage': found 'alined', expected one of backbone"),
    (HEADER + GOOD + GOOD, "line 3: found a second row of backbone world, method sft, attack , seed 0"),
])  # fmt: skip
def test_what_is_no_table(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        results.read_results(written(tmp_path, text))


def test_no_table(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"results\.csv: not found"):
        results.read_results(tmp_path)


def test_aligned_and_attacked_are_the_last_steps():
    table = frame([
        row("harmful_loss", 1.0, step=0), row("harmful_loss", 3.0, step=150), rate("harmful_score", 2, step=150),
        row("harmful_loss", 9.0, step=300, method="vaccine"), row("activation_gradient_norm", 4.0, step=150, layer=0.0),
        *(rate("harmful_score", value, step=step, stage="attack", attack=attack)
          for attack, step, value in (("a", 10, 20), ("a", 100, 70), ("b", 50, 60)))])
    assert results.aligned(table)["value"].tolist() == [3, 2, 9]
    assert results.attacked(table)["value"].tolist() == [70, 60]


def test_a_defense_of_the_fine_tuning_stage_has_the_aligned_model_of_the_other():
    attack = {"stage": "attack", "attack": "a", "step": 9}
    table = frame([rate("harmful_score", 3), rate("harmful_score", 50, method="sft+lisa", **attack),
                   rate("harmful_score", 4, method="sft+ewc"), rate("harmful_score", 60, method="sft+ewc", **attack)])
    found = results.aligned(table)
    assert dict(zip(found["method"], found["value"], strict=True)) == {"sft": 3, "sft+lisa": 3, "sft+ewc": 4}
    assert results.along(table, "harmful_score").query("method == 'sft+lisa'")["value"].tolist() == [3, 50]


def test_along_begins_with_the_aligned_model_of_the_same_run():
    def attack(value, step, seed):
        return rate("harmful_score", value, step=step, seed=seed, stage="attack", attack="p")

    table = frame([rate("harmful_score", 0), rate("harmful_score", 10, seed=1), rate("harmful_score", 90, seed=2),
                   attack(20, 10, 0), attack(80, 40, 0), attack(10, 10, 1), attack(10, 40, 1)])
    rows = results.along(table, "harmful_score")
    found = estimate_steps(rows)
    assert list(found) == [0, 10, 40]  # seed 2 was not attacked
    np.testing.assert_array_equal([each.values for each in found.values()], [[0, 10], [20, 10], [80, 10]])
    # (10 · (0 + 20) / 2 + 30 · (20 + 80) / 2) / 40
    np.testing.assert_allclose(results.mean_along(rows)["value"], [40.0, 10.0])
    assert results.has_steps(rows) and not results.has_steps(rows[rows["step"] != 10])
    assert len(results.mean_along(rows[rows["step"] != 10])) == 0, "of the start and the end alone there is no mean"


def test_a_mean_along_an_attack_has_the_mean_of_its_intervals():
    table = frame([rate("harmful_score", value, step=step, stage="attack", attack="p")
                   for step, value in ((10, 20), (40, 80), (50, 80))])
    (found,) = results.mean_along(table).to_dict("records")
    for name in ("low", "high"):
        first, second, third = table[name]
        assert found[name] == pytest.approx((30 * (first + second) / 2 + 10 * (second + third) / 2) / 40)
    assert (found["backbone"], found["seed"]) == ("world", 0) and found["low"] < found["value"] < found["high"]


def test_a_measure_may_be_of_an_attack_before_its_first_step():
    at = {"stage": "attack", "attack": "p"}
    table = frame([row("harmful_loss", 1.0), row("harmful_loss", 5.0, step=0, **at),
                   row("harmful_loss", 2.0, step=9, **at), row("harmful_loss", 1.0, seed=1),
                   row("harmful_loss", 3.0, step=9, seed=1, **at)])
    found = estimate_steps(results.along(table, "harmful_loss"))
    assert {step: sorted(each.values) for step, each in found.items()} == {0: [1, 5], 9: [2, 3]}
