"""Defenses, one paper a file, each a function from a loss to a `Defense`; and what goes around any.

Of the alignment stage: sft, vaccine, t_vaccine, booster, repnoise, tar. Of the fine-tuning stage: lisa, ewc, kl.
"""

from jaxvaccine.defenses.base import Defense
from jaxvaccine.defenses.booster import booster
from jaxvaccine.defenses.ewc import EwcState, diagonal_fisher, ewc
from jaxvaccine.defenses.kl import KlState, kl
from jaxvaccine.defenses.lisa import LisaState, lisa
from jaxvaccine.defenses.only_layers import only_layers
from jaxvaccine.defenses.repnoise import repnoise
from jaxvaccine.defenses.sft import sft
from jaxvaccine.defenses.t_vaccine import TVaccineState, t_vaccine
from jaxvaccine.defenses.tar import TarState, tar
from jaxvaccine.defenses.vaccine import vaccine

__all__ = ["Defense", "EwcState", "KlState", "LisaState", "TVaccineState", "TarState", "booster", "diagonal_fisher",
           "ewc", "kl", "lisa", "only_layers", "repnoise", "sft", "t_vaccine", "tar", "vaccine"]  # fmt: skip
