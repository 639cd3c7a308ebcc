"""The plan of a whole run: what each node would hold, whether it fits, how fast it would be. Nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from macft.config.execution import execution_for
from macft.config.schema import TrainConfig
from macft.config.validate import world_size
from macft.data.load import read, tokenize_all
from macft.data.order import RowOrder
from macft.data.template_clock import fix_clock
from macft.device.chips import Mac, find_mac
from macft.device.kind import METAL, Device
from macft.device.memory import usable_bytes
from macft.errors import DataError, MacftError, ModelError
from macft.model.bundled import BUNDLED, ensure_bundled
from macft.model.execution import Execution
from macft.model.load import load_tokenizer
from macft.model.shape import ModelShape, read_shape, shape_of
from macft.parallel.shares import DataShard
from macft.planner.memory import MemoryParts, trained_part
from macft.planner.placement import Layout
from macft.planner.preflight import placer_for, planner_for, step_of_shard
from macft.planner.speed import CPU_EFFICIENCY, DISK_BYTES, MAC_EFFICIENCY, measured_flops, step_cost
from macft.planner.workload import StepRows, assumed_steps, steps_of
from macft.topology.settings import parse_budget
from macft.training.settings import steps_for

_GIGABIT_BYTES = 117e6


@dataclass(frozen=True)
class NodePlan:
    """One node. ``execution`` is what it would run with, ``refusal`` says why it can't, in the words of a run."""

    name: str
    budget: float
    rows: int
    execution: Execution
    layout: Layout
    parts: MemoryParts
    refusal: str | None
    seconds: float
    watts: float | None


@dataclass(frozen=True)
class RunPlan:
    """All nodes; ``seconds`` a step and ``steps``, ``tokens`` a step."""

    model: str
    shape: ModelShape
    trainable: int
    nodes: list[NodePlan]
    steps: int
    tokens: float
    exchange_seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether the run fits the memory of every node."""
        return all(node.refusal is None for node in self.nodes)

    @property
    def step_seconds(self) -> float:
        """The slowest node's part, and the exchange of gradients."""
        return max(node.seconds for node in self.nodes) + self.exchange_seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all nodes a second."""
        return self.tokens / self.step_seconds


def plan_run(config: TrainConfig) -> RunPlan:
    """Plans ``config`` for ``plan.chips``, or for as many nodes like this machine as its topology has.

    Raises:
        ModelError: nothing is known of the model's shape.
        DataError: the dataset can't be read.
    """
    notes: list[str] = []
    shape, folder = _shape(config, notes)
    steps, total_steps = _steps(config, folder, notes)
    macs = [find_mac(chip) for chip in config.plan.chips]
    speeds = [mac.chip.tflops * 1e12 * MAC_EFFICIENCY for mac in macs] or _own_speeds(config, notes)
    nodes = [_plan_node(config, shape, steps, rank, speeds, macs) for rank in range(len(speeds))]
    trainable = trained_part(shape, config.adapter).parameters
    moved = 2 * (len(nodes) - 1) / len(nodes) * 4 * trainable
    if len(nodes) > 1:
        notes.append("rows are shared by speed; gradients travel over a 1 Gbit/s link, and a faster one costs less")
    return RunPlan(
        model=config.model.path,
        shape=shape,
        trainable=trainable,
        nodes=nodes,
        steps=total_steps,
        tokens=sum(float(step.lengths.sum()) for step in steps) / len(steps),
        exchange_seconds=moved / _GIGABIT_BYTES,
        notes=notes,
    )


def _plan_node(
    config: TrainConfig,
    shape: ModelShape,
    steps: Sequence[StepRows],
    rank: int,
    speeds: Sequence[float],
    macs: Sequence[Mac],
) -> NodePlan:
    mac = macs[rank] if macs else None
    nodes_here = config.topology.nodes if mac is None and config.topology.kind == "local" else 1
    device = METAL if mac else Device.default().shared_by(nodes_here)
    execution = execution_for(config, shape, shape.checkpoint, device)
    shard = DataShard(rank, len(speeds), tuple(speeds))
    own = [step_of_shard(step, shard, execution) for step in steps]
    # A node far slower than the others may be left without a row; it still holds the model.
    own = [step for step in own if step.rows] or [StepRows(steps[0].rows[:1], steps[0].ids[:1])]
    planner = planner_for(config, shape, execution, own)
    budget = parse_budget(config.topology.memory_budget, (mac.usable_bytes if mac else usable_bytes()) / nodes_here)
    placer = placer_for(config, planner, budget)
    chosen, refusal = placer.choice()
    seconds = step_cost(planner, chosen).operations / speeds[rank]
    layout = Layout.of(shape, chosen, placer.first_trained)
    return NodePlan(
        name=mac.name if mac else f"this machine{'' if len(speeds) == 1 else f', rank {rank}'}",
        budget=budget,
        rows=planner.rows,
        execution=chosen,
        layout=layout,
        parts=placer.parts(chosen),
        refusal=refusal,
        seconds=max(seconds, layout.read_bytes / DISK_BYTES),
        watts=mac.chip.watts if mac else None,
    )


def _own_speeds(config: TrainConfig, notes: list[str]) -> list[float]:
    """Operations a second that training reaches on this machine, for each node of the topology."""
    count = world_size(config)
    efficiency = CPU_EFFICIENCY if Device.default().kind == "cpu" else MAC_EFFICIENCY
    nodes_here = count if config.topology.kind == "local" else 1
    if config.topology.kind in ("hosts", "ssh"):
        notes.append("every host is taken to be a machine like this one; plan.chips=[...] names other Macs")
    return [measured_flops() * efficiency / nodes_here] * count


def _shape(config: TrainConfig, notes: list[str]) -> tuple[ModelShape, Path | None]:
    """The model's shape, and its folder where that is on this machine; otherwise config.json alone is fetched."""
    name = config.model.path
    folder = Path(name).expanduser()
    if name in BUNDLED:
        folder = ensure_bundled(BUNDLED[name])
    if folder.is_dir():
        return read_shape(folder), folder
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=config.model.revision) if "/" in name else None
    if isinstance(cached, str):
        return read_shape(Path(cached).parent), Path(cached).parent
    if (known := known_models().get(name)) is not None:
        notes.append(f"{name}: sizes from macft's own table, the model is not on this machine")
        return shape_of(known, name), None
    try:
        fetched = hf_hub_download(name, "config.json", revision=config.model.revision, etag_timeout=4)
    # The hub's client lets its HTTP library's own errors through.
    except Exception as error:
        raise ModelError(
            f"model.path: '{name}' is not on this machine and its config.json can't be fetched; "
            "give a folder that holds the config.json"
        ) from error
    return read_shape(Path(fetched).parent), None


