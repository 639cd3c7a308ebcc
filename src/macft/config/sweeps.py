"""Which jobs a sweep has, and whether each of them is right, before the first one starts.

A sweep is Hydra's ``-m``. Hydra's own sweeper runs a job for each combination of the values. Other sweepers, such as
Optuna's, choose the values of a job after they have seen the result of the jobs before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from macft.config.composing import explained, typed
from macft.config.schema import TrainConfig
from macft.errors import ConfigError
from macft.evaluation.metrics import is_higher_better

_GRID = "BasicSweeper"
_ONE_AFTER_ANOTHER = "BasicLauncher"
_MOST_JOBS_CHECKED = 50
"""Composing a job takes 0.1 s or more. Of a larger sweep single values are checked, at most this many."""


@dataclass(frozen=True)
class SweepPlan:
    """What is known of a sweep before it starts.

    Attributes:
        swept: The keys with several values, in the order of the command.
        jobs: How many jobs it has; None if the sweeper decides that.
        first: The configuration of the first job, with Hydra's part. Of a sweeper that chooses: of one it may choose.
        more: Overrides that the command needs in addition.
    """

    swept: list[str]
    jobs: int | None
    first: DictConfig
    more: list[str]


@dataclass(frozen=True)
class _Choice:
    """One override with all its values: each an override of a single job."""

    key: str
    overrides: list[str]


def no_sweep(overrides: Sequence[Override]) -> None:
    """Checks the overrides of a command without ``-m``.

    Raises:
        ConfigError: one of them has several values.
    """
    for item in overrides:
        if item.is_sweep_override():
            more = "-m hydra/sweeper=optuna" if item.is_interval_sweep() else "-m, which makes them one after the other"
            raise ConfigError(
                f"{item.key_or_group}: {item.get_value_string()} means several runs; for macft.train add {more}; "
                "or give one value"
            )


def plan_sweep(name: str, overrides: list[str]) -> SweepPlan:
    """Composes and checks the jobs of a sweep. Within :func:`~macft.config.composing.hydra_at`.

    Raises:
        ConfigError: the sweep or one of its jobs is wrong; the line names the job.
        HydraException: as in :func:`~macft.config.composing.hydra_at`, which makes it a ConfigError.
    """
    loader, master = GlobalHydra.instance().config_loader(), _compose(name, overrides)
    sweeper, launcher = (_class(master, part) for part in ("sweeper", "launcher"))
    if launcher != _ONE_AFTER_ANOTHER:
        raise ConfigError(f"hydra/launcher: {launcher} is not supported; a sweep's jobs run one after the other")
    is_grid = sweeper == _GRID
    arguments = [f"{key}={value}" for key, value in (master.hydra.sweeper.get("params") or {}).items()]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*arguments, *task_overrides(master.hydra)])
    choices = {item.get_key_element(): _choice(item, is_grid=is_grid) for item in parsed}  # the last one counts
    swept = [choice for choice in choices.values() if len(choice.overrides) > 1]
    jobs = _jobs(list(choices.values()), is_grid=is_grid)
    first: DictConfig | None = None
    for number, job in jobs:
        try:
            config = loader.load_sweep_config(master, job)
            checked = typed(config)
            if not is_grid:
                _check_sampled(checked, master.hydra.sweeper)
        except (ConfigError, HydraException, OmegaConfBaseException) as error:
            raise _of_job(error, number, job, swept) from error
        first = config if first is None else first
    assert first is not None
    return SweepPlan(
        swept=[choice.key for choice in swept],
        jobs=prod(len(choice.overrides) for choice in choices.values()) if is_grid else None,
        first=first,
        more=_going_on(master.hydra.sweeper, overrides),
    )


def _compose(name: str, overrides: list[str]) -> DictConfig:
    """The configuration that a sweep begins with, without the values that it varies."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    try:
        return hydra.compose_config(name, overrides, run_mode=RunMode.MULTIRUN)
    except (AttributeError, AssertionError, TypeError) as error:  # Hydra's own, for a value it can't merge
        raise ConfigError(f"Hydra can't merge the overrides: {' '.join(str(error).split())}") from error


def _class(master: DictConfig, part: str) -> str:
    chosen = master.hydra[part]
    if chosen is None or "_target_" not in chosen:
        raise ConfigError(f"hydra.{part}: is not set; a sweep needs one, such as hydra/{part}=basic")
    return str(chosen._target_).rpartition(".")[2]


def task_overrides(hydra_config: HydraConf) -> list[str]:
    """The overrides of a command or a job, without those of Hydra's own keys."""
    # Not resolved: a text with ${ is not meant for this list.
    texts = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
    assert isinstance(texts, list)
    return [str(text) for text in texts]


def job_values(hydra_config: HydraConf) -> dict[str, object]:
    """The value of each key that the overrides of a job set, groups included."""
    parsed = OverridesParser.create().parse_overrides(task_overrides(hydra_config))
    return {item.key_or_group: item.value() for item in parsed if not item.is_delete()}


