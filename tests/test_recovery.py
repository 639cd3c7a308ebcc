"""Nodes that come together again: the newest state counts, and nothing that one of them knows is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx.optimizers as optim
import pytest

from helpers.members import Node
from helpers.report_events import HPARAMS, started, step
from macft.checkpoint.saver import CheckpointSaver
from macft.checkpoint.snapshot import Progress
from macft.checkpoint.store import CheckpointStore
from macft.errors import MembershipChanged, RendezvousError
from macft.membership.paxos import View
from macft.parallel.balance import ShareBalancer
from macft.parallel.node_status import NodeStatus
from macft.parallel.stage_layout import StageLayout
from macft.report.event_bytes import pack_events, unpack_events
from macft.report.events import Evaluated, Reporter
from macft.report.run_folder import RunFolder
from macft.report.settings import ReportConfig
from macft.report.sinks import fan_out
from macft.training.checkpoint_policy import CheckpointPolicy
from macft.training.coordination import NodeCoordinator
from macft.training.gradients.reducer import GradientReducer
from macft.training.node_fit import NodeFit
from macft.training.recovery import Recovery
from macft.training.state import TrainState
from macft.training.stop_request import Stopped, StopRequest
from macft.training.throttle import NoThrottle


class NoRoom(NodeFit):
    """A memory that holds a third of a run."""

    def __init__(self) -> None:
        self.taken = 0

    def obstacle(self, layout: StageLayout, rank: int, world_size: int) -> str:
        assert layout.place_of(rank) is not None
        return "" if world_size > 2 else f"the run would need about {12 / world_size:.2f} GB and may take 4.00 GB"

    def take(self) -> None:
        self.taken += 1


class Rank:
    """A rank of a run: what of it a recovery is about."""

    def __init__(self, node: Node, rank: int, folder: Path):
        assert node.ring is not None
        self.node, self.ring = node, node.ring
        ring = self.ring
        self.folder = RunFolder(folder / str(rank))
        config = ReportConfig(console=False, tensorboard=False)
        self.reporter: Reporter = fan_out.build(config, self.folder, hparams=HPARAMS, is_main=rank == 0, first_step=0)
        self.state = TrainState(nn.Linear(2, 2), optim.SGD(0.1), Progress(), GradientReducer(ring))
        self.stop = StopRequest()
        self.saver = CheckpointSaver(CheckpointStore(folder / f"checkpoints{rank}", keep_last=1))
        self.nodes = NodeCoordinator(ring, ShareBalancer("equal", 3, every=1), NoThrottle(), fit=NoRoom())
        self.recovery = Recovery(
            ring,
            self.state,
            self.nodes,
            CheckpointPolicy(self.state, ring, self.saver, self.reporter, every=0),
            self.reporter,
            self.stop,
        )
        self.reporter.handle(started(self.folder.path))

    def trained(self, until: int) -> None:
        """Steps are made and reported, each with its validation."""
        for number in range(self.state.progress.step + 1, until + 1):
            self.reporter.handle(step(number))
            self.reporter.handle(Evaluated(number, 3.0, 900, 1.0, True))
        self.state.progress.step = self.state.progress.evaluated_step = until

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Those in this rank's metrics file."""
        lines = self.folder.metrics.read_text().splitlines() if self.folder.metrics.exists() else []
        return [event for event in map(json.loads, lines) if event["type"] == kind]

    def steps(self, kind: str = "step_done") -> list[int]:
        """The steps of these events."""
        return [event["step"] for event in self.events(kind)]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[Rank]]:
    """Three ranks in generation 1, with separate disks."""
    nodes = [Node(f"n{rank}", None) for rank in range(3)]
    with ExitStack() as stack:
        for node in nodes:
            stack.callback(node.close)
        view = View(0, tuple(node.membership.own for node in nodes))
        for node in nodes:
            node.enter(view, b"secret of this run")
        for change in [node.regroup() for node in nodes]:
            change.result(60)
        # In the thread that will use them, for MLX evaluates arrays where they were made.
        ranks = [node.thread.submit(Rank, node, number, tmp_path).result() for number, node in enumerate(nodes)]
        for rank in ranks:
            stack.callback(rank.reporter.close)
        yield ranks


