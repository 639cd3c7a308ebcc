"""The ranks of a cluster that answers: they agree on who has which blocks, load them, and compute.

One rank leads: the one at whose terminal the command was given. The others know nothing but how to meet it; what they
load, the adapter's files included, comes from it. Of the base model each rank reads only its own blocks, from its own
disk.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import msgpack
from mlx_lm.tokenizer_utils import TokenizerWrapper

from macft.collective.base import Channels, Collective
from macft.collective.elastic import ElasticCollective
from macft.config.execution import inference_execution
from macft.device import heap
from macft.device.chips import own_chip
from macft.device.disk_speed import disk_speed
from macft.device.memory import usable_bytes
from macft.device.memory_speed import memory_speed
from macft.errors import ConfigError, MacftError, MembershipChanged, ModelError, PeerLost, ProtocolError
from macft.generation.layout import AnsweringNode, answering_layout, blocks_in_memory
from macft.generation.pipeline import PURPOSE, channel_pairs, follow
from macft.generation.stage import AnsweringStage
from macft.model.adapters.attach import attach
from macft.model.backends.choose import make_backend
from macft.model.blocks.ends import AFTER, ends_of
from macft.model.fetch.local import find_local
from macft.model.fetch.resolve import resolve
from macft.model.files.weight_files import check_weight_files
from macft.model.load import LoadedModel, load, load_tokenizer
from macft.model.settings import ModelConfig
from macft.model.shape import read_shape
from macft.parallel.stage_layout import StageLayout
from macft.parallel.stage_places import StagePlace
from macft.planner.inference import WEIGHTS_ONLY, blocks_with_room
from macft.planner.placement.cluster_model import Node
from macft.planner.preflight.node_report import alike
from macft.planner.whole_model import resident_blocks
from macft.topology.settings import parse_budget

_PATIENT_SECONDS = 3.0
_ADAPTER_FILES = ("adapter_config.json", "adapters.safetensors")
_KINDS = tuple(ends_of(is_first=first, is_last=last) for first in (False, True) for last in (False, True))
_log = logging.getLogger("macft.generation")


@dataclass(frozen=True)
class DistributedModel:
    """A model that all ranks load in parts.

    Attributes:
        model: As the leader finds it.
        adapter: The files of an adapter's folder, by name; empty for none.
        memory_budget: As ``topology.memory_budget``, of each machine.
        together: Most answers that are computed at the same time, for which the blocks are cut.
        path_on_hosts: Where the model is on a host that has nothing at ``model.path``; empty if there is no such path.
    """

    model: ModelConfig
    adapter: Mapping[str, bytes] = field(repr=False)
    memory_budget: str
    together: int = 1
    path_on_hosts: str = ""

    @classmethod
    def of(
        cls, model: ModelConfig, adapter: Path | None, memory_budget: str, *, path_on_hosts: str = ""
    ) -> DistributedModel:
        """The model with the adapter in the folder ``adapter``."""
        files = {} if adapter is None else {name: (adapter / name).read_bytes() for name in _ADAPTER_FILES}
        return cls(model, files, memory_budget, path_on_hosts=path_on_hosts)

    def found_here(self) -> DistributedModel:
        """With the path of this machine."""
        if not self.path_on_hosts or find_local(self.model.path) is not None:
            return self
        return replace(self, model=replace(self.model, path=self.path_on_hosts))

    def pack(self) -> bytes:
        """As a message."""
        values = [asdict(self.model), dict(self.adapter), self.memory_budget, self.together, self.path_on_hosts]
        packed: bytes = msgpack.packb(values)
        return packed

    @classmethod
    def unpack(cls, message: bytes) -> DistributedModel:
        """The inverse of :meth:`pack`. Raises ProtocolError for anything else."""
        try:
            model, adapter, budget, together, path = msgpack.unpackb(message)
            files = {name: bytes(adapter[name]) for name in _ADAPTER_FILES if adapter}
            return cls(ModelConfig(**model), files, str(budget), int(together), str(path))
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise ProtocolError(f"the leader's model is malformed ({type(error).__name__})") from None


@dataclass(frozen=True)
class _Facts:
    """What a rank finds on its machine; ``error`` is why it can't load the model.

    ``bandwidth`` of memory and ``disk`` are bytes a second, ``block`` and ``head`` bytes of weights.
    """

    name: str
    # The same for ranks on one machine, of which each measures less than there is.
    machine: str = ""
    blocks: int = 0
    # Of the model's blocks, how many fit its memory, beside each of _KINDS; below 0: not even these do.
    room: tuple[int, ...] = ()
    bandwidth: float = 1.0
    disk: float = 1.0
    block: float = 0.0
    head: float = 0.0
    budget: float = 0.0
    # Of the model's files.
    digest: str = ""
    error: str = ""


@dataclass(frozen=True)
class OpenStage:
    """This rank's stage, ready to compute."""

    stage: AnsweringStage
    place: StagePlace
    channels: Channels
    layout: StageLayout
    from_disk: tuple[str, ...]
    """A line for each rank that reads blocks from disk for every token."""


