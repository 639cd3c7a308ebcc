"""``python -m macft.train``: fine-tunes a model.

Hydra composes the configuration. What a run needs is imported when a run starts: ``--help`` and a wrong key don't wait
for MLX and transformers, nor does the launcher of a local run, whose ranks are processes of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from macft.cli.parser import program_name
from macft.cli.run_command import exit_status, run_command
from macft.config.command_line import prepare
from macft.config.paths import config_folder
from macft.config.validate import to_typed
from macft.launch.run import run


def main(argv: Sequence[str]) -> None:
    """Checks the command line, lets Hydra compose each job, and trains.

    Raises:
        ConfigError: the command line is wrong; no job has started.
        SystemExit: a job has failed or was interrupted; its status is the command's.
    """
    OmegaConf.register_new_resolver("program", lambda: program_name("train"), replace=True)  # for the help text
    command = prepare(list(argv))
    sys.argv[1:] = command.argv  # hydra.main reads them from there

    def job(config: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        # Here rather than around hydra.main, which would print a traceback of its own.
        status = run_command(
            lambda _: exit_status(run(to_typed(config), folder, resume=command.resume is not None)),
            interrupted="interrupted; the newest checkpoint is kept",
        )
        if status:
            sys.exit(status)

    hydra.main(str(config_folder()), "train", version_base="1.3")(job)()


if __name__ == "__main__":
    sys.exit(run_command(main))