def regroup(ranks: list[Rank]) -> None:
    changes = [rank.node.thread.submit(rank.recovery.regroup) for rank in ranks]
    assert [change.result(60) for change in reversed(changes)] == [True, True]


def test_a_step_that_only_one_rank_has_made_is_reported_by_another(ranks: list[Rank]) -> None:
    lost, leads, ahead = ranks
    lost.trained(3)  # it made step 4, too, and was killed before it could report it
    leads.trained(3)
    ahead.trained(4)
    lost.node.close()
    regroup([leads, ahead])
    assert leads.state.progress.step == 4
    leads.trained(5)
    assert leads.steps() == leads.steps("evaluated") == [1, 2, 3, 4, 5]
    assert ahead.steps() == []


def test_a_leader_that_was_behind_reports_what_the_others_did(ranks: list[Rank]) -> None:
    leads, ahead, lost = ranks
    leads.trained(3)
    ahead.trained(4)
    lost.node.close()
    regroup([leads, ahead])
    leads.trained(5)
    assert leads.steps() == leads.steps("evaluated") == [1, 2, 3, 4, 5]


def test_a_step_that_all_have_made_is_reported_once(ranks: list[Rank]) -> None:
    for rank in ranks:
        rank.trained(4)
    ranks[0].node.close()
    regroup(ranks[1:])
    assert ranks[1].steps() == ranks[1].steps("evaluated") == [1, 2, 3, 4]


def test_events_come_back_from_bytes_as_they_were() -> None:
    events = [replace(step(4), nodes=[NodeStatus(tokens=7, watts=11.5)]), Evaluated(4, 3.0, 900, 1.0, True)]
    assert unpack_events(pack_events(events)) == events


def test_a_node_with_other_contents_is_left_out_and_the_others_go_on(ranks: list[Rank]) -> None:
    for rank, rows in zip(ranks, ("40 rows", "40 rows", "39 rows"), strict=True):
        rank.ring.contents = {"training rows": rows}
    first, second, other = [rank.node.thread.submit(rank.recovery.regroup) for rank in ranks]
    with pytest.raises(RendezvousError, match="this node differs from the run: training rows: 39 rows instead of 40"):
        other.result(60)
    ranks[2].node.close()
    assert (first.result(60), second.result(60)) == (True, True)
    assert ranks[0].ring.members.names == ("n0", "n1")


def test_a_run_that_the_nodes_left_cannot_hold_pauses(ranks: list[Rank]) -> None:
    """It says what is missing, until a stop is requested or a node wants to join; both nodes leave the pause alike."""
    first, second, lost = ranks
    for rank in ranks:
        rank.trained(4)
    lost.node.close()
    regroup([first, second])
    missing = "the run would need about 6.00 GB and may take 4.00 GB"
    assert first.nodes.lacking == [f"n0: {missing}", f"n1: {missing}"]
    pauses = [rank.node.thread.submit(rank.recovery.wait_for_memory) for rank in (first, second)]
    second.stop.defer("")
    second.stop.request()
    for pause in pauses:
        with pytest.raises(Stopped):
            pause.result(60)
    (note,) = [event for event in first.events("noted") if "paused" in event["text"]]
    assert note["text"].startswith(
        f"paused: the nodes that are left can't hold the run. n0: {missing}. n1: {missing}. It"
    )
    assert first.state.progress.step == 4
    assert first.saver.store.steps() == [4]


def test_a_pause_ends_when_a_node_joins(ranks: list[Rank]) -> None:
    first, second, lost = ranks
    lost.node.close()
    regroup([first, second])
    pauses = [rank.node.thread.submit(rank.recovery.wait_for_memory) for rank in (first, second)]
    newcomer = Node("n3", None)
    try:
        newcomer.enter(first.ring._view, b"secret of this run")
        joining = newcomer.regroup()
        for pause in pauses:
            with pytest.raises(MembershipChanged, match="a node wants to join"):
                pause.result(60)
        for ring in (first.node.regroup(), second.node.regroup(), joining):
            assert ring.result(60).names == ("n0", "n1", "n3")
    finally:
        newcomer.close()