class GenerationRank:
    """This process's rank of a cluster that answers.

    Args:
        collective: All ranks.
        name: Of this rank's machine, for messages.
        machine_share: The part of its machine's memory that it may use.
        usable: Bytes of memory to count with; None: what its machine has for it.
        tokenizer: The model's, if it was loaded before.
    """

    def __init__(
        self,
        collective: Collective,
        *,
        name: str,
        machine_share: float = 1.0,
        usable: float | None = None,
        tokenizer: TokenizerWrapper | None = None,
    ):
        self.collective = collective
        self._name, self._machine_share, self._tokenizer = name, machine_share, tokenizer
        self._loaded: LoadedModel | None = None
        self._holds: DistributedModel | None = None
        self._usable = usable

    @property
    def loaded(self) -> LoadedModel:
        """The model of the open stage."""
        assert self._loaded is not None
        return self._loaded

    def agree(self, wanted: DistributedModel | None, *, leads: bool) -> tuple[DistributedModel | None, int]:
        """What the leader wants all to load, None for nothing more, and its rank. A collective call.

        Raises:
            PeerLost: the leader is gone.
        """
        own = b"" if not leads else b"\0" + (b"" if wanted is None else wanted.pack())
        said = self.collective.all_gather(own)
        leaders = [rank for rank, message in enumerate(said) if message]
        if not leaders:
            raise PeerLost("the machine at whose terminal the command was given is gone")
        message = said[leaders[0]][1:]
        return (DistributedModel.unpack(message).found_here() if message else None), leaders[0]

    @contextmanager
    def open_stage(self, wanted: DistributedModel, leader: int) -> Iterator[OpenStage]:
        """This rank's part of ``wanted``, as all ranks have agreed on it. A collective call.

        Raises:
            MacftError: a rank can't load its part; all ranks raise it, and it names that rank.
        """
        facts = self._gather(self._facts(wanted))
        layout = _layout(facts, leader, wanted.together)
        stages = layout.pipelines[0]
        number = next(number for number, stage in enumerate(stages) if stage.rank == self.collective.rank)
        place = StagePlace(number, stages)
        with ExitStack() as stack:
            stage: AnsweringStage | None = None
            error = ""
            try:
                stage = stack.enter_context(self._stage(wanted, place.stage.blocks))
            except MacftError as problem:
                error = str(problem)
            self._gather(_Facts(self._name, error=error))
            assert stage is not None
            channels = self.collective.open_channels(channel_pairs(place), PURPOSE)
            _log.info("%s", layout)
            yield OpenStage(stage, place, channels, layout, _from_disk(facts, layout))

    def _facts(self, wanted: DistributedModel) -> _Facts:
        try:
            folder = resolve(wanted.model)
            check_weight_files(folder)
            shape = read_shape(folder)
            execution = inference_execution(wanted.model, folder)
            budget = self._budget(wanted, folder)
            weights, chip = execution.weight_format, own_chip()
            return _Facts(
                self._name,
                machine=f"{platform.node()}, {chip.chip if chip is not None else platform.machine()}",
                blocks=shape.blocks,
                room=tuple(blocks_with_room(shape, execution, budget, ends) for ends in _KINDS),
                bandwidth=self._memory_speed,
                disk=disk_speed().bytes_per_second,
                block=sum(shape.block_bytes(weights)) / shape.blocks,
                head=shape.outside_bytes(weights, (AFTER,)),
                budget=budget,
                digest=_digest(folder),
            )
        except MacftError as error:
            return _Facts(self._name, error=str(error))

    def _budget(self, wanted: DistributedModel, folder: Path) -> float:
        """Bytes that this rank may take for a model; what there is for all is looked up once, before one is loaded."""
        if self._usable is None:
            self._tokenizer = self._tokenizer or load_tokenizer(wanted.model, folder)  # takes memory of its own
            self._usable = usable_bytes(self._machine_share)
        return parse_budget(wanted.memory_budget, self._usable)

    @cached_property
    def _memory_speed(self) -> float:
        return memory_speed()

    def _gather(self, own: _Facts) -> list[_Facts]:
        """The facts of all ranks. Raises ModelError, on all ranks, if one of them has an error."""
        try:
            found = [_Facts(**msgpack.unpackb(each)) for each in self.collective.all_gather(msgpack.packb(asdict(own)))]
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise ProtocolError(f"what a rank says of itself is malformed ({type(error).__name__})") from None
        if problems := [f"{each.name}: {line}" for each in found for line in each.error.splitlines()[:1]]:
            raise ModelError("\n".join(problems))
        return found

    @contextmanager
    def _stage(self, wanted: DistributedModel, blocks: range) -> Iterator[AnsweringStage]:
        loaded = self._load(wanted, blocks)
        backend = make_backend(loaded.execution)
        with backend.installed(loaded.model):
            yield AnsweringStage(loaded, backend, blocks)

    def _load(self, wanted: DistributedModel, blocks: range) -> LoadedModel:
        folder = resolve(wanted.model)
        execution = inference_execution(wanted.model, folder)
        shape, budget = read_shape(folder), self._budget(wanted, folder)
        ends = ends_of(is_first=blocks.start == 0, is_last=blocks.stop == shape.blocks)
        count = blocks_in_memory(len(blocks), blocks_with_room(shape, execution, budget, ends))
        if count < len(blocks):
            heap.return_large_arrays()
        resident = tuple(blocks.start + number for number in resident_blocks(len(blocks), len(blocks), count))
        held, loaded = self._holds, self._loaded
        can_go_on = held is not None and held.model == wanted.model and held.adapter in ({}, wanted.adapter)
        if loaded is None or loaded.streamed is None or not can_go_on:
            self._loaded = None  # its memory is needed
            loaded = load(wanted.model, folder, execution.streamed(resident, reads_ends=True).padded(), self._tokenizer)
            held = None
        assert loaded.streamed is not None
        loaded.streamed.resident = resident
        if wanted.adapter and (held is None or not held.adapter):
            with tempfile.TemporaryDirectory(prefix="macft-") as place:
                for name, content in wanted.adapter.items():
                    (Path(place) / name).write_bytes(content)
                attach(loaded.model, Path(place))
        loaded.model.eval()
        self._loaded, self._holds = loaded, wanted
        return loaded


