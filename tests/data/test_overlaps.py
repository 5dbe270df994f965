"""How many prompts sets have in common."""

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine.data import shared_prompts

few = settings(max_examples=50)
sets = st.dictionaries(st.sampled_from("abc"), st.lists(st.sampled_from("uvwxyz")), max_size=3)


def test_each_beside_those_before_it():
    found = shared_prompts({"user": ["u", "v", "v"], "harmful": ["v", "w"]}, {"aligned": ["w", "x"], "test": []})
    assert found == {"user": {"prompts": 2, "shared": {}},
                     "harmful": {"prompts": 2, "shared": {"aligned": 1, "user": 1}}}


@few
@given(sets, sets)
def test_counts_are_of_different_prompts(own, known):
    known = {f"known {name}": of for name, of in known.items()}
    found = shared_prompts(own, known)
    assert set(found) == set(own)
    for i, (name, of) in enumerate(own.items()):
        assert found[name]["prompts"] == len(set(of))
        for other, prompts in [*known.items(), *list(own.items())[:i]]:
            assert found[name]["shared"].get(other, 0) == len([p for p in set(of) if p in prompts])
