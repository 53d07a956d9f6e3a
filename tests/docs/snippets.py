"""Fenced blocks of Markdown files."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.name != "methods.md")]


class Block(NamedTuple):
    """A fenced block: its language, the ``title`` it is given, its text and the line it begins at."""

    language: str
    title: str
    text: str
    line: int


def blocks(path):
    """All fenced blocks of a file."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)(?: title=\"([^\"]*)\")?\n(.*?)^```$", text, re.M | re.S)
    return [Block(m[1], m[2] or "", m[3], text.count("\n", 0, m.start()) + 1) for m in found]


def name(path):
    """A test id."""
    return str(path.relative_to(ROOT))
