"""``macft``: lists the commands, or runs one of them, as ``python -m macft.NAME`` does."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from macft import __version__
from macft.cli.commands import COMMANDS, module_of
from macft.cli.run_command import run_command
from macft.cli.shell import command
from macft.errors import ConfigError


def main() -> NoReturn:
    """The console script: runs the command that the process's arguments name, and exits with its status."""
    sys.exit(_dispatch(sys.argv[1:]))


def _dispatch(argv: Sequence[str]) -> int:
    if argv and argv[0] in COMMANDS:
        del sys.argv[1]  # Hydra, too, reads the arguments from there
        # Imported there: it takes long enough to be interrupted.
        return run_command(lambda words: importlib.import_module(module_of(argv[0])).main(words))
    return run_command(_list_commands, argv)


def _list_commands(argv: Sequence[str]) -> None:
    match list(argv):
        case [] | ["-h" | "--help" | "help"]:
            print(_overview())
        case ["--version"]:
            print(__version__)
        case [word, *rest]:
            if word.startswith("--"):  # flags of another trainer, which train knows
                importlib.import_module(module_of("train")).prepare([word, *rest])
            raise ConfigError(f"no command '{word}'; {_hint(word, rest)}")


def _overview() -> str:
    program = _program()
    width = max(map(len, COMMANDS))
    lines = [f"usage: {program} COMMAND [arguments]", ""]
    lines += [f"  {name:{width}}  {description}" for name, description in COMMANDS.items()]
    lines += ["", f"{program} COMMAND --help explains a command; {program} --version prints macft's version."]
    return "\n".join(lines)


def _hint(word: str, rest: list[str]) -> str:
    program = _program()
    if "=" in word:
        return f"did you mean {program} {command('train', word, *rest)}?"
    if close := difflib.get_close_matches(word, COMMANDS, 1):
        return f"did you mean {program} {close[0]}?"
    return f"the commands are {', '.join(COMMANDS)}"


def _program() -> str:
    return "macft" if Path(sys.argv[0]).name == "macft" else "python -m macft"
