"""What an attacker does beside plain fine-tuning, one a file: mixes of data, weights, objectives.

Objectives are gradient estimators, as the defenses are (`defenses.Defense`): steepen, meta_attack,
counter_perturbation, unheld.
"""

from jaxvaccine.attacks.counter_perturbation import counter_perturbation
from jaxvaccine.attacks.meta_attack import meta_attack
from jaxvaccine.attacks.steepen import SteepenState, steepen
from jaxvaccine.attacks.unheld import UnheldState, least_held, unheld

__all__ = ["SteepenState", "UnheldState", "counter_perturbation", "least_held", "meta_attack", "steepen", "unheld"]
