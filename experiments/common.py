"""The name under which scripts of earlier versions import `load_base`; it is jaxvaccine.experiment.stage's."""

from jaxvaccine.experiment.stage import load_base

__all__ = ["load_base"]
