"""What the tests of documents read in Markdown: blocks, links, headings, commands."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


class Block(NamedTuple):
    """A paragraph, or a code block."""

    text: str
    code: bool
    language: str = ""


def blocks(page: Path) -> list[Block]:
    """The page's paragraphs and code blocks, fenced ones and such as are indented by four."""
    found: list[Block] = []
    text, fenced = page.read_text(encoding="utf-8"), re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    parts = fenced.split(text)  # text, language, code, text, …
    for i in range(0, len(parts), 3):
        for paragraph in re.split(r"\n\s*\n", parts[i]):
            indented = paragraph.startswith("    ") and all(
                line.startswith("    ") for line in paragraph.split("\n") if line)
            if paragraph.strip():
                found.append(Block(paragraph.strip("\n"), indented))
        if i + 1 < len(parts):
            found.append(Block(parts[i + 2], True, parts[i + 1]))
    return found


def python_blocks(page: Path) -> list[str]:
    return [block.text for block in blocks(page) if block.language == "python"]


def prose(page: Path) -> list[str]:
    return [block.text for block in blocks(page) if not block.code]


def links(page: Path) -> list[str]:
    """Targets of links and images."""
    return [target for text in prose(page) for target in re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`]*`", "", text))]


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", "\n".join(prose(page)), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        found.append(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
    return set(found)


def is_history(text: str) -> bool:
    """Whether a paragraph tells of an earlier commit, whose commands had other names."""
    return bool(re.search(r"commit\s+`[0-9a-f]{7}`", text))


def commands(page: Path) -> list[list[str]]:
    """Command lines of today, as words: in code blocks, continued lines joined, and in inline code."""
    lines: list[str] = []
    for block in blocks(page):
        if block.code and not block.language:
            lines += re.sub(r"\\\n\s*", "", block.text).split("\n")
        elif not block.code and not is_history(block.text):
            lines += re.findall(r"`([^`]+)`", block.text)
    words = [shlex.split(line, comments=True) for line in lines
             if re.match(r"\s*(jaxvaccine |python -m |--[a-z])", line)]
    return [line for line in words if line]
