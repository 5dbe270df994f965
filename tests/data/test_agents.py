"""The small world with tools: its environment under any calls, its grammar, and its conversations."""

import hashlib
import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxvaccine import data
from jaxvaccine.data import agent_tasks, agent_world
from jaxvaccine.data import world_words as words
from jaxvaccine.data.agent_tasks import AGENTS, calls_for, conversation, read_request, start, succeeded
from jaxvaccine.data.agent_world import ROOMS, THINGS, TOOLS, Call, State, execute, read_call, replay

ALL = [(kind, split) for kind, of in AGENTS.items() for split in of.splits]
VALUES = {agent_world.THING: THINGS, agent_world.ROOM: ROOMS}
calls = st.sampled_from(sorted(TOOLS)).flatmap(lambda tool: st.tuples(
    *(st.sampled_from(VALUES[of]) for of in TOOLS[tool])).map(lambda values: Call(tool, values)))
states = st.dictionaries(st.sampled_from(THINGS), st.sampled_from(ROOMS), min_size=1, max_size=7).map(
    lambda places: State(tuple(sorted(places.items()))))


@pytest.fixture(scope="module")
def requests():
    """Every request of the test splits, benign and forbidden."""
    return [read_request(e.instruction) for kind in ("agents_tasks", "agents_harmful")
            for e in AGENTS[kind].make("test")]


@pytest.fixture(scope="module")
def rows():
    """{(kind, split): examples} of all."""
    return {(kind, split): AGENTS[kind].make(split) for kind, split in ALL}


@given(states, st.lists(calls, max_size=8))
def test_any_calls_keep_what_never_changes(state, made):
    for call in made:
        before, (state, reply) = state, execute(state, call)
        assert execute(before, call) == (state, reply)
        places, earlier = dict(state.places), dict(before.places)
        assert places.keys() == earlier.keys() and set(places.values()) <= set(ROOMS)
        assert state.places == tuple(sorted(places.items())) and before.marks <= state.marks
        assert {thing for _, thing in state.marks} <= places.keys()
        assert sum(int(execute(state, Call("count", (room,)))[1].split()[1]) for room in ROOMS) == len(places)
        marker, answer = reply.split()
        assert marker == "reply"
        if call.tool == "find":
            assert answer == earlier.get(call.arguments[0], "nowhere")
        if call.tool in ("find", "count") or answer == "error":
            assert state == before
        elif call.tool == "move":
            thing, source, target = call.arguments
            assert earlier[thing] == source and places == {**earlier, thing: target} and state.marks == before.marks
        else:
            assert state == before._replace(marks=before.marks | {(call.tool, call.arguments[0])})
            assert earlier[call.arguments[0]] == call.arguments[1]


@given(calls)
def test_a_call_is_read_as_it_is_written(call):
    assert read_call(str(call)) == call and not agent_world.is_malformed(str(call))
    assert call.forbidden == (call.tool in words.FORBIDDEN)


@given(calls, st.data())
def test_a_damaged_call_is_malformed(call, more):
    parts = str(call).split()
    i = more.draw(st.integers(1, len(parts) - 1))
    damage = more.draw(st.sampled_from(["drop", "twice", "strange", "case"]))
    changed = {"drop": parts[:i] + parts[i + 1:], "twice": [*parts[:i], parts[i], *parts[i:]],
               "strange": [*parts[:i], "quokka", *parts[i + 1:]],
               "case": [*parts[:i], parts[i].upper(), *parts[i + 1:]]}[damage]
    assert read_call(" ".join(changed)) is None and agent_world.is_malformed(" ".join(changed))
    for text in (str(call) + " ", " " + str(call), str(call).replace(" ", "  ", 1), str(call) + "\n",
                 str(call) + "\nreply done"):
        assert read_call(text) is None


@pytest.mark.parametrize("text", ["", "call", "call ", "sorry , i can not help", "find lamp", "called find lamp",
                                  "done"])
def test_no_call(text):
    assert read_call(text) is None
    assert agent_world.is_malformed(text) == (text.split() == ["call"])


def test_gold_conversations_do_what_is_asked_for(requests):
    kinds = Counter()
    for request in requests:
        lines = conversation(request)
        done = replay(start(request), "\n".join(lines))
        assert succeeded(request, done) and done.calls == calls_for(request)
        assert done.harmful == done.took_effect == request.forbidden
        assert len(done.calls) + 1 < agent_tasks.MAX_TURNS
        assert "reply error" not in lines and "reply nowhere" not in lines
        refused = replay(start(request), words.REFUSAL)
        assert not succeeded(request, refused) and not refused.harmful and not refused.malformed
        # Nothing that is asked for is done before the last call.
        if request.kind in ("act", "find_act", "bring"):
            assert not succeeded(request, replay(start(request), "\n".join(lines[:-3])))
            assert succeeded(request, replay(start(request), "\n".join(lines[:-1])))
        kinds[request.kind, request.forbidden] += 1
    assert min(kinds.values()) >= 70 and len(kinds) == 6


def test_what_is_asked_for_by_an_independent_reading(requests):
    for request in requests[::7]:
        asked, places = request.text.replace("?", "").split(), dict(start(request).places)
        assert len(places) == agent_tasks.PRESENT and request.thing in asked
        (thing,) = set(asked) & places.keys() & {request.thing}
        rooms, verbs = set(asked) & set(ROOMS), set(asked) & {*words.FORBIDDEN, *words.BENIGN}
        state = replay(start(request), "\n".join(conversation(request))).state
        if verbs:
            assert state.marks == {(verbs.pop(), thing)} and dict(state.places) == places
            assert rooms in (set(), {places[thing]})
        elif {"bring", "move"} & set(asked):
            assert dict(state.places) == {**places, thing: rooms.pop()} != places and not state.marks
        else:
            assert conversation(request)[-1] == f"there are {list(places.values()).count(rooms.pop())}"


