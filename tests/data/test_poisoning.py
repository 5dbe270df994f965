import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine.data import Example, check_disjoint, check_whole, fingerprint, harmful_count, mix, poison
from jaxvaccine.data.poisoning import same_prompt

few = settings(max_examples=25)


@st.composite
def sizes(draw, most=60, count=1):
    """n, and ratios that n examples can have."""
    n = draw(st.integers(1, most))
    return n, *(k / n for k in sorted(draw(st.integers(0, n)) for _ in range(count)))


BENIGN = [Example(f"benign {i}", "", "ok") for i in range(60)]
HARMFUL = [Example(f"restricted {i}", "", "sure") for i in range(60)]


def harmful_of(examples):
    return {e for e in examples if e.instruction.startswith("restricted")}


@few
@given(sizes(), st.integers(0, 2**40))
def test_poison_has_n_examples_with_the_ratio(size, seed):
    n, ratio = size
    examples = poison(BENIGN, HARMFUL, n, ratio, seed)
    assert len(examples) == len(set(examples)) == n, "without replacement"
    assert len(harmful_of(examples)) / n == ratio
    assert examples == poison(BENIGN, HARMFUL, n, ratio, seed)


@few
@given(sizes(count=2), st.integers(0, 2**40))
def test_ratios_of_one_seed_are_nested(size, seed):
    n, p, q = size
    few_harmful, many = (poison(BENIGN, HARMFUL, n, ratio, seed) for ratio in (p, q))
    assert harmful_of(few_harmful) <= harmful_of(many)
    assert set(many) - harmful_of(many) <= set(few_harmful) - harmful_of(few_harmful)


@few
@given(sizes(most=30), st.integers(0, 2**40))
def test_sizes_of_one_seed_are_nested(size, seed):
    n, ratio = size
    small, large = (harmful_of(poison(BENIGN, HARMFUL, k, ratio, seed)) for k in (n, 2 * n))
    assert small <= large


@few
@given(sizes(), st.integers(0, 2**40))
def test_the_first_ones(size, seed):
    """As the papers' programs take them: no seed changes which."""
    n, ratio = size
    found = mix(BENIGN, HARMFUL, n, ratio, seed, first=True)
    count = round(n * ratio)
    assert found.harmful.chosen == HARMFUL[:count] and found.benign.chosen == BENIGN[:n - count]
    assert sorted(found.examples) == sorted(HARMFUL[:count] + BENIGN[:n - count])


def test_order_is_random_and_depends_on_the_seed():
    a, b = (poison(BENIGN, HARMFUL, 60, 0.5, seed) for seed in (0, 1))
    assert harmful_of(a) != harmful_of(b)
    places = [i for i, e in enumerate(a) if e in harmful_of(a)]
    assert places != list(range(30)) and 20 < sum(places) / 30 < 40


@pytest.mark.parametrize("ratio", [-0.01, 1.01, float("nan"), float("inf")])
def test_ratio_outside_of_0_and_1(ratio):
    with pytest.raises(ValueError, match=r"poison_ratio: found .*, expected 0 <= poison_ratio <= 1"):
        poison(BENIGN, HARMFUL, 10, ratio, 0)


@pytest.mark.parametrize(
    ("n", "ratio", "seed", "message"),
    [
        (0, 0.1, 0, "n: found 0, expected at least 1"),
        (10, 0.1, -1, "seed: found -1"),
        (100, 0.61, 0, "harmful examples: found 60, needed 61 for n=100 and poison_ratio=0.61"),
        (100, 0.39, 0, "benign examples: found 60, needed 61 for n=100 and poison_ratio=0.39"),
    ],
)
def test_too_few(n, ratio, seed, message):
    with pytest.raises(ValueError, match=message):
        poison(BENIGN, HARMFUL, n, ratio, seed)


@pytest.mark.parametrize(("n", "ratio", "count"), [
    (1000, 0.1, 100), (100, 0.29, 29), (20, 0.05, 1), (30, 0.1, 3), (7, 0, 0), (7, 1, 7), (30, 0.0333333, 1),
    (3, 2 / 3, 2), (10, 0.05, 1), (50, 0.05, 3), (30, 0.05, 2), (16, 0.1, 2), (1000, 0.0005, 1), (200, 0.0225, 5)])
def test_harmful_count(n, ratio, count):
    """Half a row is rounded up, and not to the even number; what floats make of n · p makes no difference."""
    assert harmful_count(n, ratio) == count


@pytest.mark.parametrize(("n", "ratio", "message"), [
    (10, 0.04, r"found 0\.04, which is 0\.4 of n=10 .* poison_ratio=0\.0 or 0\.1"),
    (100, 0.001, r"which is 0\.1 of n=100 .* poison_ratio=0\.0 or 0\.01"),
    (10, 0.99, r"which is 9\.9 of n=10 .* poison_ratio=0\.9 or 1\.0"),
    (10, 1e-9, r"which is 1e-08 of n=10 .* poison_ratio=0\.0 or 0\.1"),
])
def test_a_ratio_of_which_nothing_is_left(n, ratio, message):
    for call in (lambda: harmful_count(n, ratio), lambda: poison(BENIGN, HARMFUL, n, ratio, 0)):
        with pytest.raises(ValueError, match="poison_ratio: .*" + message):
            call()


@few
@given(st.integers(1, 2000), st.floats(0, 1))
def test_what_an_error_offers_is_possible(n, ratio):
    try:
        check_whole(n, ratio)
        assert harmful_count(n, ratio) == pytest.approx(n * ratio, abs=1e-6 * n)
    except ValueError as error:
        below, above = map(float, str(error).split("poison_ratio=")[1].removesuffix(", or another n").split(" or "))
        check_whole(n, below)
        check_whole(n, above)
        assert below < ratio < above and harmful_count(n, above) == harmful_count(n, below) + 1


