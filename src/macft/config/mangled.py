"""Recognises overrides that the user's shell has changed before macft saw them."""

from __future__ import annotations

from collections.abc import Sequence

from macft.cli.shell import command
from macft.errors import ConfigError

_PAIRS = {"[": "]", "{": "}", "(": ")"}
_LISTS = ("dataset.columns", "optimizer.arguments")
"""Keys whose value is a mapping, in braces."""


def check_unchanged(overrides: Sequence[str]) -> None:
    """Refuses what a shell has cut at spaces inside of brackets, or what bash has made of ``{a:b,c:d}``.

    Raises:
        ConfigError: With the override in quotes, to copy.
    """
    for place, text in enumerate(overrides):
        key, equals, value = text.partition("=")
        if equals and value[:1] in _PAIRS and not _is_closed(value):
            whole = _joined(overrides[place:])
            if whole is not None:
                raise ConfigError(f"{_plain(key)}: the shell has cut this at a space; quote it: {command(whole)}")
        if _plain(key) in _LISTS and ":" in value and value[:1] not in (*_PAIRS, "'", '"', "$"):
            parts = [other.partition("=")[2] for other in overrides if other.partition("=")[0] == key]
            whole = f"{key}={{{', '.join(part.replace(':', ': ', 1) for part in parts)}}}"
            what = "the shell has expanded the braces" if len(parts) > 1 else "braces are missing"
            raise ConfigError(f"{_plain(key)}: {what}; quote it: {command(whole)}")


def _plain(key: str) -> str:
    return key.lstrip("+~")


def _joined(words: Sequence[str]) -> str | None:
    """The first words that together have all brackets closed."""
    for count in range(2, len(words) + 1):
        text = " ".join(words[:count])
        if _is_closed(text.partition("=")[2]):
            return text
    return None


def _is_closed(value: str) -> bool:
    return all(value.count(opening) == value.count(closing) for opening, closing in _PAIRS.items())
