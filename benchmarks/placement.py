"""The planner's layout of a model over unequal Macs beside an even and a memory-proportional cut, simulated.

    python benchmarks/placement.py [--model PATH] [--macs "M2 Max 64GB,..."] [--rows 8,16,32] [--length 512] [--link L]
    python benchmarks/placement.py --measure [--kernels mlx]

Every Mac, its memory and its speed are those of `macft plan`: 45% of the chip's peak. All blocks have an adapter, and
are computed again in the backward pass. A step of each cut is simulated pass by pass, with the links, without the
exchange of gradients, which is the same for all. The cut by memory gives each Mac blocks in proportion to its memory,
as exo does. "pipeline" is the planner's best one, "planner" the best of all placements that a run can have. Ideal: all
Macs compute all the time. Where a cut does not fit a Mac's memory, this is said.

`--measure` measures a pipeline's parts first, SmolLM2-135M on one core of this machine (stage_times.py), simulates a
step of two stages with them, measures it (pipeline.py, a core for each stage), and prints the error. What a backward
pass and the head cost beside a forward pass is then taken from what was measured.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pipeline
import stage_times
from big_models import float32_copy
from macft.device.chips import find_macs
from macft.device.kind import METAL, Device
from macft.model.adapters.settings import AdapterConfig
from macft.model.execution import resolve
from macft.model.fetch.bundled import ensure_bundled
from macft.model.settings import ModelConfig
from macft.model.shape import read_shape, shape_of
from macft.network.link_kinds import find_links
from macft.parallel.shares import DataShard
from macft.parallel.stage_layout import Stage, StageLayout
from macft.planner.known_models import known_models
from macft.planner.memory_planner import MemoryPlanner
from macft.planner.placement.cluster_model import ModelCost, Node, NodeLink, RingLinks, StageCost, StepWork
from macft.planner.placement.compare import LayoutDecision, compare
from macft.planner.placement.inputs import alone, model_cost, step_work
from macft.planner.placement.pipeline_simulator import simulate
from macft.planner.placement.stage_costs import StageTables
from macft.planner.speed import MAC_EFFICIENCY
from macft.planner.whole_model import WholeModelPlanner
from macft.planner.workload import unlike_rows
from ranks import hear, start

LLAMA_70B = "mlx-community/Meta-Llama-3.1-70B-Instruct-4bit"
UNEQUAL = "M2 Max 64GB,M4 Pro 24GB,M1 Max 32GB,M2 Pro 16GB"
BUDGET = 0.95


@dataclass(frozen=True)
class Cut:
    """A layout, seconds of a simulated step, and the nodes whose memory it exceeds."""

    name: str
    layout: StageLayout
    seconds: float
    too_large: tuple[str, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """What a backward pass with the block computed again, and the head, take, as multiples of what is assumed."""

    backward: float = 1.0
    head: float = 1.0

    def of(self, model: ModelCost) -> ModelCost:
        """``model`` with these."""
        pairs = zip(model.forward, model.backward, strict=True)
        backward = tuple(self.backward * (first + second) - first for first, second in pairs)
        return replace(model, backward=backward, loss_operations=self.head * model.loss_operations)


def inputs(
    model: str, macs: str, rows: int, length: int, calibration: Calibration | None = None
) -> tuple[list[Node], ModelCost, StepWork]:
    """Nodes, costs and work of a step of ``rows`` x ``length`` tokens, with an adapter on all blocks."""
    shape = shape_of(known_models()[model], model)
    execution = resolve(ModelConfig(), shape.checkpoint, METAL, packing="false", compile="false", recompute="blocks")
    step = unlike_rows(rows, length + 1, length // 4)
    planner = MemoryPlanner(shape, execution, AdapterConfig(), "adamw", [step], validation_rows=0)
    assumed = model_cost(planner)
    cost = (calibration or Calibration()).of(assumed)
    found = find_macs(macs.split(","))
    speeds = [mac.chip.tflops * 1e12 * MAC_EFFICIENCY for mac in found]
    nodes = []
    for rank, (mac, speed) in enumerate(zip(found, speeds, strict=True)):
        own = replace(planner, steps=[step.of_shard(DataShard(rank, len(found), tuple(speeds)))])
        whole_model = WholeModelPlanner(own, BUDGET * mac.usable_bytes, "auto", "auto", auto=False)
        node, (chosen, refusal) = Node(mac.name, speed, whole_model.budget, mac.chip.disk * 1e9), whole_model.choice()
        if refusal is None:
            way = alone(whole_model, chosen, speed=speed, disk=node.disk)
            way = replace(way, per_token=way.per_token * operations(cost) / operations(assumed))
            node = replace(node, alone=(way,))
        nodes.append(node)
    return nodes, cost, replace(step_work(planner, None), recompute="always")


def operations(model: ModelCost) -> float:
    """Of a token, with blocks computed again."""
    return sum(model.forward) * 2 + sum(model.backward) + model.loss_operations


def in_proportion(blocks: int, shares: Sequence[float]) -> list[int]:
    """Blocks for each node in proportion to ``shares``, by largest remainder, one at least."""
    exact = [blocks * share / sum(shares) for share in shares]
    counts = [max(1, int(each)) for each in exact]
    by_remainder = sorted(range(len(shares)), key=lambda node: int(exact[node]) - exact[node])
    for place in range(max(0, blocks - sum(counts))):
        counts[by_remainder[place % len(counts)]] += 1
    while sum(counts) > blocks:
        counts[counts.index(max(counts))] -= 1
    return counts


def simulated(
    name: str,
    counts: Sequence[int],
    nodes: Sequence[Node],
    ring: RingLinks,
    model: ModelCost,
    work: StepWork,
    parts: int,
) -> Cut:
    """The cut that gives the nodes ``counts`` blocks in their order, in a step of ``parts`` micro-batches."""
    tokens, stages, costs, too_large, first = work.tokens / parts, [], list[StageCost](), [], 0
    for rank, count in enumerate(counts):
        from_end = len(counts) - rank
        window = min(parts, from_end)
        roomy = Node(nodes[rank].name, nodes[rank].speed, 1e15, nodes[rank].disk)
        settings = {"recompute": "always", "streams": False}
        wire = 0.0
        if from_end > 1:
            wire = ring.between(rank, rank + 1).seconds(tokens * model.hidden)
        table = StageTables(model, roomy, tokens, max(tokens, work.longest), **settings)
        costs.append(table.choice(first, first + count, window, wire).cost)
        own = StageTables(model, nodes[rank], tokens, max(tokens, work.longest), **settings).seconds(window)
        too_large += [nodes[rank].name] if own[first, first + count] == float("inf") else []
        stages.append(Stage(rank, first, first + count))
        first += count
    return Cut(name, StageLayout((tuple(stages),)), simulate(costs, parts).seconds, tuple(too_large))


def cuts(nodes: Sequence[Node], ring: RingLinks, model: ModelCost, work: StepWork) -> list[Cut]:
    """The cuts of the table, the planner's choice and the ideal last."""
    parts = work.rows
    even = simulated("even", in_proportion(model.blocks, [1.0] * len(nodes)), nodes, ring, model, work, parts)
    memory = [node.memory for node in nodes]
    by_memory = simulated("by memory", in_proportion(model.blocks, memory), nodes, ring, model, work, parts)
    pipelines = compare(nodes, ring, model, work, kinds=["pipeline"])["pipeline"]
    whole = compare(nodes, ring, model, work, kinds=["replicate", "stream"])
    best = min([pipelines, *whole.values()], key=lambda decision: decision.seconds)
    ideal = work.tokens * operations(model) / sum(node.speed for node in nodes)
    return [even, by_memory, _cut("pipeline", pipelines), _cut("planner", best), Cut("ideal", best.layout, ideal)]


