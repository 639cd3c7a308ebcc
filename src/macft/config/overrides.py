"""Writes ``key=value`` in Hydra's grammar, and reads the text of a value back."""

from __future__ import annotations

import re
from pathlib import Path

from omegaconf import OmegaConf

from macft.cli.shell import command

_BEFORE_INTERPOLATION = re.compile(r"(\\*)\$\{")
_BEFORE_QUOTE = re.compile(r"(\\*)'")
_AT_END = re.compile(r"(\\+)$")
# Of these Hydra makes the same text without quotes; a path with a slash is no number, no null and no truth value.
_PLAIN = re.compile(r"[A-Za-z0-9_.@%+:-]*/[A-Za-z0-9_./@%+:-]*")


def escaped(text: str) -> str:
    """``text`` as OmegaConf has to store it: ``${`` in a folder's name is not meant as an interpolation."""
    return _BEFORE_INTERPOLATION.sub(lambda found: found[1] * 2 + r"\${", text)


def unescaped(value: object) -> str:
    """The text that OmegaConf makes of a string value: the inverse of :func:`escaped`, interpolations included.

    Raises:
        OmegaConfBaseException: an interpolation can't be resolved.
    """
    return str(OmegaConf.create({"value": value})["value"])


def quoted(text: str, *, resolved: bool = True) -> str:
    """``text``, whatever it holds, as a quoted string of Hydra's grammar.

    Hydra takes some values as they are written, without OmegaConf: those are not ``resolved``.
    """
    text = escaped(text) if resolved else text
    text = _BEFORE_QUOTE.sub(lambda found: found[1] * 2 + r"\'", text)
    return "'" + _AT_END.sub(lambda found: found[1] * 2, text) + "'"


def override(key: str, value: str | Path) -> str:
    """``key=value`` for Hydra, with quotes only where they are needed.

    A path that is ``???``, which OmegaConf takes for a value that is missing, becomes ``./???``.
    """
    text = f"./{value}" if str(value) == "???" else str(value)
    return f"{key}={text if _PLAIN.fullmatch(text) else quoted(text)}"


def resume_command(folder: Path) -> str:
    """The command that goes on with the run in ``folder``, to be copied into a shell."""
    return command("python", "-m", "macft.train", override("+resume", folder))
