"""The commands in README.md and docs/, as a reader would copy them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.{10,}) -->")
_FENCE = re.compile(r"```(?P<language>\w*)$")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, first line's number, language, lines, and why it isn't run, if it isn't."""

    page: Path
    line: int
    language: str
    lines: tuple[str, ...]
    not_run: str


@dataclass(frozen=True)
class Command:
    """One command of a block; ``says`` is the output that the page shows after a line that begins with ``$``."""

    where: str
    text: str
    not_run: str
    says: str = ""

    @property
    def words(self) -> list[str]:
        """What a shell makes of the text, without its comment."""
        return shlex.split(self.text, comments=True)


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    found: list[Block] = []
    lines = page.read_text().splitlines()
    place = 0
    while place < len(lines):
        fence = _FENCE.match(lines[place])
        if fence is None:
            place += 1
            continue
        end = lines.index("```", place + 1)
        reason = NOT_RUN.fullmatch(lines[place - 1]) if place else None
        body = tuple(lines[place + 1 : end])
        found.append(Block(page, place + 2, fence["language"], body, reason["reason"] if reason else ""))
        place = end + 1
    return found


def commands(page: Path) -> list[Command]:
    """Every line of a page's bash blocks; of blocks without a language those lines that call macft."""
    found = []
    for block in blocks(page):
        if block.language not in ("", "bash"):
            continue
        text = "\n".join(block.lines).replace("\\\n", " ").splitlines()
        where = f"{page.relative_to(ROOT)}:{block.line}"
        for number, line in enumerate(text):
            is_call = line.startswith(("python -m macft", "$ python -m macft"))
            if line.startswith("$ "):
                said = "\n".join(text[number + 1 :]).split("\n$ ")[0]
                found.append(Command(where, line.removeprefix("$ "), block.not_run, said))
            elif line.strip() and not line.startswith("#") and (block.language == "bash" or is_call):
                found.append(Command(where, line, block.not_run))
    return found
