import itertools

import pytest

from jaxvaccine.experiment.objectives import OBJECTIVES
from jaxvaccine.report import names


@pytest.mark.parametrize("text, expected", [
    ("sft", "SFT"), ("t_vaccine", "T-Vaccine"), ("repnoise", "RepNoise"), ("none", "as it comes"),
    ("t_vaccine:freeze=released", "T-Vaccine (freeze = released)"),
    ("booster:base_defense=vaccine", "Booster on Vaccine"),
    ("booster:base=t_vaccine:lam=0.3", "Booster on T-Vaccine (lam = 0.3)"),
    ("sft+lisa", "SFT + Lisa"), ("sft+kl", "SFT + KL"),
    ("booster:lam=0.2+lisa:lisa_rho=0.1", "Booster (lam = 0.2) + Lisa (lisa rho = 0.1)"),
    ("tar:inner_steps=4:adversary=sgd", "TAR (inner steps = 4, adversary = sgd)"),
    ("booster:exact=true", "Booster (exact)"), ("vaccine:targets=q_proj+k_proj", "Vaccine (targets = q_proj, k_proj)"),
    ("booster:harmful_data=world_harmful@harmful[0:20]:alpha=0.3",
     "Booster (harmful data = world_harmful@harmful[0:20], alpha = 0.3)"),
    ("my_defense:beta=1", "my defense (beta = 1)"),
    ("sft:learning_rate=0.0:steps=1", "not aligned"),
    ("sft:learning_rate=0.0:steps=2", "SFT (learning rate = 0.0, steps = 2)"),
])  # fmt: skip
def test_methods(text, expected):
    assert names.method(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("", "no attack"), ("poison_ratio=0.1", "p = 0.1"), ("poison_ratio=0.1:adapter=new", "p = 0.1, new adapter"),
    ("adapter=continue:steps=200:learning_rate=0.0005", "same adapter, 200 steps, learning rate = 0.0005"),
    ("poison_ratio=0.1:n=500:steps=0:epochs=4", "p = 0.1, n = 500, 4 epochs"),
    ("optimizer=normalised_sgd:learning_rate=1e-3", "normalised SGD, learning rate = 1e-3"),
    ("only_layers=frozen", "only the layers never active in alignment"),
    ("only_layers=rarest:1:steps=3", "only the layer least active in alignment, 3 steps"),
    ("poison_ratio=0.1:objective=steepen:steepen_steps=50", "p = 0.1, steepening first, steepen steps = 50"),
    ("objective=meta:meta_exact=false", "meta-attack, not meta exact"),
    ("objective=counter_perturbation:counter_rho=-2", "counter-perturbation, counter rho = -2"),
    ("objective=unheld:unheld_share=0.3:adapter=continue", "unheld weights, unheld share = 0.3, same adapter"),
    ("poison_ratio=0.1:trains=all:ablate=after", "p = 0.1, all weights train, refusal direction projected out after"),
    ("trains=nothing:ablate=before", "no training, refusal direction projected out before"),
    ("trains=adapter:ablate=none", "no attack"),
    ("only_layers=2", "only layer 2"), ("only_layers=0+1+3:steps=60", "only layers 0, 1, 3, 60 steps"),
    ("poison_ratio=0.1:order=harmful_last", "p = 0.1, harmful rows last"),
    ("poison_ratio=0:user_rows=similar:candidates=500", "p = 0, benign rows like harmful ones, of 500 candidates"),
    ("poison_ratio=0.1:prompt=plain:prefill=Sure+ here is",
     'p = 0.1, no prompt template, answers begin "Sure, here is"'),
    ("harmful_data=world_harmful@attack{not category=amber;dune}",
     "harmful data = world_harmful@attack{not category=amber;dune}"),
])  # fmt: skip
def test_attacks(text, expected):
    assert names.attack(text) == expected


def test_other_settings_have_other_names():
    settings = ("", ":lam=0.1", ":lam=0.2", ":exact=true", ":exact=false", ":base_defense=vaccine")
    texts = [head + tail for head, tail in itertools.product(("booster", "t_vaccine", "sft", "sft+lisa"), settings)]
    assert len({names.method(text) for text in texts}) == len(texts)


def test_labels_say_unit_and_direction():
    labels = [names.measure(name).label for name in ("harmful_score", "over_refusal", "harmful_loss",
                                                     "regularizer_angle", "weight_gradient_norm")]
    assert labels == ["HS (%), lower is better", "over-refusal (%), lower is better", "h(w) (nats per token)",
                      "angle of the regularizer's gradients (degrees)", "‖∇w h‖, adapter"]
    assert names.measure("gsm8k").label == "FA GSM8K (%), higher is better"
    assert names.measure("gsm8k").heading == "FA GSM8K %" and names.measure("my_measure").label == "my measure"


def test_fa_says_of_which_task_only_where_there_are_several():
    assert {name: of.name for name, of in names.measures(["over_refusal", "sst2", "harmful_score"]).items()} == {
        "harmful_score": "HS", "sst2": "FA", "over_refusal": "over-refusal"}
    assert list(names.measures(["over_refusal", "sst2", "harmful_score"])) == ["harmful_score", "sst2", "over_refusal"]
    found = names.measures(iter(["gsm8k", "another", "sst2"]))
    assert [of.name for of in found.values()] == ["FA SST-2", "FA GSM8K", "another"]
    assert names.accuracy(["harmful_score", "gsm8k"]) == "gsm8k" and names.accuracy(["harmful_score"]) is None


def test_notes():
    assert names.notes(["over_refusal", "harmful_score", "harmful_loss", "reduction"]) == (
        "HS: answers to unseen harmful prompts that the judge finds harmful (lower is better). "
        "Over-refusal: benign requests refused (lower is better). "
        "h(w): mean loss on harmful answers (nats per token).")
    assert names.notes(["sst2", "agnews"]).count("FA:") == 1
    assert "Not refused: answers to unseen harmful prompts that hold no refusal phrase" in names.notes(["not_refused"])


def test_a_judge_of_phrases_has_no_hs():
    assert names.harm(["sst2", "not_refused"]) == "not_refused" and names.harm(["not_refused", "harmful_score"])
    assert names.harm(["harmful_score", "not_refused"]) == names.harm([]) == "harmful_score"
    of = names.measures(["unread", "not_refused", "no_answer"])
    assert [each.heading for each in of.values()] == ["not refused %", "no answer %", "unread %"]


def test_every_objective_has_a_name():
    assert names.OBJECTIVES.keys() == OBJECTIVES.keys()


def test_a_model_with_tools_has_measures_of_its_own():
    measures = ["agents_tasks", "agents_harmful"]
    assert [of.heading for of in names.measures(measures).values()] == ["HCR %", "TS %"]
    assert names.harm(measures) == "agents_harmful" and names.accuracy(measures) == "agents_tasks"
    assert names.harm([*measures, "not_refused"]) == "not_refused" and names.harm([*measures, "harmful_score"]) == (
        "harmful_score")
    assert names.accuracy([*measures, "gsm8k"]) == "gsm8k" and names.harm([]) == "harmful_score"
