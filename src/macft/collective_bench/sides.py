"""One rank's side of an implementation of all-reduce: macft's own and its peers, behind one small interface.

Only the library of the chosen implementation is imported, so that a peer can run in a Python of its own.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import mlx.core as mx

    from macft.collective.base import Collective

JOIN_SECONDS = 60.0
NAMES = ("macft", "mlx", "gloo", "mpi", "tcp")
"""macft's collective as configured, MLX's ring, torch's gloo, MPI, and a raw TCP copy."""


class Side(Protocol):
    """All-reduce of float32 on one rank. All ranks make the same calls in the same order."""

    def prepare(self, size: int) -> None:
        """Makes an array of ``size`` bytes, a multiple of 4, filled with rank + 1."""
        ...

    def reduce(self) -> None:
        """Sums the array over all ranks; returns once the sum is complete."""
        ...

    def first(self) -> float:
        """The array's first element."""
        ...

    def clear(self) -> None:
        """Fills the array with 0, so that repeated sums never overflow."""
        ...

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        ...

    def close(self) -> None:
        """Leaves the group."""
        ...


class _NumpySide:
    """A side with a NumPy array."""

    rank: int
    array: NDArray[np.float32]

    def prepare(self, size: int) -> None:
        self.array = np.full(size // 4, self.rank + 1, np.float32)

    def first(self) -> float:
        return float(self.array[0])

    def clear(self) -> None:
        self.array[:] = 0


class Joined(_NumpySide):
    """One of macft's collectives, which this rank has joined."""

    def __init__(self, collective: Collective):
        self.rank, self._collective = collective.rank, collective
        self.barrier, self.close = collective.barrier, collective.close

    def reduce(self) -> None:
        self._collective.all_reduce([self.array])

    def sums(self, elements: Sequence[int], calls: int, *, fused: bool) -> Iterator[bool]:
        """See :meth:`Mlx.sums`."""
        expected = self._collective.world_size * (self._collective.world_size + 1) / 2
        for turn in range(calls):
            chosen = elements if fused else [elements[turn % len(elements)]]
            arrays = [np.full(count, self.rank + 1, np.float32) for count in chosen]
            self._collective.all_reduce(arrays)
            yield all(bool((array == expected).all()) for array in arrays)


class Mlx:
    """``mx.distributed.all_sum`` over MLX's ring, on MLX arrays."""

    def __init__(self, rank: int, addresses: Sequence[str]):
        import mlx.core as mx

        self._mx, self._rank = mx, rank
        with tempfile.TemporaryDirectory() as folder:
            hosts = Path(folder) / "hosts.json"
            hosts.write_text(json.dumps([[address] for address in addresses]))
            os.environ |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
            self._group = mx.distributed.init(strict=True, backend="ring")
        self._array = self._one = mx.ones(1)

    def prepare(self, size: int) -> None:
        self._array = self._mx.full(size // 4, float(self._rank + 1))
        self._mx.eval(self._array)

    def _sum(self, array: mx.array) -> mx.array:
        total = self._mx.distributed.all_sum(array, group=self._group, stream=self._mx.cpu)
        self._mx.eval(total)
        return total

    def reduce(self) -> None:
        self._array = self._sum(self._array)

    def sums(self, elements: Sequence[int], calls: int, *, fused: bool) -> Iterator[bool]:
        """Makes ``calls`` all-reduces and yields whether each sum was correct.

        Args:
            elements: Sizes of the arrays.
            calls: The number of all-reduces.
            fused: Whether one call reduces arrays of all sizes, instead of one size after the other.
        """
        count = self._group.size()
        for turn in range(calls):
            chosen = elements if fused else [elements[turn % len(elements)]]
            arrays = [self._mx.full(size, float(self._rank + 1)) for size in chosen]
            sums = [self._mx.distributed.all_sum(array, group=self._group, stream=self._mx.cpu) for array in arrays]
            self._mx.eval(sums)
            yield all(bool((np.array(total) == count * (count + 1) / 2).all()) for total in sums)

    def first(self) -> float:
        return float(np.array(self._array[0]))

    def clear(self) -> None:
        self._array = self._mx.zeros_like(self._array)
        self._mx.eval(self._array)

    def barrier(self) -> None:
        self._sum(self._one)

    def close(self) -> None:
        """MLX leaves the group when the process ends."""


class Gloo:
    """``torch.distributed.all_reduce`` over gloo; the ranks meet at the first address."""

    def __init__(self, rank: int, addresses: Sequence[str]):
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        self._torch, self._dist, self._rank = torch, dist, rank
        dist.init_process_group("gloo", f"tcp://{addresses[0]}", rank=rank, world_size=len(addresses))
        self._array = torch.zeros(1)
        self.barrier, self.close = dist.barrier, dist.destroy_process_group

    def prepare(self, size: int) -> None:
        self._array = self._torch.full((size // 4,), float(self._rank + 1))

    def reduce(self) -> None:
        self._dist.all_reduce(self._array)

    def first(self) -> float:
        return float(self._array[0].item())

    def clear(self) -> None:
        self._array.zero_()


class Mpi(_NumpySide):
    """``MPI_Allreduce`` in place through mpi4py; the ranks are started by mpirun."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._in_place, self._world = MPI.IN_PLACE, MPI.COMM_WORLD
        self.rank = self._world.Get_rank()
        self.barrier, self.close = self._world.Barrier, MPI.Finalize

    def reduce(self) -> None:
        self._world.Allreduce(self._in_place, self.array)


def join(name: str, rank: int, addresses: Sequence[str], settings: Mapping[str, object]) -> Side:
    """Joins the group of implementation ``name`` (one of ``NAMES``); ``settings`` are macft's ``collective`` group."""
    if name == "macft":
        return Joined(_join_macft(rank, addresses, settings))
    if name == "tcp":
        from macft.collective_bench.tcp import RawTcp

        return RawTcp(rank, addresses)
    if name == "mpi":
        return Mpi()
    return Mlx(rank, addresses) if name == "mlx" else Gloo(rank, addresses)


def _join_macft(rank: int, addresses: Sequence[str], settings: Mapping[str, object]) -> Collective:
    """macft's collective, joined as in macft.train; the rendezvous is at the first address."""
    from macft.collective.settings import CollectiveConfig
    from macft.rendezvous.connect import RankConfig, connect
    from macft.rendezvous.keystore import key_folder, load
    from macft.rendezvous.server import RendezvousServer

    config = CollectiveConfig()
    vars(config).update(settings)
    keyring = load(key_folder()) if config.encryption == "on" else None
    host, count, server = addresses[rank].rpartition(":")[0], len(addresses), None
    try:
        if rank == 0:
            server = RendezvousServer(
                addresses[0],
                world_size=count,
                run_id="bench",
                must_match={},
                timeout=JOIN_SECONDS,
                keyring=keyring,
            )
            server.start()
        rank_config = RankConfig(
            server=addresses[0],
            rank=rank,
            world_size=count,
            run_id="bench",
            must_match={},
            name=f"rank-{rank}",
            timeout=JOIN_SECONDS,
            keyring=keyring,
        )
        joined = connect(rank_config, config, bind=f"{host}:0")
        joined.barrier()  # all ranks have their answer from the server
    finally:
        if server is not None:
            server.close()
    return joined