def _choice(item: Override, *, is_grid: bool) -> _Choice:
    key = item.get_key_element()
    if not item.is_sweep_override():
        text = str(item.input_line) if item.is_delete() else f"{key}={item.get_value_element_as_str()}"
        return _Choice(item.key_or_group, [text])
    given = f"{item.key_or_group}: {item.get_value_string()}"
    if item.is_interval_sweep():
        if is_grid:
            raise ConfigError(
                f"{given} needs a sweeper that chooses values from it, such as hydra/sweeper=optuna; "
                "or list values, separated by commas"
            )
        interval = item.value()
        assert isinstance(interval, IntervalSweep)
        assert interval.start is not None
        assert interval.end is not None
        if interval.start > interval.end:
            raise ConfigError(f"{given} ends before it begins")
        return _Choice(item.key_or_group, [f"{key}={end}" for end in (interval.start, interval.end)])
    try:
        values = _discrete(item, is_grid=is_grid)
    except (HydraException, ValueError) as error:
        raise ConfigError(f"{given} has no values: {' '.join(str(error).split())}") from error
    if not values:
        raise ConfigError(f"{given} has no values")
    return _Choice(item.key_or_group, [f"{key}={value}" for value in values])


def _discrete(item: Override, *, is_grid: bool) -> list[str]:
    if is_grid or not isinstance(item.value(), RangeSweep):
        return list(item.sweep_string_iterator())
    # A sweeper may choose from a range of any length; its ends are enough.
    values = list(itertools.islice(item.sweep_string_iterator(), _MOST_JOBS_CHECKED))
    return values[:1] + values[1:][-1:]


def _jobs(choices: list[_Choice], *, is_grid: bool) -> Iterator[tuple[int | None, list[str]]]:
    """Number and overrides of each job; or where there are too many, jobs with one value each from its list."""
    lists = [choice.overrides for choice in choices]
    if is_grid and prod(map(len, lists)) <= _MOST_JOBS_CHECKED:
        yield from enumerate(map(list, itertools.product(*lists)))
        return
    first = [each[0] for each in lists]
    yield None, first
    others = [[(index, value) for value in (each[-1], *each[1:-1])] for index, each in enumerate(lists) if each[1:]]
    by_turns = (item for turn in itertools.zip_longest(*others) for item in turn if item is not None)
    for index, value in itertools.islice(by_turns, _MOST_JOBS_CHECKED):
        yield None, [*first[:index], value, *first[index + 1 :]]


def _of_job(error: Exception, number: int | None, job: list[str], swept: list[_Choice]) -> ConfigError:
    """The error, with the job that it is of."""
    values = " ".join(text for text in job if any(text in choice.overrides for choice in swept))
    if number is None and "is not a whole number" in str(explained(error)):
        values += "; for whole numbers write int(interval(...)) or a range"
    if not values:
        return explained(error)
    which = f"a job with {values}" if number is None else f"job {number}, {values}"
    return ConfigError("\n".join(f"{line} ({which})" for line in str(explained(error)).splitlines()))


def _check_sampled(config: TrainConfig, sweeper: DictConfig) -> None:
    """Checks a job whose result the sweeper needs to choose the next one.

    Raises:
        ConfigError: there would be none, it means another thing to the sweeper, or not all machines have it.
    """
    objective = config.report.objective
    if objective == "valid_loss" and not config.training.eval_every:
        raise ConfigError("report.objective: valid_loss needs validations; set training.eval_every")
    if objective == "metric" and not (config.dataset.metrics() and config.training.metric_rows):
        raise ConfigError("report.objective: metric needs dataset.metric and training.metric_rows")
    if config.topology.kind == "hosts":
        raise ConfigError(
            "hydra/sweeper: with topology=hosts each machine would choose other values; use topology=ssh, which is "
            "started on one machine"
        )
    direction = sweeper.get("direction")
    if direction is None:
        return
    if OmegaConf.is_list(direction):
        raise ConfigError("hydra.sweeper.direction: give one direction; a run has one report.objective")
    is_higher = objective == "metric" and is_higher_better(config.dataset.metrics()[0])
    right = "maximize" if is_higher else "minimize"
    if getattr(direction, "name", str(direction)) != right:
        raise ConfigError(
            f"hydra.sweeper.direction: report.objective={objective} is better where it is "
            f"{'higher' if is_higher else 'lower'}; add hydra.sweeper.direction={right}"
        )


def _going_on(sweeper: DictConfig, overrides: list[str]) -> list[str]:
    """Lets the sweep go on after a failed job, unless the user has said after how many it ends."""
    key = "hydra.sweeper.max_failure_rate"
    is_given = any(text.startswith((f"{key}=", f"++{key}=")) for text in overrides)
    return [] if is_given or sweeper.get("max_failure_rate") != 0.0 else [f"{key}=1.0"]
