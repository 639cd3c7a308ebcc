"""The body of ``macft completion``. It imports nothing that takes long: the shell calls it at each tab."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from macft.cli.parser import Parser, command_parser
from macft.cli.shell import command
from macft.completion.scripts import SCRIPTS, install_path, source_line
from macft.errors import ConfigError

_CALL = "--words"


def main(argv: Sequence[str]) -> None:
    """Prints the script of a shell, or installs it; with ``--words LINE``, which the scripts call, what can follow.

    Raises:
        ConfigError: the shell is not known, or the file can't be written.
    """
    if argv[:1] == [_CALL]:
        from macft.completion.candidates import candidates

        for word, about in candidates(argv[1] if len(argv) > 1 else ""):
            print(f"{word}\t{about}")
        return
    arguments = _parser().parse_args(argv)
    shell = arguments.shell or Path(os.environ.get("SHELL", "")).name
    if shell not in SCRIPTS:
        raise ConfigError(f"SHELL: '{shell}' is not one of {', '.join(SCRIPTS)}")
    if arguments.install:
        _install(shell)
    else:
        print(SCRIPTS[shell], end="")


def _install(shell: str) -> None:
    from macft.device.durable import write_atomically  # it loads NumPy

    path = install_path(shell)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, SCRIPTS[shell])
    except OSError as error:
        raise ConfigError(f"--install: {path} can't be written ({error.strerror or error})") from error
    print(f"{path}: tab completion for {shell}")
    if line := source_line(shell, path):
        print(line)
    print(f"it works in new terminals; try: {command('macft', 'train')} and the tab key")


def _parser() -> Parser:
    parser = command_parser(
        "completion",
        epilog='In this terminal only: eval "$(macft completion zsh)", or bash; macft completion fish | source.',
    )
    parser.add_argument("shell", nargs="?", choices=sorted(SCRIPTS), help="default: the shell of this user")
    parser.add_argument("--install", action="store_true", help="write it where the shell finds it in each new terminal")
    return parser