def _cut(name: str, decision: LayoutDecision) -> Cut:
    return Cut(name, decision.layout, decision.seconds - decision.exchange)


def measured(kernels: str, rows: int, length: int, steps: int) -> Calibration:
    """Measures the parts of a step on this machine, and prints how far a simulated step of two stages is off."""
    counts = [17, 13]
    with tempfile.TemporaryDirectory() as scratch:
        folder = float32_copy(Path(scratch))
        (process,) = start([stage_times.__file__, str(folder), kernels, str(length)], [pipeline.one_core(0)])
        parts = stage_times.PartTimes(**hear(process))
        process.wait()
        words = ["--kernels", kernels, "--rows", str(rows), "--length", str(length), "--steps", str(steps)]
        words += ["--stages", ",".join(map(str, counts))]
        prefixes = [pipeline.one_core(core) for core in range(len(counts))]
        ranks = pipeline.measured(words, prefixes, ["127.0.0.1:0"] * len(counts), folder)
    found = {name: statistics.median(ranks[0][name]) for name in ("alone", "together")}
    expected = {
        "alone": rows * sum(stage.busy for stage in parts.stages([sum(counts)])),
        "together": simulate(parts.stages(counts), rows).seconds,
    }
    print(f"SmolLM2-135M, kernels={kernels}, {rows} rows of {length} tokens, a core for each node, ms of a row:")
    times = [f"{name} {1e3 * getattr(parts, name):.1f}" for name in ("embedding", "forward", "backward", "head")]
    print(f"  {', '.join(times)} (forward and backward of a block)")
    for name, what in (("alone", "one node"), ("together", f"two stages of {counts[0]} and {counts[1]} blocks")):
        error = expected[name] / found[name] - 1
        print(f"  {what}: simulated {expected[name]:.2f} s a step, measured {found[name]:.2f} s: {error:+.1%}")
    return calibration_of(parts, kernels, length)


