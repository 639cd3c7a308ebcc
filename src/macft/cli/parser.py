"""Argument parsing, the same for all commands."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from macft.cli.commands import COMMANDS
from macft.errors import ConfigError


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


def _column(text: str) -> tuple[str, str]:
    field, separator, column = text.partition("=")
    if not (field and separator and column):
        raise argparse.ArgumentTypeError(f"'{text}' is not FIELD=COLUMN, such as prompt=question")
    return field, column
