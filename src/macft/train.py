"""``python -m macft.train``: fine-tunes a model.

Hydra composes the configuration. What a run needs is imported when a run starts: ``--help`` and a wrong key don't wait
for MLX and transformers, nor does the launcher of a local run, whose ranks are processes of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from macft.cli.parser import program_name
from macft.cli.run_command import exit_status, run_command
from macft.config.command_line import prepare
from macft.config.composing import typed
from macft.config.paths import config_folder
from macft.config.sweeps import SweepPlan, job_values
from macft.config.validate import to_typed
from macft.launch.run import run
from macft.launch.sweep import Job, Sweep


def main(argv: Sequence[str]) -> None:
    """Checks the command line, lets Hydra compose each job, and trains.

    Raises:
        ConfigError: the command line is wrong; no job has started.
        SystemExit: a run, or one or more jobs of a sweep, has failed or was interrupted; with the command's status.
    """
    OmegaConf.register_new_resolver("program", lambda: program_name("train"), replace=True)  # for the help text
    command = prepare(list(argv))
    if command.sweep is not None:
        sys.exit(_sweep(command.argv, command.sweep))

    def job(config: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        # Here rather than around hydra.main, which would print a traceback of its own.
        status = run_command(
            lambda _: exit_status(run(to_typed(config), folder, resume=command.resume is not None)),
            interrupted="interrupted; the newest checkpoint is kept",
        )
        if status:
            sys.exit(status)

    _call_hydra(command.argv, job)


def _sweep(argv: list[str], plan: SweepPlan) -> int:
    """Runs the jobs of a sweep; returns the command's exit status."""
    first = typed(plan.first)
    metric = first.dataset.metric if first.report.objective == "metric" else None
    sweep = Sweep(plan.swept, plan.jobs, metric=metric, prints=first.report.console)

    def job(config: DictConfig) -> float | None:
        hydra_config = HydraConfig.get()
        folder = Path(hydra_config.runtime.output_dir)
        here = Job(
            number=hydra_config.job.num,
            values=job_values(hydra_config),
            folder=folder,
            sweep_folder=Path(hydra_config.sweep.dir).absolute(),
        )
        return sweep.run(here, lambda: run(to_typed(config), folder, resume=False))

    return sweep.run_all(lambda: _call_hydra([*argv, *plan.more], job))


def _call_hydra(argv: list[str], job: Callable[[DictConfig], float | None]) -> None:
    sys.argv[1:] = argv  # hydra.main reads them from there
    hydra.main(str(config_folder()), "train", version_base="1.3")(job)()


if __name__ == "__main__":
    sys.exit(run_command(main))
