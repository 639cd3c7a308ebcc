"""One rank of a measured implementation: ``python -m macft.collective_bench.worker SOCKET NAME RANK SPECIFICATION``.

It reads orders, each a line of JSON, from the Unix socket of
:class:`~macft.collective_bench.measured_group.MeasuredGroup`, and answers each one.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from typing import NotRequired, TypedDict

from macft.collective_bench.measured_group import Answer
from macft.collective_bench.sides import Joined, Mlx, Side, join


class Order(TypedDict):
    """An order; see :func:`execute`."""

    size: NotRequired[int]
    check: NotRequired[bool]
    calls: NotRequired[int]
    elements: NotRequired[list[int]]
    fused: NotRequired[bool]


def main(arguments: list[str]) -> int:
    """Joins the group and executes orders until the socket is closed."""
    path, name, given_rank, specification = arguments
    rank = int(os.environ["OMPI_COMM_WORLD_RANK"] if given_rank == "mpi" else given_rank)
    group = json.loads(specification)
    with socket.socket(socket.AF_UNIX) as control:
        control.connect(path)
        orders, answers = control.makefile("r"), control.makefile("w")

        def answer(message: Answer) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        answer({"rank": rank})
        try:
            side = join(name, rank, group["addresses"], group["settings"])
            answer({"joined": True})
            for line in orders:
                answer(execute(json.loads(line), side))
            side.close()
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"})
            return 1
    return 0


def execute(order: Order, side: Side) -> Answer:
    """Executes one order.

    ``{"size": bytes}`` makes the array, ``{"check": true}`` sums it once, ``{"calls": n}`` times n sums.
    ``{"elements": [...], "calls": n, "fused": bool}`` makes and checks n all-reduces of arrays of these sizes.
    """
    if "elements" in order:
        assert isinstance(side, Joined | Mlx)
        return {"right": all(side.sums(order["elements"], order["calls"], fused=order["fused"]))}
    if "size" in order:
        side.prepare(order["size"])
        return {"ready": True}
    side.barrier()
    if "check" in order:
        side.reduce()
        total = side.first()
        side.clear()
        return {"sum": total}
    seconds = []
    for _ in range(order["calls"]):
        started = time.perf_counter()
        side.reduce()
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds}


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    # Skips the interpreter's shutdown, in which threads of a peer may hang (MLX's ring, if its neighbour is gone).
    os._exit(status)