def known_models() -> dict[str, dict[str, Any]]:
    """config.json of the models in models.yaml, by the path a run names them with."""
    text = files("macft.planner").joinpath("models.yaml").read_text(encoding="utf-8")
    return {row.pop("path"): row for row in yaml.safe_load(text)}


def _steps(config: TrainConfig, folder: Path | None, notes: list[str]) -> tuple[list[StepRows], int]:
    """The run's batches and its number of updates; rows of the longest length where they can't be tokenised here."""
    batch_size, longest = config.training.batch_size, config.dataset.max_seq_length
    raw = read(config.dataset, seed=config.seed)
    sizes = [len(splits["train"]) for _, splits in raw]
    order = RowOrder(sizes, [source.weight for source, _ in raw], batch_size=batch_size, seed=config.seed)
    folder = folder or _any_tokenizer(config, notes)
    try:
        if folder is None:
            raise ModelError("no tokenizer")
        tokenizer = load_tokenizer(config.model, folder)
        fix_clock(tokenizer, config.dataset.template_time)
        data = tokenize_all(raw, config.dataset, tokenizer, need_test=False)
    except DataError:
        raise
    except (MacftError, json.JSONDecodeError) as error:
        notes.append(f"all rows are taken to have {longest} tokens (dataset.max_seq_length): {error}")
        return assumed_steps(batch_size, longest), steps_for(config.training, order.steps_per_epoch)
    order = RowOrder(data.train.source_sizes, data.train.source_weights, batch_size=batch_size, seed=config.seed)
    total = steps_for(config.training, order.steps_per_epoch)
    return steps_of(data.train.rows, order, total), total


def _any_tokenizer(config: TrainConfig, notes: list[str]) -> Path | None:
    """The bundled model's folder, whose tokenizer stands in for that of a model that isn't here."""
    try:
        folder = ensure_bundled()
    except ModelError:
        return None
    notes.append(f"rows are counted in tokens of SmolLM2, as {config.model.path} is not on this machine")
    return folder
