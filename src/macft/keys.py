"""``python -m macft.keys``: shows this machine's key, and manages the machines it trusts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from macft.cli.parser import Parser, command_parser
from macft.cli.run_command import run_command
from macft.rendezvous import keystore


def main(argv: Sequence[str]) -> None:
    """Shows, makes, trusts or forgets a key.

    Raises:
        ConfigError: The arguments are wrong, or the key can't be read or written.
    """
    arguments = _parser().parse_args(argv)
    folder = keystore.key_folder()
    match arguments.command:
        case "show":
            _show(keystore.load(folder))
        case "trust":
            keystore.trust(folder, arguments.name, arguments.key)
            print(f"{arguments.name} can now join this machine's runs")
        case "forget":
            keystore.forget(folder, arguments.name)
            print(f"{arguments.name} is no longer trusted; active runs continue")
        case _:
            keyring, is_new = keystore.make(folder)
            print(f"{'a new key' if is_new else 'the key of this machine'} is in {folder}")
            _show(keyring)


def _show(keyring: keystore.Keyring) -> None:
    print(f"public key: {keyring.own.public.hex()}")
    print("on each of the other machines, run:")
    print(f"  python -m macft.keys trust {keystore.own_name()} {keyring.own.public.hex()}")
    for name, key in keyring.trusted.items():
        print(f"trusted here: {name} {key.hex()}")
    if not keyring.trusted:
        print("trusted here: no machine yet; run here the line that this command prints on each of the others")


def _parser() -> Parser:
    parser = command_parser("keys")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("make", help="make this machine's key if it has none, and show it (the default)")
    commands.add_parser("show", help="show the public key, and the command for the other machines")
    trust = commands.add_parser("trust", help="trust another machine")
    trust.add_argument("name", metavar="NAME", help="a name for the other machine")
    trust.add_argument("key", metavar="KEY", help="its public key, as `show` prints it there")
    forget = commands.add_parser("forget", help="stop trusting a machine")
    forget.add_argument("name", metavar="NAME")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
