"""``topology.placement=auto`` over several nodes: what their memories, disks and speeds make rank 0 choose."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness.families import build, configuration
from helpers.members import Node as Member
from helpers.rings import local_listeners, run_ranks
from macft.api.configuration import compose
from macft.collective.ring.ring import Ring
from macft.config.schema import TrainConfig
from macft.data.formats import Row
from macft.data.order import RowOrder
from macft.errors import ConfigError
from macft.membership.paxos import View
from macft.model.confirm import obstacle_to_cutting
from macft.model.execution import Execution
from macft.model.settings import ModelConfig
from macft.parallel.shares import DataShard
from macft.planner.node_part import NodePart
from macft.planner.placement.cluster_model import Node
from macft.planner.placement.inputs import alone
from macft.planner.plan.run_plan import plan_run
from macft.planner.preflight.agreement import Choice, RunPlacement, agree_on_placement, choose
from macft.planner.preflight.decision import Preflight, preflight
from macft.planner.workload import unlike_rows
from macft.topology.settings import TopologyConfig

BLOCKS = 12
FAST, SLOW = 3e9, 3e6
"""Disks, bytes a second."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of twelve blocks of 13 MB, as far as a plan looks at it."""
    sizes = {"num_hidden_layers": BLOCKS, "hidden_size": 512, "intermediate_size": 2048, "torch_dtype": "float32"}
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(configuration("llama") | sizes))
    return folder


def part_of(folder: Path, nodes: int, rank: int = 0, *, rows: int = 32, **topology: object) -> NodePart:
    """Rank ``rank`` in a step of ``rows`` rows of 32 tokens."""
    config = TrainConfig()
    config.training.batch_size, config.training.kernels, config.training.packing = rows, "mlx", "false"
    config.training.eval_every = 0
    hosts = [f"127.0.0.1:{7000 + 10 * number}" for number in range(nodes)]
    config.topology = TopologyConfig(**{"kind": "hosts", "hosts": hosts, "placement": "auto", **topology})  # type: ignore[arg-type]
    return NodePart(config, folder, [unlike_rows(rows, 33, 32)], DataShard(rank, nodes))


def nodes_of(
    folder: Path, memories: Sequence[float], disk: float, speeds: Sequence[float] = (), *, rows: int = 32
) -> list[Node]:
    """What nodes tell that may take ``memories`` MB."""
    told = []
    for rank, memory in enumerate(memories):
        whole_model = replace(part_of(folder, len(memories), rank, rows=rows).whole_model, budget=1e6 * memory)
        speed = 1e10 * (speeds[rank] if speeds else 1.0)
        execution, refusal = whole_model.choice()
        ways = () if refusal is not None else (alone(whole_model, execution, speed=speed, disk=disk),)
        told.append(Node(f"mac{rank}", speed, whole_model.budget, disk, ways))
    return told


def chosen(
    folder: Path, memories: Sequence[float], disk: float, speeds: Sequence[float] = (), *, rows: int = 32
) -> Choice:
    nodes = nodes_of(folder, memories, disk, speeds, rows=rows)
    return choose(part_of(folder, len(nodes), rows=rows), nodes, lambda: None)


def resident(choice: Choice) -> list[tuple[int, int]]:
    """Of each stage: blocks in memory, and all of its blocks."""
    assert choice.pipelines is not None
    best = choice.pipelines.best
    stages = [stage for each in best.layout.pipelines for stage in each]
    choices = [one for each in best.choices for one in each]
    return [(one.resident, len(stage.blocks)) for one, stage in zip(choices, stages, strict=True)]


def test_memory_and_disk_choose_each_placement(folder: Path) -> None:
    roomy = chosen(folder, [1000, 1000], FAST)
    assert roomy.placement == "replicate"
    assert roomy.lines[0].startswith("topology.placement=auto chose replicate: ")
    streamed = chosen(folder, [130, 130], FAST)
    assert streamed.placement == "stream"
    assert "s a step expected, pipeline " in streamed.lines[0]
    assert streamed.lines[0].endswith("; the whole model doesn't fit the memory of rank 0 (mac0), rank 1 (mac1)")
    pipeline = chosen(folder, [130, 130], SLOW)
    assert pipeline.placement == "pipeline"
    assert resident(pipeline) == [(6, 6), (6, 6)]
    # The hidden states of all rows at all borders don't fit either, those of the micro-batches in flight do.
    both = chosen(folder, [80, 80], FAST)
    assert both.placement == "pipeline"
    assert all(held < size for held, size in resident(both))
    assert both.lines[0].startswith("topology.placement=auto chose pipeline, of nodes that read blocks from disk: ")
    assert chosen(folder, [1, 1], FAST).lines == []  # each node's own plan says what it lacks


