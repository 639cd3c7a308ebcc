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

from macft import __version__
from macft.api.fitting import run_claimed
from macft.cli.parser import program_name
from macft.cli.run_command import exit_status, run_command
from macft.config.command_line import prepare
from macft.config.paths import config_folder
from macft.config.schema import TrainConfig
from macft.config.sweeps import job_values
from macft.config.validate import to_typed
from macft.launch.sweep import Job, Sweep
from macft.run.claim import Claim, after_interrupt, claim, claim_sweep


def main(argv: Sequence[str]) -> None:
    """Checks the command line, claims a folder, lets Hydra compose each job, and trains. Without arguments: the help.

    Raises:
        ConfigError: the command line is wrong, or its folder can't be used; no job has started.
        SystemExit: a run, or one or more jobs of a sweep, has failed or was interrupted; with the command's status.
    """
    if "--version" in argv:
        print(__version__)
        return
    OmegaConf.register_new_resolver("program", lambda: program_name("train"), replace=True)  # for the help text
    command = prepare(list(argv) or ["--help"])
    output, job, resume = command.output, command.job, command.resume is not None
    if output is None or job is None:
        _call_hydra(command.argv, lambda _: None)
    elif command.sweep is not None:
        folder = claim_sweep(output.path, job, key=output.key, is_named=output.is_named)
        metric = next(iter(job.dataset.metrics()), None) if job.report.objective == "metric" else None
        sweep = Sweep(command.sweep.swept, command.sweep.jobs, metric=metric, prints=job.report.console)
        words = command.with_output(folder, is_new=True)
        sys.exit(sweep.run_all(lambda: _call_hydra(words, lambda config: _sweep_job(config, sweep, folder))))
    else:
        with claim(
            output.path, job, key="resume" if resume else output.key, is_named=output.is_named, resume=resume
        ) as taken:
            argv = command.with_output(taken.path, is_new=taken.is_new)
            _call_hydra(argv, lambda config: _job(to_typed(config), taken, resume=resume))


def _call_hydra(argv: list[str], job: Callable[[DictConfig], float | None]) -> None:
    sys.argv[1:] = argv  # hydra.main reads them from there
    hydra.main(str(config_folder()), "train", version_base="1.3")(job)()


def _sweep_job(config: DictConfig, sweep: Sweep, sweep_folder: Path) -> float | None:
    hydra_config = HydraConfig.get()
    # As it stands there: a path may look like an interpolation.
    runtime = OmegaConf.to_container(hydra_config.runtime, resolve=False)
    assert isinstance(runtime, dict)
    folder = Path(str(runtime["output_dir"]))

    def start() -> str:
        job = to_typed(config)
        job.report.hparams = list(dict.fromkeys([*sweep.swept, *job.report.hparams]))
        with claim(folder, job, key="hydra.sweep.subdir") as taken:
            return run_claimed(job, taken, resume=False)

    here = Job(hydra_config.job.num, job_values(hydra_config), folder, sweep_folder)
    return sweep.run(here, start)


def _job(config: TrainConfig, taken: Claim, *, resume: bool) -> None:
    # Here rather than around hydra.main, which would print a traceback of its own.
    status = run_command(
        lambda _: exit_status(run_claimed(config, taken, resume=resume)),
        interrupted=lambda: after_interrupt(taken.path),
    )
    if status:
        sys.exit(status)


if __name__ == "__main__":
    sys.exit(run_command(main))
