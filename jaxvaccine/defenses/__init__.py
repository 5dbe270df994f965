"""Alignment-stage defenses, one paper a file, each a function from a loss to a `Defense`; and what goes around any."""

from jaxvaccine.defenses.base import Defense
from jaxvaccine.defenses.booster import booster
from jaxvaccine.defenses.only_layers import only_layers
from jaxvaccine.defenses.sft import sft
from jaxvaccine.defenses.t_vaccine import TVaccineState, t_vaccine
from jaxvaccine.defenses.vaccine import vaccine

__all__ = ["Defense", "TVaccineState", "booster", "only_layers", "sft", "t_vaccine", "vaccine"]