def test_nodes_with_the_whole_model_keep_it(folder: Path) -> None:
    """Though a cut by speed makes a pipeline about as fast; rows are then dealt by speed."""
    unequal = chosen(folder, [1000, 1000], FAST, [4, 1])
    assert unequal.placement == "replicate"
    assert ", pipeline " in unequal.lines[0]


def test_a_model_that_cannot_be_cut_is_no_pipeline(folder: Path, tmp_path: Path) -> None:
    nodes = nodes_of(folder, [130, 130], SLOW)
    choice = choose(part_of(folder, 2), nodes, lambda: "blocks share keys")
    assert choice.placement == "stream"
    assert choice.lines[0].endswith("; the model can't be cut: blocks share keys")
    execution = Execution(device="cpu", kernels="mlx", dtype="float32")
    assert obstacle_to_cutting(ModelConfig(), build("llama", tmp_path / "llama"), execution) is None
    assert obstacle_to_cutting(ModelConfig(), build("gemma4_text", tmp_path / "gemma"), execution) is not None


def test_a_slow_node_is_left_out(folder: Path) -> None:
    spare = chosen(folder, [130] * 3, SLOW, [1, 0.1, 1])
    assert spare.pipelines is not None
    assert str(spare.pipelines.best.layout).count("rank 1") == 0
    assert spare.pipelines.best.layout.described(3).endswith("; rank 1 without a stage")
    assert spare.lines[1].startswith("no stage for rank 1: a spare, which takes blocks when another node is lost; ")
    assert spare.lines[1].endswith(" s with all nodes in their order")


def test_several_pipelines_get_rows_as_the_run_deals_them(folder: Path) -> None:
    choice = chosen(folder, [130] * 4, SLOW, [1, 1, 1, 1], rows=128)
    assert choice.pipelines is not None
    assert len(choice.pipelines.best.layout.pipelines) == 2
    assert len(set(choice.pipelines.best.micro_batches)) == 1


