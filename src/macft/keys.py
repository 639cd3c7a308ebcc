"""``python -m macft.keys``: this machine's key, and the machines it trusts."""

from __future__ import annotations

import argparse
import sys

from macft.errors import ConfigError
from macft.rendezvous import keystore


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    folder = keystore.key_folder()
    try:
        if arguments.command == "show":
            _show(keystore.load(folder))
        elif arguments.command == "trust":
            keystore.trust(folder, arguments.name, arguments.key)
            print(f"{arguments.name} can now join this machine's runs")
        elif arguments.command == "forget":
            keystore.forget(folder, arguments.name)
            print(f"{arguments.name} is no longer trusted; active runs continue")
        else:
            keyring, is_new = keystore.make(folder)
            print(f"{'a new key' if is_new else 'the key of this machine'} is in {folder}")
            _show(keyring)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _show(keyring: keystore.Keyring) -> None:
    print(f"public key: {keyring.own.public.hex()}")
    print("on each of the other machines, type:")
    print(f"  python -m macft.keys trust {keystore.own_name()} {keyring.own.public.hex()}")
    for name, key in keyring.trusted.items():
        print(f"trusted here: {name} {key.hex()}")
    if not keyring.trusted:
        print("trusted here: nobody yet; type here the line that this command prints on the others")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m macft.keys", description=__doc__)
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
    sys.exit(main())
