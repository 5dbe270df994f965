"""What the methods of a plan were aligned on may not be in the attack, nor in what the models are tested on.

All methods of a table get the same attack, or the same error: what one of them was aligned on none may be attacked
with, or the others would look worse for it."""

from collections.abc import Iterable, Sequence

from jaxvaccine import data
from jaxvaccine.evaluation.tasks import HARMFUL_SCORE
from jaxvaccine.experiment import stage
from jaxvaccine.experiment.align import AlignConfig, load_data
from jaxvaccine.experiment.attack import AttackConfig
from jaxvaccine.experiment.config import FieldError, flat
from jaxvaccine.experiment.evaluate import LOSS, TestsPart, check_unseen


def check_leaks(cells: Sequence[tuple[AlignConfig, AttackConfig | None]], tests: TestsPart) -> None:
    """Checks the (alignment, attack) pairs of a plan against one another, before the first is carried out.

    Raises:
      FieldError: harmful data of an attack, or a test, shares a prompt with the alignment data of any of the methods.
      ValueError, FileNotFoundError: as of `data.load_examples`.
    """
    known = aligned_on(aligned for aligned, _ in cells)
    for source in dict.fromkeys(attacked.data.harmful_data for _, attacked in cells if attacked):
        harmful = data.load_examples(source) if source else []
        prompts = {data.fingerprint(example) for example in harmful}
        for where, seen in known.items():
            if overlap := prompts & seen:
                raise FieldError("attack_harmful_data", f"found {len(overlap)} of {len(harmful)} prompts also in the "
                                                        f"{where}, expected none: all methods get the same attack")
    loaded = {task: data.load_examples(source) for task, source in (
        (HARMFUL_SCORE, tests.harmful_test), (LOSS, tests.loss_data)) if source}
    check_unseen(loaded, known)


def aligned_on(configs: Iterable[AlignConfig]) -> dict[str, set[str]]:
    """{"alignment data of sft": fingerprints of the prompts} of all that the alignments train on."""
    known: dict[str, set[str]] = {}
    seen = set()
    for config in configs:
        part = config.data
        key = part.alignment_data, part.harmful_data, part.harmless_data, tuple(config.method.batches)
        if key not in seen:
            seen.add(key)
            for name, rows in load_data(part, config.method).items():
                known.setdefault(f"{name} data of {flat(config)['defense']}", set()).update(stage.prompts_of(rows))
    return known
