"""``python -m macft.plan +recipe=NAME [overrides] [--chips "M1 Air 8GB,M4 Max 64GB"]``: the plan, and no run."""

from __future__ import annotations

import os
import sys

from hydra import compose, initialize_config_dir
from rich.console import Console

from macft.config.command_line import prepare
from macft.config.paths import config_folder
from macft.config.validate import to_typed
from macft.errors import ConfigError, MacftError
from macft.planner.run_plan import plan_run
from macft.planner.table import show

_USAGE = (
    'usage: python -m macft.plan +recipe=llama-lora [key=value ...] [--chips "M1 Air 8GB,M4 Max 64GB"]\n'
    "Takes what `python -m macft.train` takes. Exit status 1: the run would be refused."
)
_PLAIN_WIDTH = 180


def main(argv: list[str]) -> int:
    """Prints the plan; returns 0 if the run fits, 1 if not, 2 for a wrong command."""
    if {"-h", "--help"} & set(argv):
        print(_USAGE)
        return 0
    try:
        command = prepare(_with_chips(argv))
        if any(text.startswith("-") for text in command.argv):
            raise ConfigError(f"{next(t for t in command.argv if t.startswith('-'))}: not understood here\n{_USAGE}")
        with initialize_config_dir(str(config_folder().absolute()), version_base="1.3"):
            config = to_typed(compose("train", overrides=command.argv))
        plan = plan_run(config)
    except MacftError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    show(plan, console)
    return 0 if plan.fits else 1


def _with_chips(argv: list[str]) -> list[str]:
    """``--chips "a,b"`` or ``--chips=a,b`` as the override it stands for."""
    found: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--chips" or word.startswith("--chips="):
            value = word.partition("=")[2] or next(words, "")
            if not value:
                raise ConfigError('--chips: name the Macs: --chips "M1 Air 8GB,M4 Max 64GB"')
            quoted = ",".join(f"'{name.strip()}'" for name in value.replace("'", "").split(","))
            found.append(f"plan.chips=[{quoted}]")
        else:
            found.append(word)
    return found


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
