"""What the methods of a plan were aligned on may not be in the attack, nor in what the models are tested on.

All methods of a table get the same attack, or the same error: what one of them was aligned on none may be attacked
with, or the others would look worse for it."""

from collections.abc import Collection, Iterable, Mapping

from jaxvaccine import data
from jaxvaccine.experiment.align import Examples
from jaxvaccine.experiment.attack_config import AttackConfig
from jaxvaccine.experiment.config import FieldError
from jaxvaccine.experiment.evaluate import check_unseen


def check_leaks(known: Mapping[str, Collection[str]], attacks: Iterable[AttackConfig], tests: Examples,
                protocol: data.Protocol = "distinct") -> None:
    """Checks a plan's attacks and tests against all that any of its methods is aligned on.

    Args:
      known: {"alignment data of sft": fingerprints of the prompts} of all alignments.
      attacks: of the plan.
      tests: as of `TestsPart.load`.
      protocol: of the tests.

    Raises:
      FieldError: harmful data of an attack, or a test, shares a prompt with the alignment data of any of the methods,
        unless rows are taken as they are.
      ValueError, FileNotFoundError: as of `data.load_examples`.
    """
    for source, bad_rows in dict.fromkeys((attack.data.harmful_data, attack.data.bad_rows) for attack in attacks
                                          if attack.data.protocol == "distinct"):
        harmful = data.load_examples(source, bad_rows=bad_rows) if source else []
        prompts = {found for example in harmful for found in data.fingerprints(example)}
        for where, seen in known.items():
            if overlap := prompts.intersection(seen):
                raise FieldError("attack_harmful_data", f"found {len(overlap)} of {len(harmful)} prompts also in the "
                                                        f"{where}, expected none: all methods get the same attack")
    check_unseen(tests, known, protocol)