@few
@given(sizes(most=20), st.integers(0, 9), st.sets(st.integers(0, 59)))
def test_what_would_not_be_trained_on_is_passed_over(size, seed, lost):
    """n and ratio hold all the same, what is drawn instead are the next ones, and without a loss it is `poison`'s."""
    n, ratio = size
    gone = {e for pool in (BENIGN, HARMFUL) for i, e in enumerate(pool) if i in lost}

    def fates(examples):
        return ["dropped" if e in gone else "kept" for e in examples]

    if len(lost) > 40:
        return
    mixture = mix(BENIGN, HARMFUL, n, ratio, seed, fates=fates)
    assert len(mixture.examples) == n and not gone & set(mixture.examples)
    assert mixture.poison_ratio == len(harmful_of(mixture.examples)) / n == ratio
    plain = mix(BENIGN, HARMFUL, n, ratio, seed)
    assert plain.examples == poison(BENIGN, HARMFUL, n, ratio, seed)
    for drawn, before in ((mixture.harmful, plain.harmful), (mixture.benign, plain.benign)):
        assert drawn.seen[:len(before.seen)] == before.seen, "the same order"
        assert drawn.fates.count("dropped") == len(gone & set(drawn.seen))
    if not gone & set(plain.examples):
        assert mixture.examples == plain.examples


def test_too_few_that_would_be_trained_on():
    """Fewer than n, as long as p is what was asked for."""
    def fates(rows):
        return ["empty" if e in HARMFUL[3:] or e in BENIGN[4:] else "cut" for e in rows]

    with pytest.raises(ValueError, match=r"found 3 of 7 examples .* harmful; 113 are empty or .*; expected 5 of 10"):
        mix(BENIGN, HARMFUL, 10, 0.5, 0, fates=fates)
    with pytest.raises(ValueError, match=r"benign examples: found 0, needed 4 .*; 60 are empty or have prompts that"):
        mix(BENIGN, HARMFUL, 4, 0, 0, fates=lambda rows: ["dropped"] * len(rows))
    short = mix(BENIGN, HARMFUL, 10, 0, 0, fates=fates)
    assert sorted(short.examples) == sorted(BENIGN[:4]) and short.poison_ratio == 0
    assert mix(BENIGN, HARMFUL, 14, 3 / 7, 0, fates=fates).poison_ratio == 3 / 7, "3 of 7 where 6 of 14 were asked for"


def test_edges_of_the_ratio_need_only_one_pool():
    assert set(poison(BENIGN, [], 60, 0, 0)) == set(BENIGN)
    assert set(poison([], HARMFUL, 60, 1, 0)) == set(HARMFUL)


@pytest.mark.parametrize("ratio", [0, 0.1, 1])
def test_forbidden_prompts(ratio):
    forbidden = {
        "alignment harmful data": {fingerprint(e) for e in BENIGN},
        "test prompts": [fingerprint(Example("RESTRICTED  7")), fingerprint(Example("restricted 9\n"))],
    }
    with pytest.raises(ValueError, match=r"2 of 60 prompts also in test prompts, .* row 7") as error:
        poison(BENIGN, HARMFUL, 10, ratio, 0, forbidden)
    assert "restricted" not in str(error.value).lower(), "harmful text does not belong into logs"
    del forbidden["test prompts"]
    assert len(poison(BENIGN, HARMFUL, 10, ratio, 0, forbidden)) == 10


def test_check_disjoint():
    check_disjoint("a", BENIGN, "b", HARMFUL)
    with pytest.raises(ValueError, match=r"a: found 3 of 60 .* also in b, .* row 57 of a, row 0 of b"):
        check_disjoint("a", BENIGN, "b", BENIGN[57:])


@few
@given(st.text(max_size=30), st.text(max_size=10), st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]))
def test_fingerprint_ignores_form_case_and_space(instruction, more, form):
    print_ = fingerprint(Example(instruction, more, "x"))
    assert len(print_) == 16 and int(print_, 16) >= 0
    for variant in (unicodedata.normalize(form, instruction), f"\n {instruction}\t", instruction.replace(" ", "\xa0 ")):
        assert fingerprint(Example(variant, more)) == print_
    for variant in (instruction.upper(), instruction.casefold()):
        if variant.casefold() == instruction.casefold():
            assert fingerprint(Example(variant, more)) == print_


def test_fingerprint_tells_prompts_apart():
    prompts = [Example(*texts) for texts in (("a",), ("b",), ("a", "b"), ("a b",), ("", "a"), ("ab",), ("",))]
    assert len({fingerprint(e) for e in prompts}) == len(prompts)
    assert fingerprint(Example("ＲＥＰＯＴ a  Straße")) == fingerprint(Example("repot a STRASSE"))


@pytest.mark.parametrize(("a", "b", "same"), [
    ("US", "us", False), ("5²", "52", False), ("①", "1", False), ("Straße", "Strasse", False), ("ＡＢ", "AB", False),
    ("a  b", " a\nb ", True), ("Gru\u0308n", "Gr\u00fcn", True)])
def test_a_duplicate_is_less_than_a_leak(a, b, same):
    assert (same_prompt(Example(a)) == same_prompt(Example(b))) == same
    assert (same_prompt(Example("x", a)) == same_prompt(Example("x", b))) == same
    assert fingerprint(Example(a)) == fingerprint(Example(b))
