"""``python -m macft.data DATASET --model MODEL``: shows the rows that would be trained on, and loads no weights."""

from __future__ import annotations

import sys

from macft.cli.run_command import run_command
from macft.inspection.command import main

if __name__ == "__main__":
    sys.exit(run_command(main))
