"""How many prompts sets of examples have in common: none where prompts are distinct, and known where rows are taken."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

Sets = Mapping[str, Collection[str]]


def shared_prompts(sets: Sets, known: Sets = MappingProxyType({})) -> dict[str, dict[str, Any]]:
    """{name: {"prompts": how many it has, "shared": {other: how many of them the other has too}}} of `sets`.

    Others are all of `known` and the sets before it; those with which it shares none are left out. JSON values.

    sets, known: {name: fingerprints of its prompts}, as of `poisoning.fingerprint`.
    """
    found: dict[str, dict[str, Any]] = {}
    others = {name: frozenset(prompts) for name, prompts in known.items()}
    for name, prompts in sets.items():
        own = frozenset(prompts)
        found[name] = {"prompts": len(own), "shared": {
            other: count for other, of in others.items() if (count := len(own & of))}}
        others[name] = own
    return found