def calibration_of(parts: stage_times.PartTimes, kernels: str, length: int) -> Calibration:
    """Measured costs, against those that the planner assumes of the same model."""
    shape = read_shape(ensure_bundled())
    execution = resolve(
        ModelConfig(), shape.checkpoint, Device.default(), kernels=kernels, packing="false", compile="false"
    )
    planner = MemoryPlanner(shape, execution, AdapterConfig(), "adamw", [unlike_rows(4, length, length - 1)], 0)
    assumed = model_cost(planner)
    forward, backward = assumed.forward[0], assumed.forward[0] + assumed.backward[0]
    calibration = Calibration(
        parts.backward / parts.forward * forward / backward,
        parts.head / parts.forward * forward / assumed.loss_operations,
    )
    print(
        f"  beside a forward pass, backward takes {calibration.backward:.2f} and the head {calibration.head:.2f} times "
        "what the planner assumes"
    )
    return calibration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=LLAMA_70B)
    parser.add_argument("--macs", default=UNEQUAL)
    parser.add_argument("--rows", default="8,16,32")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--link", default="ethernet")
    parser.add_argument("--measure", action="store_true", help="calibrate by this machine")
    parser.add_argument("--kernels", choices=["mlx", "cpu"], default="cpu", help="of --measure")
    parser.add_argument("--measured-rows", type=int, default=8)
    parser.add_argument("--measured-length", type=int, default=128)
    parser.add_argument("--measured-steps", type=int, default=3)
    arguments = parser.parse_args()
    calibration = None
    if arguments.measure:
        sizes = arguments.measured_rows, arguments.measured_length, arguments.measured_steps
        calibration = measured(arguments.kernels, *sizes)
    (kind,) = find_links(arguments.link)
    print(f"{arguments.model}, rows of {arguments.length} tokens, {kind.name}")
    print(f"{'rows':>4} {'cut':10} {'s/step':>8} {'tokens/s':>9} {'planner is':>11}  blocks")
    for rows in map(int, arguments.rows.split(",")):
        nodes, model, work = inputs(arguments.model, arguments.macs, rows, arguments.length, calibration)
        ring = RingLinks.of_one_kind(NodeLink(kind.bandwidth, kind.latency), len(nodes))
        found = cuts(nodes, ring, model, work)
        planned = found[-2].seconds
        for cut in found:
            layout = "" if cut.name == "ideal" else str(cut.layout)
            marked = f"  (too large for {', '.join(cut.too_large)})" if cut.too_large else ""
            rate = work.tokens / cut.seconds
            ratio = f"{cut.seconds / planned:10.2f}x"
            print(f"{rows:4} {cut.name:10} {cut.seconds:8.2f} {rate:9.0f} {ratio}  {layout}{marked}")


if __name__ == "__main__":
    main()
