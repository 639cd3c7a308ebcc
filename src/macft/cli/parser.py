"""Argument parsing, the same for all commands."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from macft.cli import shell
from macft.cli.commands import COMMANDS
from macft.errors import ConfigError, DataError

_COLUMNS = re.compile(r"""'dataset\.columns=\{[^']*'(?:"'"'[^']*')*""")
_OPTIONS = {
    "dataset.columns.": "--column ",
    "dataset.columns": "--column",
    "set dataset.mask_prompt=false": "use --no-mask-prompt",
    "dataset.mask_prompt": "--mask-prompt",
    "dataset.max_seq_length": "--max-seq-length",
}
"""Keys that errors about rows name, and the options of commands without keys."""
"""The override in a message, quoted for a shell."""


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a :class:`ConfigError`, which :func:`run_command` reports in one line."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError instead of printing the usage and exiting."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def command_parser(command: str, *, epilog: str | None = None) -> Parser:
    """The parser of a command, with its name as the user typed it and its description from :data:`COMMANDS`."""
    description = COMMANDS[command]
    return Parser(prog=program_name(command), description=f"{description[0].upper()}{description[1:]}.", epilog=epilog)


def program_name(command: str) -> str:
    """How this process was started: ``macft NAME``, ``python -m macft NAME`` or ``python -m macft.NAME``."""
    program = Path(sys.argv[0])
    if program.name == "macft":
        return f"macft {command}"
    if program.parts[-2:] == ("macft", "__main__.py"):
        return f"python -m macft {command}"
    return f"python -m macft.{command}"


def add_column_argument(parser: argparse.ArgumentParser) -> None:
    """The argument that renames columns of a dataset; a list of pairs."""
    parser.add_argument(
        "--column",
        type=_column,
        action="append",
        default=[],
        metavar="FIELD=COLUMN",
        help="the column that a field is read from, as dataset.columns: --column prompt=question",
    )


def check_output(option: str, path: Path | None) -> None:
    """Raises ConfigError unless the file ``path`` of ``option`` can be written: told before the work that fills it."""
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{option}: {path} is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option}: the folder {path.parent} does not exist")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ConfigError(f"{option}: the folder {path.parent} can't be written to; name another")


@contextmanager
def keys_are_options() -> Iterator[None]:
    """Inside, an error that asks for a key of ``dataset`` asks for the option instead: this command has no keys."""
    try:
        yield
    except (ConfigError, DataError) as error:
        text = _COLUMNS.sub(_as_options, str(error))
        for key, option in _OPTIONS.items():
            text = text.replace(key, option)
        raise type(error)(text) from error


def _as_options(found: re.Match[str]) -> str:
    import yaml  # only for an error

    (word,) = shlex.split(found[0])
    columns = yaml.safe_load(word.partition("=")[2])
    return " ".join(shell.command("--column", f"{field}={column}") for field, column in columns.items())


def _column(text: str) -> tuple[str, str]:
    field, separator, column = text.partition("=")
    if not (field and separator and column):
        raise argparse.ArgumentTypeError(f"'{text}' is not FIELD=COLUMN, such as prompt=question")
    return field, column
