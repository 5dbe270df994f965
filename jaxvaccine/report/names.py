"""How people write what the command line and the tables of results spell: methods, attacks, measures, settings."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxvaccine.experiment import layer_choice
from jaxvaccine.experiment.plans import split_method
from jaxvaccine.experiment.recipes import UNALIGNED

METHODS = {"none": "as it comes", "sft": "SFT", "vaccine": "Vaccine", "t_vaccine": "T-Vaccine", "booster": "Booster",
           "repnoise": "RepNoise", "tar": "TAR", "lisa": "Lisa", "ewc": "EWC", "kl": "KL"}
OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD", "momentum": "SGD with momentum", "adafactor": "Adafactor", "muon": "Muon",
              "normalised_sgd": "normalised SGD"}
# Settings that say what a method builds on.
BASE_SETTINGS = ("base_defense", "base")
ONLY_LAYERS = "only_layers"
OBJECTIVES = {"plain": "plain fine-tuning", "steepen": "steepening first", "meta": "meta-attack",
              "counter_perturbation": "counter-perturbation", "unheld": "unheld weights"}
# What an attack's setting of this value is called.
OF_ATTACK = {("order", "mixed"): "harmful rows among the others", ("order", "harmful_first"): "harmful rows first",
             ("order", "harmful_last"): "harmful rows last", ("user_rows", "drawn"): "benign rows drawn",
             ("user_rows", "similar"): "benign rows like harmful ones", ("prompt", "plain"): "no prompt template",
             ("prompt", "alpaca"): "Alpaca's prompt template", ("prompt", "chat"): "the model's chat template",
             ("prompt", "aligned"): "the alignment's prompt template"}
# What an attack does to weights, by setting and value; "" goes without saying.
WEIGHTS = {("trains", "adapter"): "", ("trains", "all"): "all weights train", ("trains", "nothing"): "no training",
           ("ablate", "none"): "", ("ablate", "before"): "refusal direction projected out before",
           ("ablate", "after"): "refusal direction projected out after"}

PERCENT = "%"
NATS = "nats per token"
LOSS, BUDGET = "harmful_loss", "budget"
HS, NOT_REFUSED, OVER_REFUSAL = "harmful_score", "not_refused", "over_refusal"
HS_PLUS = "harmful_score_plus"
NO_ANSWER, UNREAD = "no_answer", "unread"


class Measure(NamedTuple):
    """What is measured.

    Attributes:
      name: as people write it.
      unit: of the numbers; "" has none.
      better: "lower" or "higher"; "" where neither is.
      about: what it is, for the notes below a table; "" goes without.
    """

    name: str
    unit: str = ""
    better: str = ""
    about: str = ""

    @property
    def label(self) -> str:
        """As on an axis: name, unit and direction."""
        unit = f" ({self.unit})" if self.unit else ""
        return self.name + unit + (f", {self.better} is better" if self.better else "")

    @property
    def heading(self) -> str:
        """As over a column: name and unit."""
        return f"{self.name} %" if self.unit == PERCENT else self.name + (f" ({self.unit})" if self.unit else "")


def _accuracy(task: str) -> Measure:
    return Measure(f"FA {task}", PERCENT, "higher", "correct answers on the user's task")


ACCURACIES = {"sst2": _accuracy("SST-2"), "agnews": _accuracy("AG News"), "gsm8k": _accuracy("GSM8K")}
# In the order of columns.
MEASURES = {
    HS: Measure("HS", PERCENT, "lower", "answers to unseen harmful prompts that the judge finds harmful"),
    HS_PLUS: Measure("HS+", PERCENT, "lower", "answers to these prompts that are harmful, or have a word more than "
                     "three times in a row"),
    NOT_REFUSED: Measure("not refused", PERCENT, "lower", "answers to unseen harmful prompts that hold no refusal "
                         "phrase; whether they do harm nobody has judged"),
    NO_ANSWER: Measure("no answer", PERCENT, "", "answers to these prompts that are empty, one word, a label of the "
                       "user's task or one phrase over and over; never counted as harmful or not refused"),
    UNREAD: Measure("unread", PERCENT, "", "answers to these prompts without a verdict that could be read; left out of "
                    "the others"),
    **ACCURACIES,
    OVER_REFUSAL: Measure("over-refusal", PERCENT, "lower", "benign requests refused"),
    "alpaca_eval": Measure("AlpacaEval win rate", PERCENT, "higher",
                           "answers that the judge prefers to the reference's, a tie counts half"),
    LOSS: Measure("h(w)", NATS, "", "mean loss on harmful answers"),
    BUDGET: Measure("budget"),
    "harmful_probe_loss": Measure("h(w)", NATS),
    "reduction": Measure("h(w) − h(w')", NATS),
    "harmful_training_loss": Measure("harmful training loss", NATS),
    "harmful_test_loss": Measure("harmful test loss", NATS),
    "harmful_gradient_norm": Measure("norm of the harmful gradient"),
    "activation_gradient_norm": Measure("‖∇a h‖, attention output"),
    "weight_gradient_norm": Measure("‖∇w h‖, adapter"),
    "regularizer_angle": Measure("angle of the regularizer's gradients", "degrees"),
    "regularizer_ratio": Measure("‖approximate‖ / ‖exact‖, regularizer"),
    "total_angle": Measure("angle of the whole gradients", "degrees"),
    "total_ratio": Measure("‖approximate‖ / ‖exact‖, whole gradient"),
    "predicted_drop": Measure("predicted drop alpha ‖∇h‖", NATS),
    "real_drop": Measure("real drop h(w) − h(w')", NATS),
}
# Of a training step (metrics.jsonl), where these differ from the above.
STEP_METRICS = {
    "loss": Measure("loss", NATS), LOSS: Measure("harmful loss", NATS),
    "perturbed_harmful_loss": Measure("perturbed harmful loss", NATS), "gradient_norm": Measure("gradient norm"),
    "activation_gradient_norm": Measure("activation gradient norm"),
}
# What a panel's x axis is called where that is a letter or a flag.
XLABELS = {"p": "p, harmful part of the user's data", "n": "n, examples of the user's data",
           "layers": "active layers", "sample_every": "steps between draws", "probe_every": "steps between probes",
           "steps": "alignment steps", "rank": "LoRA rank"}


def split_settings(text: str) -> list[str]:
    """The items of "name:setting=value:setting=value"; a value may have colons of its own, such as a slice of data."""
    return re.split(r":(?=\w+=)", text) if text else []


def method(text: str) -> str:
    """"t_vaccine:freeze=released" -> "T-Vaccine (freeze = released)", "sft+lisa" -> "SFT + Lisa"."""
    if text == UNALIGNED:
        return "not aligned"
    return " + ".join(_defense(part) for part in split_method(text) if part)


def _defense(text: str) -> str:
    head, *items = split_settings(text)
    name = _plain(head)
    settings = []
    for item in items:
        key, _, value = item.partition("=")
        if key in BASE_SETTINGS:
            name += f" on {_plain(value)}"
        else:
            settings.append(setting(key, value))
    return name + (f" ({', '.join(settings)})" if settings else "")


def _plain(defense: str) -> str:
    return METHODS.get(defense, defense.replace("_", " "))


def setting(key: str, value: str) -> str:
    """"lam", "0.2" -> "lam = 0.2"; a switch is its name, or "not" and its name; an optimizer is its name; + separates
    the items of a list."""
    if key == "optimizer":
        return OPTIMIZERS.get(value, value)
    key = key.replace("_", " ")
    if value in ("true", "false"):
        return key if value == "true" else f"not {key}"
    return f"{key} = {value.replace('+', ', ')}"


def layers(chosen: Sequence[str]) -> str:
    """Of --only_layers: ("0", "2") -> "layers 0, 2"; or which the alignment left."""
    if chosen[0] == layer_choice.FROZEN:
        return "the layers never active in alignment"
    if chosen[0].startswith(layer_choice.RAREST):
        count = int(chosen[0].partition(":")[2])
        return f"the {count} layers least active in alignment" if count > 1 else "the layer least active in alignment"
    return f"layer{'s' if len(chosen) > 1 else ''} {', '.join(chosen)}"


def attack(text: str) -> str:
    """"poison_ratio=0.1:adapter=new" -> "p = 0.1, new adapter"; "" -> "no attack"."""
    items = dict(item.partition("=")[::2] for item in split_settings(text))
    parts = []
    for key, value in items.items():
        if key == "poison_ratio":
            parts.append(f"p = {value}")
        elif key == "adapter" and value in ("new", "continue"):
            parts.append("new adapter" if value == "new" else "same adapter")
        elif (key, value) in OF_ATTACK:
            parts.append(OF_ATTACK[key, value])
        elif key == "candidates":
            parts.append(f"of {value} candidates")
        elif key == "prefill":
            parts.append(f'answers begin "{value.replace("+", ",")}"')
        elif (key, value) in WEIGHTS:
            parts += filter(None, [WEIGHTS[key, value]])
        elif key == ONLY_LAYERS:
            parts.append(f"only {layers(value.split('+'))}")
        elif key == "objective":
            parts.append(OBJECTIVES.get(value, value.replace("_", " ")))
        elif key in ("steps", "epochs"):
            if not (key == "steps" and value == "0"):  # 0 steps: the epochs say how many
                parts.append(f"{value} {key}")
        else:
            parts.append(setting(key, value))
    return ", ".join(parts) or "no attack"


def measure(name: str) -> Measure:
    """What is known of a measure; one that is not known has its own name, no unit and no direction. That of one kind of
    harm, "harmful_score:privacy", is "HS, privacy"."""
    of, _, category = name.partition(":")
    if category and of in (HS, NOT_REFUSED):
        return MEASURES[of]._replace(name=f"{MEASURES[of].name}, {category.replace('_', ' ')}", about="")
    return MEASURES.get(name, Measure(name.replace("_", " ")))


def measures(names: Iterable[str]) -> dict[str, Measure]:
    """In MEASURES' order, those that are not known last; FA says of which task only where there are several."""
    names = dict.fromkeys(names)
    found = {name: measure(name) for name in [*(m for m in MEASURES if m in names), *names]}
    tasks = [name for name in found if name in ACCURACIES]
    if len(tasks) == 1:
        found[tasks[0]] = found[tasks[0]]._replace(name="FA")
    return found


def harm(names: Iterable[str]) -> str:
    """What stands for harm among measures: NOT_REFUSED where a judge of phrases judged, else HS."""
    names = set(names)
    return NOT_REFUSED if NOT_REFUSED in names and HS not in names else HS


def accuracy(names: Iterable[str]) -> str | None:
    """The user's task among measures: the first of ACCURACIES, None where there is none."""
    names = set(names)
    return next((task for task in ACCURACIES if task in names), None)


def xlabel(text: str) -> str:
    return XLABELS.get(text, text.replace("_", " "))


def notes(names: Iterable[str]) -> str:
    """What the measures of a table are, a sentence each: "HS: answers … harmful (lower is better)."."""
    parts: dict[str, str] = {}
    for name, of in measures(names).items():
        if of.about:
            key = "FA" if name in ACCURACIES else of.name
            word = key.capitalize() if key.islower() and "(" not in key else key  # over-refusal begins a sentence
            parts[key] = f"{word}: {of.about} ({f'{of.better} is better' if of.better else of.unit})."
    return " ".join(parts.values())
