"""What the nodes tell each other about themselves when they have formed a ring, for those who watch the run."""

from __future__ import annotations

import msgpack

from macft.device.memory import usable_bytes
from macft.report.events import NodeDescription, RingFormed
from macft.run.prepare import Run
from macft.run.role import host_name

_LONGEST_TEXT = 200


def describe_nodes(run: Run) -> RingFormed:
    """The nodes of this ring. A collective call.

    Raises:
        CollectiveError: as the collective's calls.
    """
    collective, layout, elastic = run.collective, run.trainer.nodes.places.layout, run.trainer.nodes.elastic
    own = [host_name(run.config, collective), run.device.partition(", float32 through")[0], usable_bytes()]
    speed = collective.speed
    nodes = []
    for rank, blob in enumerate(collective.all_gather(msgpack.packb(own))):
        name, device, memory = msgpack.unpackb(blob)
        blocks = layout.blocks_of(rank)
        nodes.append(
            NodeDescription(
                name=str(name)[:_LONGEST_TEXT],
                device=str(device)[:_LONGEST_TEXT],
                memory=float(memory),
                blocks=[blocks[0], blocks[-1]] if layout.has_stages and blocks else None,
                to_next=None if speed is None else speed.bandwidths[rank],
            )
        )
    generation = 0 if elastic is None else elastic.members.generation
    return RingFormed(generation, nodes, None if speed is None else speed.latency)
