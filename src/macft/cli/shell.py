"""Commands to copy: words quoted so that bash and zsh take them as they are."""

from __future__ import annotations

import shlex
from pathlib import Path


def command(*words: str | Path) -> str:
    """``words`` as one line for a shell. A path that begins with a dash gets ``./`` before it."""
    return " ".join(_word(_without_dash(word) if isinstance(word, Path) else word) for word in words)


def _without_dash(path: Path) -> str:
    return f"./{path}" if str(path).startswith("-") else str(path)


def _word(word: str) -> str:
    if word.startswith("~/"):  # the shell still has to see the ~ of a home folder
        return f"~/{_word(word[2:])}" if word[2:] else word
    if not word.isprintable():
        # Control characters and what joins emoji don't survive a terminal. Bytes, because macOS's bash is old.
        return "$'" + "".join(map(_escaped, word)) + "'"
    quoted = shlex.quote(word)
    return f"'{word}'" if quoted == word and word.startswith("=") else quoted  # zsh reads =NAME as a program's path


def _escaped(letter: str) -> str:
    if letter in "\\'":
        return f"\\{letter}"
    if letter.isprintable():
        return letter
    return "".join(f"\\x{byte:02x}" for byte in letter.encode("utf-8", "surrogateescape"))