def follow_leader(rank: GenerationRank) -> None:
    """Computes what the leader asks for until it wants nothing more.

    Raises:
        MacftError: this rank can't go on, or the leader is gone.
    """
    while True:
        try:
            wanted, leader = rank.agree(None, leads=False)
            if wanted is None:
                return
            with ExitStack() as stack:
                try:
                    opened = stack.enter_context(rank.open_stage(wanted, leader))
                except (ModelError, ConfigError) as error:  # on all ranks: the leader decides what follows
                    _log.warning("%s", error)
                    continue
                follow(opened.stage, opened.place, opened.channels)
        except MembershipChanged:
            regroup(rank.collective)


def _layout(facts: Sequence[_Facts], leader: int, together: int) -> StageLayout:
    own = facts[leader]
    for other in facts:
        if other.digest != own.digest:
            raise ModelError(
                f"{other.name}: its files of the model differ from those of {own.name}; copy the model's "
                "folder, or remove it there to have it fetched again"
            )
    if len(facts) > own.blocks:
        raise ConfigError(
            f"--topology: {len(facts)} nodes are more than the {own.blocks} blocks of the model; "
            f"use {own.blocks} or fewer"
        )
    # Measurements of machines that are alike differ.
    speeds = alike([Node(each.machine, each.bandwidth, each.budget, each.disk) for each in facts])
    room = _room(facts, leader)
    nodes = [
        AnsweringNode(room[rank], each.block / speed.speed, each.block / speed.disk, each.head / speed.speed)
        for rank, (each, speed) in enumerate(zip(facts, speeds, strict=True))
    ]
    layout = answering_layout(nodes, own.blocks, leader, together)
    if layout is None:
        raise ConfigError(_too_large(facts, room))
    return layout


