"""A small cluster on one Linux machine: each rank in a network namespace, behind a network card of limited speed."""

from __future__ import annotations

import itertools
import os
import subprocess
from types import TracebackType
from typing import Self

from macft.collective_bench.sizes import read_speed

_numbers = itertools.count()
_SUBNET = "10.77.77"


class ShapedLinks:
    """``ranks`` namespaces on one bridge, each sending and receiving at ``link`` at most. Needs root.

    A token bucket (`tc tbf`) on both ends of each card's pair shapes what leaves the rank and what comes to it.
    """

    interface = "macft0"

    def __init__(self, ranks: int, link: str):
        # The kernel may take back names after they have been given up; so each set has its own.
        number = f"{os.getpid()}x{next(_numbers)}"
        self._names = [f"macft{number}r{rank}" for rank in range(ranks)]
        self._bridge = f"mb{number}"
        self._pmix = {"if_include": self._bridge, "remote_connections": "1"}
        self._link, self._ports = link, dict[str, int]()

    @property
    def prefixes(self) -> list[list[str]]:
        """Words before each rank's command."""
        return [["ip", "netns", "exec", name] for name in self._names]

    @property
    def environment(self) -> dict[str, str]:
        """For MPI: its ranks in the namespaces talk to mpirun, outside, over the bridge."""
        parts = ("PMIX_MCA_ptl_base", "PMIX_MCA_ptl_tcp")  # of older and of newer PMIx
        return {f"{part}_{key}": value for part in parts for key, value in self._pmix.items()}

    def addresses(self, lane: str) -> list[str]:
        """``host:port`` by rank; each lane has ports of its own."""
        port = self._ports.setdefault(lane, 20_000 + len(self._ports))
        return [f"{_SUBNET}.{rank + 1}:{port}" for rank in range(len(self._names))]

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self._tear_down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tear_down()

    def _build(self) -> None:
        _run(f"ip link add {self._bridge} type bridge")
        _run(f"ip addr add {_SUBNET}.254/24 dev {self._bridge}")
        _run(f"ip link set {self._bridge} up")
        for rank, name in enumerate(self._names):
            outer = f"{self._bridge}p{rank}"
            _run(f"ip netns add {name}")
            _run(f"ip link add {outer} type veth peer name {self.interface} netns {name}")
            _run(f"ip link set {outer} master {self._bridge} up")
            _run(f"ip -n {name} addr add {_SUBNET}.{rank + 1}/24 dev {self.interface}")
            _run(f"ip -n {name} link set {self.interface} up")
            _run(f"ip -n {name} link set lo up")
            # A burst of 256 KB is 2 ms at 1 Gbit; 10 Gbit needs more than its timer's tick.
            burst = max(256_000, int(read_speed(self._link) / 1000))
            shape = f"root tbf rate {self._link} burst {burst} latency 100ms"
            _run(f"tc -n {name} qdisc add dev {self.interface} {shape}")
            _run(f"tc qdisc add dev {outer} {shape}")

    def _tear_down(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", self._bridge], check=False, capture_output=True)


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr.strip()} (--links needs Linux and root)")