@pytest.mark.parametrize(
    ("budgets", "more", "placement", "says"),
    [
        (["4GB", "4GB"], {}, "auto", ["auto chose replicate: the run fits the memory of each node"]),
        (
            ["14MB", "14MB"],
            {},
            "pipeline",
            ["auto chose pipeline, of nodes that read blocks from disk: ", "doesn't fit the memory of rank 0"],
        ),
        (["14MB", "14MB"], {"placement": "stream"}, "stream", []),
    ],
)
def test_all_ranks_agree(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    budgets: list[str],
    more: dict[str, object],
    placement: str,
    says: list[str],
) -> None:
    """Over a ring: each tells what it is, rank 0 decides. The disk was measured as a slow one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "macft").mkdir()
    (tmp_path / "macft" / "disk-speed.json").write_text(json.dumps({"bytes_per_second": 1e5}))
    build("llama", tmp_path / "model", num_hidden_layers=BLOCKS, hidden_size=128, intermediate_size=512)

    def agree(ring: Ring) -> RunPlacement:
        part = part_of(tmp_path / "model", 2, ring.rank, memory_budget=budgets[ring.rank], **more)
        return agree_on_placement(part, ring)

    first, second = run_ranks(local_listeners(2), agree)
    assert first.config.topology.placement == second.config.topology.placement == placement
    assert first.lines == second.lines
    assert len(first.lines) == bool(says)
    assert all(text in first.lines[0] for text in says)
    assert first.layout_of(2) == second.layout_of(2)
    assert (first.layout_of(2) is not None) == (placement == "pipeline")


@pytest.mark.parametrize("placement", ["pipeline", "auto"])
def test_ranks_stay_in_step_where_nothing_can_be_predicted(folder: Path, placement: str) -> None:
    """Each node's own decision then raises why: here, a block that the model doesn't have."""

    def agree(ring: Ring) -> tuple[bool, list[bytes]]:
        part = part_of(folder, 2, ring.rank, placement=placement)
        part.config.adapter.layers = [99]
        agreed = agree_on_placement(part, ring)
        return agreed.layout_of(2) is None, ring.all_gather(b"next")

    assert run_ranks(local_listeners(2), agree) == [(True, [b"next"] * 2)] * 2


def test_more_nodes_than_blocks_are_refused_by_a_run_and_its_plan(tmp_path: Path) -> None:
    """Where a pipeline is asked for; hosts would otherwise leave some of them out."""
    model = build("llama", tmp_path / "model")
    message = "pipelines of 3 stages are more than the model's 2 blocks allow; use fewer nodes, or "
    rows = [Row(np.arange(1, 9, dtype=np.int32), prompt_length=0)] * 8

    def refusal(ring: Ring) -> str:
        config = part_of(model, 3, ring.rank, rows=4, placement="pipeline").config
        with pytest.raises(ConfigError) as told:
            preflight(config, model, rows, RowOrder([8], [1.0], batch_size=4, seed=0), ring)
        return str(told.value)

    first, *others = run_ranks(local_listeners(3), refusal)
    assert message in first
    assert others == [first] * 2
    with pytest.raises(ConfigError, match=message):
        plan_run(compose(overrides=[f"model={model}", "topology.placement=pipeline", "plan.chips=[3x M2 8GB]"]))


@pytest.mark.parametrize(
    "more", [[], ["adapter.num_layers=3"], ["topology.resident_blocks=1"], ["topology.stages=[4,8]"]]
)
def test_a_run_has_the_stages_and_the_memory_of_its_plan(folder: Path, tmp_path: Path, more: list[str]) -> None:
    """The plan takes all rows to be of the longest length, since the model has no tokenizer here."""
    (tmp_path / "train.jsonl").write_text('{"text": "some words"}\n' * 16)
    words = [f"model={folder}", f"dataset={tmp_path / 'train.jsonl'}", "dataset.max_seq_length=64", "topology=local"]
    words += ["topology.nodes=2", "topology.placement=pipeline", "training.batch_size=8", "training.eval_every=0"]
    words += ["training.kernels=mlx", "training.packing=false", "topology.memory_budget=300MB", *more]
    config = compose(overrides=words)
    plan = plan_run(config)
    rows = [Row(np.full(64, number, dtype=np.int32), prompt_length=1) for number in range(8)]

    def decision(ring: Ring) -> Preflight:
        return preflight(config, folder, rows, RowOrder([8], [1.0], batch_size=8, seed=0), ring)

    for rank, found in enumerate(run_ranks(local_listeners(2), decision)):
        assert found.layout == f"pipeline: {plan.placements['pipeline'].layout}"
        assert found.notes[0] == f"memory: about {plan.stages[rank].peak / 1e9:.2f} GB of 0.3 GB expected"


@pytest.mark.parametrize(
    ("told", "wanted", "found"),
    [
        ({"topology.placement": "pipeline", "topology.pipelines": "2"}, "auto", ("pipeline", 2)),
        ({"topology.placement": "each node has the whole model"}, "auto", ("auto", 1)),
        ({"topology.placement": "each node has the whole model"}, "stream", ("stream", 1)),
        (
            {"topology.placement": "pipeline", "topology.pipelines": "1"},
            "stream",
            "the run that this node joins is a pi",
        ),
        (
            {"topology.placement": "each node has the whole model"},
            "pipeline",
            "is one in which each node has the whole",
        ),
    ],
)
def test_a_newcomer_takes_over_the_runs_placement(
    folder: Path, told: dict[str, str], wanted: str, found: str | tuple[str, int]
) -> None:
    members = Member("a", None), Member("b", None)
    newcomer = Member("c", None)
    try:
        newcomer.enter(View(0, tuple(member.membership.own for member in members)), b"secret")
        assert newcomer.ring is not None
        newcomer.ring.contents = {"training rows": "40 rows", **told}
        part = part_of(folder, 3, 2, placement=wanted)
        if isinstance(found, str):
            with pytest.raises(ConfigError, match=f"topology.placement: {wanted}, and .*{found}.*; use auto"):
                agree_on_placement(part, newcomer.ring)
            return
        placement = agree_on_placement(part, newcomer.ring)
        assert (placement.config.topology.placement, placement.config.topology.pipelines) == found
        assert placement.settings == told
        assert placement.layout_of(3) is None
    finally:
        for member in (*members, newcomer):
            member.close()