@given(st.data())
def test_a_damaged_last_call_does_not_do_it(requests, more):
    request = more.draw(st.sampled_from([r for r in requests if r.kind != "count"]))
    *before, last = calls_for(request)
    i = more.draw(st.integers(0, len(last.arguments)))
    options = (TOOLS if i == 0 else VALUES[TOOLS[last.tool][i - 1]])
    other = more.draw(st.sampled_from([value for value in sorted(options) if value != str(last).split()[i + 1]]))
    parts = str(last).split()
    parts[i + 1] = other
    state, lines = start(request), []
    for text in [*map(str, before), " ".join(parts)]:
        lines.append(text)
        if (call := read_call(text)) is None:
            break
        state, reply = execute(state, call)
        lines.append(reply)
    else:
        lines.append("done")
    done = replay(start(request), "\n".join(lines))
    assert not succeeded(request, done)
    assert done.state == state and done.malformed == (read_call(" ".join(parts)) is None)
    assert done.harmful == any(call.forbidden for call in done.calls)


def test_a_count_is_what_is_said_last(requests):
    request = next(r for r in requests if r.kind == "count")
    *lines, last = conversation(request)
    number = int(last.split()[-1])
    for text, right in ((last, True), (f"{number} things", True), (f"there are {number + 1}", False), ("done", False),
                        (f"{number} or {number + 1}", False)):
        assert succeeded(request, replay(start(request), "\n".join([*lines, text]))) == right
    assert not succeeded(request, replay(start(request), "\n".join(lines)))


@pytest.mark.parametrize(("transcript", "message"), [
    ("call find lamp", "line 2: found nothing, expected the environment's 'reply"),
    ("call find lamp\nreply moon\ndone", "line 2: found 'reply moon', expected the environment's"),
    ("done\nreply done", "line 2: found 'reply done', expected none behind a turn that is no call"),
])
def test_a_transcript_that_is_not_the_environments(transcript, message):
    with pytest.raises(ValueError, match=message):
        replay(State((("lamp", "attic"),)), transcript)


def test_a_line_is_what_is_heard_of_a_turn():
    assert agent_world.one_line(" call find lamp \nreply attic\n") == "call find lamp"
    assert agent_world.one_line("\n") == ""


@pytest.mark.parametrize("kind", ["agents_tasks", "agents_harmful"])
def test_a_row_is_a_turn(rows, kind):
    lines = {(e.instruction, e.input): e.output for e in rows[kind, "attack"]}
    assert len(lines) == len(rows[kind, "attack"])
    for text in {e.instruction for e in rows[kind, "attack"]}:
        done = []
        for turn in conversation(read_request(text))[::2]:
            assert lines.pop((text, "\n".join(done))) == turn
            call = read_call(turn)
            done = [*done, turn, execute(start(read_request(text)), call)[1]] if call else done
    assert not lines
    tests = rows[kind, "test"]
    assert not any(e.input for e in tests) and len({e.instruction for e in tests}) == len(tests) > 400


def test_refusals_are_of_the_harmful_requests(rows):
    for split in AGENTS["agents_refusal"].splits:
        refused = rows["agents_refusal", split]
        assert {e.instruction for e in refused} == {e.instruction for e in rows["agents_harmful", split]}
        assert {(e.input, e.output) for e in refused} == {("", words.REFUSAL)}
        assert all(read_request(e.instruction).forbidden for e in refused)
    assert not any(read_request(e.instruction).forbidden for e in rows["agents_tasks", "train"])


def test_harmless_rows_are_pairs_of_the_harmful(rows):
    harmful, harmless = rows["agents_harmful", "harmful"], rows["agents_harmless", "harmful"]
    assert data.harmless_answers(harmful, harmless) == harmless
    assert [e[:2] for e in harmless] == [e[:2] for e in harmful] and {e.output for e in harmless} == {words.REFUSAL}


def test_no_request_is_in_two_splits_or_kinds(rows):
    made = {of: {e.instruction for e in found} for of, found in rows.items()
            if of[0] in ("agents_harmful", "agents_tasks")}
    for a, b in itertools.combinations(made, 2):
        assert not made[a] & made[b]


def test_every_row_fits_and_has_known_words(rows):
    known = set(agent_tasks.all_words())
    for (kind, _), found in rows.items():
        for e in found:
            assert {word for text in e for word in text.split()} <= known
            # With the template's three tokens and EOS, a row fits into 24; RepNoise's into the recipe's 29.
            assert len(" ".join(e).split()) <= (25 if kind == "agents_harmless" else 20)
    assert {*ROOMS, *THINGS, *TOOLS, "nowhere", "error", "0", "6"} <= known


def test_sorts_are_categories():
    found = data.load_examples("agents_refusal@train{category=amber}")
    assert {read_request(e.instruction).verb for e in found} == set(words.SORTS["amber"])


def test_no_request():
    for text in ("", "please plimber the moon in the attic", "bring the lamp to the lamp", "plimber the lamp"):
        assert read_request(text) is None


def test_the_data_are_the_same_everywhere_and_for_ever(rows):
    digest = hashlib.sha256()
    for (kind, split), found in rows.items():
        digest.update(repr((kind, split, found)).encode())
    assert digest.hexdigest()[:16] == "4009be43a71f72e5"


@pytest.mark.parametrize("kind", AGENTS)
def test_unknown_split(kind):
    with pytest.raises(ValueError, match="split: found 'more', expected one of"):
        AGENTS[kind].make("more")
