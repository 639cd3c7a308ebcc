"""``python -m macft.completion``: prints or installs tab completion; the body is :mod:`macft.completion.command`."""

from __future__ import annotations

import sys

from macft.cli.run_command import run_command
from macft.completion.command import main

if __name__ == "__main__":
    sys.exit(run_command(main))
