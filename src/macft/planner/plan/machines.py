"""The machines of a planned run: Macs by name, or as many nodes like this machine as its topology has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from macft.config.schema import TrainConfig
from macft.config.validate import world_size
from macft.device.chips import Mac, find_macs
from macft.device.disk_speed import disk_speed
from macft.device.kind import METAL, Device
from macft.device.memory import usable_bytes
from macft.model.execution import Execution
from macft.network.link_kinds import find_links
from macft.planner.placement.cluster_model import NodeLink, RingLinks
from macft.planner.speed import chip_speed, own_speed
from macft.topology.settings import parse_budget


@dataclass(frozen=True)
class Machines:
    """``macs`` are those of ``plan.chips``, one for each node; none where all ``count`` nodes are like this machine."""

    config: TrainConfig
    macs: Sequence[Mac]
    count: int

    @classmethod
    def from_config(cls, config: TrainConfig) -> Machines:
        """Those of ``config``; raises ConfigError where a chip isn't known."""
        macs = find_macs(config.plan.chips)
        return cls(config, macs, len(macs) or world_size(config))

    @property
    def nodes_here(self) -> int:
        """Nodes that share a machine."""
        return 1 if self.macs else self.config.topology.nodes_here

    @property
    def device(self) -> Device:
        """What each node computes on."""
        return METAL if self.macs else Device.default().shared_by(self.nodes_here)

    def name(self, rank: int) -> str:
        """The node's name, with a number where several have the same."""
        macs = self.macs
        if not macs:
            return "this machine" if self.count == 1 else f"this machine, rank {rank}"
        same = [number for number, mac in enumerate(macs) if mac.name == macs[rank].name]
        return macs[rank].name if len(same) == 1 else f"{macs[rank].name} #{same.index(rank) + 1}"

    def budget(self, rank: int) -> float:
        """Bytes that the node may take."""
        usable = self.macs[rank].usable_bytes if self.macs else usable_bytes(1 / self.nodes_here)
        return parse_budget(self.config.topology.memory_budget, usable)

    def watts(self, rank: int) -> float | None:
        """Power of the node's chip; None where it isn't known."""
        return self.macs[rank].chip.watts if self.macs else None

    def speeds(self, work: float, execution: Execution, notes: list[str]) -> list[float]:
        """Operations a second that training reaches, by rank.

        ``work``: parameters times tokens of a step of all nodes. ``notes`` gets lines on where the figures are from.
        """
        if self.macs:
            return [chip_speed(mac.chip, execution.dtype) for mac in self.macs]
        if self.config.topology.kind in ("hosts", "ssh"):
            notes.append("every host is taken to be a machine like this one; --chips names other Macs")
        speed = own_speed(work / self.count, execution)
        notes.append(f"this machine trains with {speed.operations_per_second / 1e12:.2g} TFLOPS, {speed.origin}")
        return [speed.operations_per_second / self.nodes_here] * self.count

    def disks(self, notes: list[str]) -> list[float]:
        """Bytes a second that the disks read, by rank; ``notes`` gets a line on where the figure is from."""
        if self.macs:
            return [mac.chip.disk * 1e9 for mac in self.macs]
        disk = disk_speed()
        origin = {
            "measured": "measured by macft doctor",
            "table": "as reported for its chip; macft doctor measures it",
            "assumed": "assumed; macft doctor measures it",
        }
        notes.append(f"the disk reads {disk.bytes_per_second / 1e9:.1f} GB/s, {origin[disk.source]}")
        return [disk.bytes_per_second] * self.count

    def ring(self) -> RingLinks:
        """The links of the nodes in ring order; the last one is between the last node and the first."""
        links = [NodeLink(link.bandwidth, link.latency) for link in find_links(self.config.plan.link)]
        return RingLinks(tuple(links if len(links) == self.count else links[:1] * self.count))

    def link_notes(self, speeds: Sequence[float]) -> list[str]:
        """A line on the links, and on how rows are divided over nodes of these ``speeds``; none for a single node."""
        shares = self.config.topology.shares
        if self.count < 2:
            return []
        links = find_links(self.config.plan.link)
        names = ", ".join(link.name for link in (links if len(links) == self.count else links[:1]))
        how = f"as topology.shares={shares} says" if isinstance(shares, list) else "by speed"
        if shares == "equal" and len(set(speeds)) > 1:
            how += ", as topology.shares=auto does"
        return [f"nodes are connected by {names} (plan.link); rows are divided {how}"]