def _too_large(facts: Sequence[_Facts], room: Sequence[int]) -> str:
    """Why no cut fits, in one line: every rank has a block, and to read others from disk it has room for two."""
    least = 1 if any(blocks >= 2 for blocks in room) else 2
    lacking = [(each, least - blocks) for each, blocks in zip(facts, room, strict=True) if blocks < least]
    names = ", ".join(f"{each.name} has {each.budget / 1e9:.3g} GB" for each, _ in lacking)
    needed = max(each.budget + blocks * each.block / WEIGHTS_ONLY for each, blocks in lacking)
    return (
        f"topology.memory_budget: {names}, and a part of this model takes {needed / 1e9:.3g} GB, even with its other "
        "blocks read from disk; use a machine with more memory there, fewer nodes or fewer bits"
    )


def _from_disk(facts: Sequence[_Facts], layout: StageLayout) -> tuple[str, ...]:
    lines, room = [], _room(facts, layout.pipelines[0][0].rank)
    for stage in layout.pipelines[0]:
        count, each = len(stage.blocks), facts[stage.rank]
        if (read := count - blocks_in_memory(count, room[stage.rank])) > 0:
            lines.append(
                f"note: rank {stage.rank}, {each.name}, reads {read} of its {count} blocks from disk for every token, "
                f"{read * each.block / 1e9:.3g} GB; {each.budget / 1e9:.3g} GB of memory are available"
            )
    return tuple(lines)


def _room(facts: Sequence[_Facts], leader: int) -> list[int]:
    """By rank, the blocks that fit beside the ends that it will compute: the leader is the first of the ring."""
    count = len(facts)
    found = []
    for rank, each in enumerate(facts):
        number = (rank - leader) % count
        kind = _KINDS.index(ends_of(is_first=number == 0, is_last=number == count - 1))
        found.append(each.room[kind])
    return found


def regroup(collective: Collective, tell: Callable[[str], None] = _log.info) -> None:
    """A new ring of the ranks that are left; ``tell`` gets a line where that takes long.

    Raises:
        PeerLost: no rank is left, or this collective is none that goes on.
    """
    if not isinstance(collective, ElasticCollective):
        raise PeerLost("a rank is lost")
    started, told = time.monotonic(), ""

    def waiting(whom: str) -> bool:
        nonlocal told
        if whom != told and time.monotonic() - started > _PATIENT_SECONDS:
            told = whom
            tell(f"paused: this machine waits for {whom}")
        return True

    collective.regroup(waiting)


def _digest(folder: Path) -> str:
    """Of the model's configuration, and of the names and sizes of its weight files, which are too large to compare."""
    weights = sorted((path.name, path.stat().st_size) for path in folder.glob("model*.safetensors"))
    return hashlib.sha256((folder / "config.json").read_bytes() + repr(weights).encode()).hexdigest()
