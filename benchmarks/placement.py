"""The planner's cut of a model over unequal Macs beside an even and a memory-proportional one, simulated.

    python benchmarks/placement.py [--model PATH] [--macs "M2 Max 64GB,..."] [--rows 16] [--length 512] [--link LINK]

Every Mac, its memory and its speed are those of `macft plan`: 45% of the chip's peak. All blocks have an adapter, and
are computed again in the backward pass. A step of each cut is simulated pass by pass, with the links. The cut by memory
gives each Mac blocks in proportion to its memory, as exo does. Ideal: all Macs compute all the time. Where a cut does
not fit a Mac's memory, this is said.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

from macft.device.chips import find_macs
from macft.device.kind import METAL
from macft.model.adapter_settings import AdapterConfig
from macft.model.execution import resolve
from macft.model.settings import ModelConfig
from macft.model.shape import shape_of
from macft.network.link_kinds import find_links
from macft.parallel.stage_layout import Stage, StageLayout
from macft.planner.cluster_model import ModelCost, Node, NodeLink, RingLinks, StageCost, StepWork
from macft.planner.fit import MemoryPlanner
from macft.planner.layout_inputs import model_cost, step_work
from macft.planner.partition import choose_layout
from macft.planner.pipeline_simulator import simulate
from macft.planner.run_plan import known_models
from macft.planner.speed import MAC_EFFICIENCY
from macft.planner.stage_costs import StageTables
from macft.planner.workload import unlike_rows

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


def inputs(model: str, macs: str, rows: int, length: int) -> tuple[list[Node], ModelCost, StepWork]:
    """Nodes, costs and work of a step of ``rows`` x ``length`` tokens, with an adapter on all blocks."""
    shape = shape_of(known_models()[model], model)
    execution = resolve(ModelConfig(), shape.checkpoint, METAL, packing="false", compile="false")
    steps = [unlike_rows(rows, length + 1, length // 4)]
    planner = MemoryPlanner(shape, execution, AdapterConfig(), "adamw", steps, validation_rows=0)
    nodes = [
        Node(mac.name, mac.chip.tflops * 1e12 * MAC_EFFICIENCY, BUDGET * mac.usable_bytes, mac.chip.disk * 1e9)
        for mac in find_macs(macs.split(","))
    ]
    return nodes, model_cost(planner), replace(step_work(planner, None), recompute="always")


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
    """The cuts of the table; the planner's is the last but the ideal one."""
    parts = work.rows
    even = simulated("even", in_proportion(model.blocks, [1.0] * len(nodes)), nodes, ring, model, work, parts)
    memory = [node.memory for node in nodes]
    by_memory = simulated("by memory", in_proportion(model.blocks, memory), nodes, ring, model, work, parts)
    decision = choose_layout(nodes, ring, model, work, wanted="pipeline")
    planned = Cut("planner", decision.layout, decision.seconds - decision.exchange)
    operations = sum(model.forward) * 2 + sum(model.backward) + model.loss_operations
    ideal = work.tokens * operations / sum(node.speed for node in nodes)
    return [even, by_memory, planned, Cut("ideal", decision.layout, ideal)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=LLAMA_70B)
    parser.add_argument("--macs", default=UNEQUAL)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--link", default="ethernet")
    arguments = parser.parse_args()
    nodes, model, work = inputs(arguments.model, arguments.macs, arguments.rows, arguments.length)
    (kind,) = find_links(arguments.link)
    ring = RingLinks.of_one_kind(NodeLink(kind.bandwidth, kind.latency), len(nodes))
    found = cuts(nodes, ring, model, work)
    planned = found[-2].seconds
    print(f"{arguments.model}, {work.rows} rows of {arguments.length} tokens, {kind.name}")
    print(f"{'cut':10} {'s/step':>8} {'tokens/s':>9} {'planner is':>11}  blocks")
    for cut in found:
        layout = "" if cut.name == "ideal" else str(cut.layout)
        marked = f"  (too large for {', '.join(cut.too_large)})" if cut.too_large else ""
        rate = work.tokens / cut.seconds
        print(f"{cut.name:10} {cut.seconds:8.2f} {rate:9.0f} {cut.seconds / planned:10.2f}x  {layout}{marked}")


if __name__ == "__main__":
    main()
