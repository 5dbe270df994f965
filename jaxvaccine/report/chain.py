"""The runs that a run stands on, as its report names them."""

from collections.abc import Mapping
from typing import Any

from jaxvaccine.experiment.chain import RECORD
from jaxvaccine.report import names


def sentence(data: Mapping[str, Any]) -> str:
    """Markdown, of a config.json's data: the runs below, the first first; "" where it records none, since there is no
    more than an alignment below."""
    below = data.get(RECORD, ())
    if not below:
        return ""
    said = " → ".join(f"`{link['run_dir']}` ({_what(link, i > 0)})" for i, link in enumerate(below))
    return f"Stands on {len(below)} {'run' if len(below) == 1 else 'runs'}, one after the other: {said}.\n"


def _what(link: Mapping[str, Any], again: bool) -> str:
    """"fine-tuned, p = 0.1, new adapter"."""
    if link["script"] == "align":
        said = [f"aligned {'again ' if again else ''}with {names.method(link['defense'])}"]
        return ", ".join([*said, _adapter(link["adapter"])] if again else said)
    said = ["fine-tuned" + ("" if link["defense"] == "none" else f" with {names.method(link['defense'])}"),
            f"p = {link['poison_ratio']:g}"]
    said += {"all": ["all weights"], "nothing": ["nothing trained"]}.get(link["trains"], [_adapter(link["adapter"])])
    return ", ".join([*said, *([] if link["ablate"] == "none" else ["refusal ablated"])])


def _adapter(which: str) -> str:
    return "new adapter" if which == "new" else "the same adapter"
