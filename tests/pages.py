# SPDX-License-Identifier: Apache-2.0
"""The pages that people read, and the fenced blocks in them."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
FENCE = re.compile(r"^( *)```(\S*)\n(.*?)^\1```$", re.M | re.S)


class Block(NamedTuple):
    """A fenced block. `line` is the number of its first line of text."""

    page: Path
    line: int
    language: str
    text: str


class Program(NamedTuple):
    """Python blocks of a page that continue each other."""

    page: Path
    number: int  # in the page
    code: str  # with empty lines in place of the text around, so that errors name lines of the page

    def packages(self) -> set[str]:
        """Return the packages that the program imports."""
        return set(re.findall(r"^(?:import|from) (\w+)", self.code, re.M)) - {"cupy_router"}

    def expected(self) -> list[str]:
        """Return what the comments say that it prints: after the call, or in the next line."""
        return re.findall(r"^ *print\(.*\)(?:  |\n)# (.*)$", self.code, re.M)

    def prints(self) -> int:
        return len(re.findall(r"^ *print\(", self.code, re.M))


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [
        Block(page, text.count("\n", 0, found.start()) + 2, found[2], textwrap.dedent(found[3]))
        for found in FENCE.finditer(text)
    ]


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", page.read_text("utf-8"))


def programs(page: Path) -> list[Program]:
    """Return the programs of a page. A block that begins with an `import` starts one, all others continue it."""
    found: list[Program] = []
    for block in blocks(page):
        if block.language == "python":
            if block.text.startswith("import ") or not found:
                found.append(Program(page, len(found) + 1, ""))
            code = found[-1].code
            found[-1] = found[-1]._replace(code=code + "\n" * (block.line - 1 - code.count("\n")) + block.text)
    return found


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and the site make them."""
    heads = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def between(page: Path, mark: str) -> str:
    """Return the part of a page between two marks."""
    text = page.read_text("utf-8")
    return text.partition(f"<!-- {mark} -->")[2].partition(f"<!-- /{mark} -->")[0].strip()
