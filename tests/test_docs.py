"""Documents: links lead somewhere, every page can be reached, and documented commands are commands."""

import importlib
import re
import tomllib

import pytest

from jaxvaccine import cli
from jaxvaccine.experiment.run import check_given, make_settings
from tests import markdown
from tests.markdown import PAGES, ROOT

DOCS = ROOT / "docs"
INDEX = DOCS / "README.md"
ELSEWHERE = re.compile(r"[a-z]+:")
# Scripts that are no more than a console verb, and those without flags.
VERB_SCRIPTS = {name.replace("-", "_"): name for name in cli.VERBS}
NO_FLAGS = ("demo", "demo_smollm2")


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page):
    """Every relative link and image is a file, and its anchor a heading."""
    for link in markdown.links(page):
        if ELSEWHERE.match(link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), f"{link}: outside of the project"
        if anchor:
            assert anchor in markdown.anchors(target), f"{link}: no such heading"


def test_every_page_is_reachable():
    """From the index, through pages of docs/; the README and BUILD lead to the index's pages too."""
    reached, waiting = set(), [INDEX]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        targets = [(page.parent / link.partition("#")[0]).resolve() for link in markdown.links(page)
                   if not ELSEWHERE.match(link)]
        waiting += [target for target in targets
                    if target.suffix == ".md" and target.is_relative_to(DOCS) and target not in reached]
    assert reached == {page for page in PAGES if page.is_relative_to(DOCS)}


def test_every_figure_is_shown():
    shown = {(page.parent / link).resolve() for page in PAGES for link in markdown.links(page)
             if link.endswith(".png") and not ELSEWHERE.match(link)}
    assert shown == set(DOCS.glob("**/*.png"))


def verb_of(words):
    """(verb, its arguments) of a documented command; None if it is not one of ours, or has no flags."""
    if words[0] == "jaxvaccine":
        assert words[1] == "VERB" or words[1] in cli.VERBS, f"{' '.join(words)}: no such verb"
        return (cli.VERBS[words[1]], words[2:]) if words[1] != "VERB" else None
    if words[:2] != ["python", "-m"] or not words[2].startswith("experiments."):
        return None
    name = words[2].removeprefix("experiments.")
    if name in VERB_SCRIPTS:
        return cli.VERBS[VERB_SCRIPTS[name]], words[3:]
    module = importlib.import_module(words[2])
    if name in NO_FLAGS:
        assert not words[3:]
        return None
    return module.VERB, words[3:]


@pytest.fixture(scope="module")
def scripts():
    """Every script with flags of its own."""
    paths = [path.relative_to(ROOT) for path in ROOT.glob("experiments/*/*.py")]
    modules = [importlib.import_module(".".join(path.with_suffix("").parts)) for path in paths
               if "\nVERB = " in path.read_text(encoding="utf-8")]
    assert len(modules) >= 8
    return modules


@pytest.fixture(scope="module")
def known(scripts):
    """All flags of all commands."""
    verbs = [*cli.VERBS.values(), *(module.VERB for module in scripts)]
    return {name for verb in verbs for name in cli.verb_flags(verb)} | {"flagfile"}


def flag_names(words):
    """Of the flags among words; what ends in … stands for several."""
    found = (re.match(r"--(\w+)(…?)", word) for word in words if word.startswith("--"))
    return [match[1] for match in found if match and not match[2]]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags(page, known):
    """Every flag of a documented command is one that the command has; other flags are some command's."""
    for words in markdown.commands(page):
        verb = None if words[0].startswith("--") else verb_of(words)
        if words[0].startswith("--"):
            names = known
        elif verb is None:
            continue
        else:
            names = {*cli.verb_flags(verb[0]), "flagfile"}
        for name in flag_names(words):
            assert name in names or name.removeprefix("no") in names, f"{' '.join(words)}: no flag --{name}"


def test_flags_of_the_scripts(scripts):
    """The examples in their docstrings, too."""
    for module in scripts:
        text = re.sub(r"\\\n\s*", "", module.VERB.text)
        examples = [line.split() for line in text.split("\n") if line.strip().startswith("python -m")]
        assert examples, f"{module.__name__}: no example"
        for words in examples:
            assert words[2] == module.__name__
            assert set(flag_names(words)) <= set(cli.verb_flags(module.VERB)), " ".join(words)


class Understood(Exception):  # noqa: N818
    """What a command ends with here."""


def test_commands_are_valid(monkeypatch):
    """Every whole command of a console verb makes a valid config, before anything is loaded."""
    def valid(*args, **kwargs):
        raise Understood

    def check_plan(config, align, attack, scores, **kwargs):
        check_given(config.make_plan(), make_settings(config, align, attack, scores), align, attack)
        raise Understood

    for name in ("align", "attack", "evaluate"):
        monkeypatch.setattr(cli, name, valid)
    for name in ("of_alignment", "of_attack", "of_evaluation"):
        monkeypatch.setattr(cli.dry_run, name, valid)
    monkeypatch.setattr(cli.compare_judges, "compare", valid)
    monkeypatch.setattr(cli.data_card, "read_card", valid)
    monkeypatch.setattr(cli.export, "export", valid)
    monkeypatch.setattr(cli, "run", check_plan)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    examples = [words for page in PAGES for words in markdown.commands(page)]
    examples += [line.split() for verb in cli.VERBS.values()
                 for line in re.sub(r"\\\n\s*", "", verb.text).split("\n") if line.startswith("jaxvaccine")]
    checked = 0
    for words in examples:
        if words[0] != "jaxvaccine" or len(words) < 3 or "--help" in words or re.search("[…|]", " ".join(words)):
            continue
        with pytest.raises(Understood):
            cli.call(words[1], cli.VERBS[words[1]], words[2:])
        checked += 1
    assert checked >= 20


def test_layout():
    """BUILD's table of rooms is import-linter's, from top to bottom."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c.get("containers") == ["jaxvaccine"])
    expected = [{name.strip(" ()") for name in re.split(r"[|:]", layer)} for layer in layers]
    table = (ROOT / "BUILD.md").read_text(encoding="utf-8").partition("## Layout")[2]
    rows = [set(re.findall(r"`(\w+)`", row)) for row in re.findall(r"^\| (.*?) \|", table, re.MULTILINE)]
    rows = [row for row in rows if row]
    assert rows[0] == {"experiments"}
    rooms = {path.stem for path in (ROOT / "jaxvaccine").iterdir() if path.suffix == ".py" or path.is_dir()}
    # Rooms that are not there yet need not be in the table.
    expected = [kept for layer in expected if (kept := layer & (rooms | set().union(*rows)))]
    assert rows[1:] == expected
