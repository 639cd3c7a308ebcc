"""What can follow a line that begins with ``macft``. Reads small files only: the table, folders, names of runs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from macft.cli.commands import COMMANDS
from macft.config.paths import config_folder
from macft.device.user_folder import user_config_folder

TABLE = Path(__file__).with_name("table.json")
"""Options of the commands and keys of the configuration; ``python -m macft.completion.make_table`` writes it."""
_MOST_RUNS = 30
_LONGEST_ABOUT = 80
_TOPOLOGY_OPTIONS = ("--topology",)
_PATH_KEYS = ("dataset", "dataset.path", "model", "model.path", "adapter.init_from")

Candidate = tuple[str, str]
"""A whole word, and what it is; one that ends with ``=``, ``.`` or ``/`` is the beginning of one."""


def candidates(line: str) -> list[Candidate]:
    """The words that the last word of ``line`` may become; the empty word if the line ends with a space."""
    words = _split(line)
    if words is None:
        return []
    *before, current = words
    found = _after(before[1:], current)
    seen: dict[str, str] = {}
    for word, about in found:
        if word.startswith(current):
            seen.setdefault(word, about)
    return list(seen.items())


def _split(line: str) -> list[str] | None:
    """The words of the line, the last of which is not finished; None inside of quotes."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    lexer.whitespace_split = True
    lexer.commenters = ""
    try:
        words = list(lexer)
    except ValueError:
        return None
    return [*words, ""] if not line or line[-1].isspace() else words


def _after(before: list[str], current: str) -> Iterator[Candidate]:
    if not before:
        yield from COMMANDS.items()
        yield from (("--help", "list the commands"), ("--version", "macft's version"))
        return
    command = _table()["commands"].get(before[0])
    if command is None:
        return
    rest = before[1:]
    for number, word in enumerate(rest):
        if word in command["commands"]:
            command, rest = command["commands"][word], rest[number + 1 :]
            break
    options = command["options"]
    if rest and (option := options.get(rest[-1])) and option["takes"]:
        yield from _values(option["takes"], option["choices"], current, rest[-1])
        return
    if current.startswith("-"):
        yield from ((name, option["about"]) for name, option in options.items())
        return
    yield from ((name, sub["about"]) for name, sub in command["commands"].items())
    for positional in command["positionals"]:
        yield from _values(positional["takes"], positional["choices"], current, "")


def _values(takes: str, choices: list[str], current: str, option: str) -> Iterator[Candidate]:
    yield from ((choice, "") for choice in choices)
    if option in _TOPOLOGY_OPTIONS or takes == "topology":
        yield from _options("topology")
    elif takes == "run":
        yield from _runs("", current)
    elif takes == "path":
        yield from _paths(current)
    elif takes == "overrides":
        yield from _overrides(current)


def _overrides(current: str) -> Iterator[Candidate]:
    key, equals, value = current.partition("=")
    plus, name = ("+", key[1:]) if key.startswith("+") else ("", key)
    if not equals:
        yield from _keys(name, plus)
        return
    start = f"{plus}{name}="
    if name == "resume":
        yield from _runs(start, value)
    if (config_folder() / name).is_dir():
        yield from ((f"{start}{option}", about) for option, about in _options(name))
    for allowed in _table()["keys"].get(name, {}).get("allowed", []):
        yield f"{start}{allowed}", ""
    if name in (*_PATH_KEYS, "hydra.run.dir"):
        yield from ((f"{start}{word}", about) for word, about in _paths(value))


def _keys(name: str, plus: str) -> Iterator[Candidate]:
    """Groups and keys up to the next dot."""
    for special, about in (("recipe", "start from a recipe"), ("resume", "continue a run")):
        yield f"+{special}=", about
    if plus:
        return
    for group in sorted(path.name for path in config_folder().iterdir() if path.is_dir() and path.name != "recipe"):
        yield f"{group}=", f"an option of {group}"
    at = name.count(".")
    for key, entry in _table()["keys"].items():
        parts = key.split(".")
        if len(parts) > at + 1:
            yield ".".join(parts[: at + 1]) + ".", f"keys of {'.'.join(parts[: at + 1])}"
        else:
            yield f"{key}=", entry["about"]


def _options(group: str) -> Iterator[Candidate]:
    """The options of a group: macft's, and the user's own, such as clusters."""
    folders = [config_folder() / group]
    if group == "topology":
        folders.append(user_config_folder() / group)
    for folder in folders:
        for path in sorted(folder.glob("*.yaml")):
            yield path.stem, _first_comment(path)


def _first_comment(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.startswith("#"):
                break
            if not line.startswith("# @package"):
                return line.lstrip("# ").rstrip()[:_LONGEST_ABOUT]
    return ""


def _runs(start: str, current: str) -> Iterator[Candidate]:
    """Folders of runs below ``runs/`` in this folder, the newest first; other folders where ``current`` is none."""
    found: Iterable[Path] = (path.parent for path in Path("runs").glob("*/[!.]*/config.yaml"))
    newest = sorted(found, key=lambda path: path.name, reverse=True)[:_MOST_RUNS]
    names = [(f"{path}", "a run") for path in newest]
    if (Path("runs") / "latest").exists():
        names.insert(0, ("runs/latest", "the newest run"))
    fitting = [name for name in names if name[0].startswith(current)]
    yield from ((f"{start}{name}", about) for name, about in fitting or _paths(current))


def _paths(current: str) -> Iterator[Candidate]:
    """Files and folders whose names begin as ``current`` does; hidden ones only if it asks for them."""
    typed, slash, name = current.rpartition("/")
    folder = Path(f"{typed}{slash}" or ".").expanduser()
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for path in entries:
        if path.name.startswith(name) and (name.startswith(".") or not path.name.startswith(".")):
            yield f"{typed}{slash}{path.name}{'/' if path.is_dir() else ''}", ""


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table
