"""``python -m macft.train``: Hydra in, one readable run out.

What a run needs is imported when there is one to start: ``--help`` and a wrong key don't wait for MLX and transformers,
nor does the launcher of a local run, whose ranks are processes of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from macft.cli.status import exit_status
from macft.config.command_line import prepare
from macft.config.paths import config_folder
from macft.config.validate import to_typed
from macft.errors import ConfigError
from macft.launch.run import run


def main() -> None:
    """Parses the command line, lets Hydra compose each job, and trains."""
    try:
        command = prepare(sys.argv[1:])
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.argv[1:] = command.argv

    def job(config: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        status = exit_status(lambda: run(to_typed(config), folder, resume=command.resume is not None))
        if status:
            sys.exit(status)

    decorate: Callable[[Any], Any] = hydra.main(str(config_folder()), "train", version_base="1.3")
    decorate(job)()


if __name__ == "__main__":
    main()
