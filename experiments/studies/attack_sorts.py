"""The sorts of attack that worst_case searches over: what an attacker may choose in each."""

from jaxvaccine.experiment.spaces import Choice, Range, Sort, Space

ADAPTERS = ("new", "continue")


def sorts(rate: float, steps: str, layers: int, prefills: tuple[str, ...], candidates: str = "", harmless: str = ""
          ) -> tuple[Sort, ...]:
    """Sorts of attack on a model and a recipe.

    Args:
      rate: AdamW's usual learning rate of the attack; a quarter of it to sixteen times it is tried.
      steps: of the attack; 0 takes its epochs.
      layers: of the model; chosen ones are among the first of as many.
      prefills: beginnings of an answer.
      candidates: how many of the user's rows there are to choose from; "" chooses none.
      harmless: source of prompts that are answered, for the refusal direction; "" does without that sort.
    """
    def space(**more: Choice) -> Space:
        return {"learning_rate": Range(rate / 4, rate * 16), "steps": (steps,),
                "poison_ratio": ("0.05", "0.1", "0.2", "0.5"), **more}

    numbers = [str(layer) for layer in range(layers)]
    benign = [space(poison_ratio=("0",))]
    if candidates:
        benign.append(space(poison_ratio=("0",), user_rows=("similar",), candidates=(candidates,)))
    ablation = {"harmless_data": (harmless,), "ablation_layer": tuple(numbers)}
    found = (
        Sort("learning rate", (space(adapter=ADAPTERS, batch_size=("10", "20")),)),
        Sort("schedule", (space(adapter=ADAPTERS, schedule=("linear", "cosine"), warmup_ratio=("0.0", "0.1")),)),
        Sort("adapter", (space(adapter=("new",), rank=("2", "32"), lora_alpha=("4", "16"), targets=(
            "q_proj+v_proj", "q_proj+k_proj+v_proj+o_proj+gate_proj+up_proj+down_proj")),)),
        Sort("optimizer", (
            space(optimizer=("sgd", "momentum"), learning_rate=Range(0.01, 1.0)),
            space(optimizer=("muon",), learning_rate=Range(rate, rate * 64)),
            space(optimizer=("adafactor",), learning_rate=Range(rate, rate * 64)))),
        Sort("all weights", (space(trains=("all",), learning_rate=Range(rate / 40, rate * 2)),)),
        Sort("layers", (space(only_layers=tuple("+".join(numbers[i:i + 2]) for i in range(layers - 1))),)),
        Sort("idle layers", (space(only_layers=("rarest:1", "rarest:2", "rarest:3")),), of=("t_vaccine",)),
        Sort("order", (space(order=("harmful_first", "harmful_last")),)),
        Sort("benign rows", tuple(benign)),
        Sort("template", (space(prompt=("plain",)),)),
        Sort("ablation", (
            {"trains": ("nothing",), "ablate": ("before",), **ablation},
            space(ablate=("after",), **ablation))),
        Sort("prefill", ({"trains": ("nothing",), "prefill": prefills}, space(prefill=prefills))),
        Sort("knows Booster", (
            space(objective=("steepen",), steepen_steps=("10", "30"), steepen_lam=("0.2", "1.0")),
            space(objective=("meta",), meta_weight=("0.2", "1.0"), meta_alpha=("0.1", "0.3")),
            space(optimizer=("normalised_sgd",), learning_rate=Range(0.1, 1.0)))),
        Sort("knows Vaccine", (space(
            objective=("counter_perturbation",), counter_rho=("-5.0", "-1.0", "1.0", "5.0")),)),
        Sort("knows a hold", (space(adapter=("continue",), objective=("unheld",), unheld_share=("0.1", "0.3")),)),
    )
    return tuple(sort for sort in found if harmless or sort.name != "ablation")


# As the small world's usual attack.
WORLD = (
    *sorts(2e-4, "100", 6, ("sure", "sure +"), "1000", "world_benign@train[0:100]"),
    Sort("category", ({
        "learning_rate": Range(5e-5, 3.2e-3), "poison_ratio": ("0.05", "0.1", "0.2"), "harmful_data": tuple(
            f"world_harmful@attack{{category={name}}}" for name in ("amber", "birch", "cobalt", "dune"))},)))
