"""Which machines or processes form a run: the Hydra group ``topology``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

MAX_PATHS = 8
MAX_PORT = 65533
KINDS = ("single", "local", "hosts", "ssh")
SHARES = ("auto", "equal")
BATCHES = ("fixed", "auto")
PLACEMENTS = ("auto", "replicate", "stream", "pipeline")
SHIPMENTS = ("code", "data", "model")
_HOST = re.compile(r"(?P<name>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>\d{1,5}))?")
_LINK_LOCAL = re.compile(r"\[?fe[89ab][0-9a-f]:[^+]*:", re.IGNORECASE)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(gb|gib|mb|mib)", re.IGNORECASE)
_UNITS = {"gb": 1e9, "gib": 2.0**30, "mb": 1e6, "mib": 2.0**20}
_DESTINATION = re.compile(
    r"(?:(?P<user>[A-Za-z0-9._-]+)@)?(?P<name>[A-Za-z0-9_][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])(?::(?P<port>\d{1,5}))?"
)


@dataclass
class TopologyConfig:
    """The Hydra group ``topology``."""

    # single: this process alone. local: `nodes` processes on this machine. hosts: one process on each of `hosts`,
    # started there by hand. ssh: the same, started on all hosts by one command.
    kind: str = "single"
    # Number of nodes. With `hosts` it is the length of the list.
    nodes: int = 1
    # Addresses of all nodes in ring order, the same list on every node: [192.168.0.1, 192.168.0.2:7070]. The others
    # connect to the first one at the start. A node with several cables has an address for each:
    # 192.168.0.1+192.168.1.1. The cables share the traffic by their speed; if one fails, the others are used.
    hosts: list[str] = field(default_factory=list)
    # This machine's index in `hosts`, from 0. Null: found by comparing `hosts` with this machine's own addresses.
    rank: int | None = None
    # Default port in `hosts`. Each node also uses the next two ports, for the ring and for the membership service.
    port: int = 7070
    # How the rows of a batch are divided. auto: by measured speed. equal: evenly. Or one number for each node: [2, 1].
    # A node that is throttled, to limit heat or power, gets fewer rows in all cases.
    shares: Any = "equal"
    # Steps between two updates of the shares. Stages of a pipeline are looked at as often, and hand over blocks if one
    # has been too slow for two times as many steps; then not again for eight times as many.
    rebalance_every: int = 4
    # Whether the run continues without a node that is lost, and lets nodes join. Not supported with collective=mlx,
    # with training.sync=diloco and on a single node.
    elastic: bool = True
    # Joins a running run: one of its hosts (192.168.0.1 or 192.168.0.1:7070, as in `hosts`), or the folder of a local
    # run. `hosts` and the other keys of the topology are then not needed.
    join: str | None = None
    # With topology=local, starts a node again if its process is killed.
    restart: bool = False
    # Seconds to wait for all nodes to report at the start.
    start_timeout: float = 120.0
    # fixed: micro-batch and checkpointing as set in `training`. auto: each node chooses them to use its memory up to
    # `memory_budget`; the loss curve stays the same.
    batch: str = "fixed"
    # Memory that a run may use on each node: a fraction of the memory available to its GPU (0.9) or a size (12GB). A
    # run that is predicted to need more is refused before its model loads.
    memory_budget: str = "0.95"
    # Where the weights are. replicate: all in memory. stream: a block is read from disk when it is needed, twice in a
    # step, so that models larger than the memory can be trained. pipeline: each node holds and computes some of the
    # blocks, for all rows. auto: replicate where the run fits every node, otherwise what makes a step fastest.
    placement: str = "auto"
    # With placement=pipeline, how many blocks each node has: a number for each, in ring order: [8, 16]. auto: by the
    # speed and the memory of each node, so that a step is fastest; the order may change, and a slow node have no stage.
    stages: Any = "auto"
    # With placement=pipeline, the number of pipelines. Nodes that follow each other in the ring form one; the rows of a
    # batch are divided among pipelines.
    pipelines: int = 1
    # With placement=stream, the blocks that stay in memory: as many as fit (auto), or a number.
    resident_blocks: Any = "auto"
    # With topology=ssh, the SSH destination of each of `hosts`, in the same order: [studio, me@192.168.0.2:22]. Names
    # of ~/.ssh/config work. Empty: as in `hosts`.
    ssh: list[str] = field(default_factory=list)
    # With topology=ssh, the Python that has macft: one for all hosts, or one for each.
    python: list[str] = field(default_factory=lambda: ["python3"])
    # With topology=ssh, the folder on the hosts for runs and relative paths, below the home folder.
    folder: str = "macft"
    # With topology=ssh, what is sent to the hosts first, if it has changed: code (this macft), data (a local dataset),
    # model (its files on this machine).
    ship: list[str] = field(default_factory=list)
    # With topology=ssh, what is elsewhere on the hosts: {path on this machine: path there}. A run keeps here the paths
    # that were typed relative, so that it can be resumed from any folder.
    paths: dict[str, str] = field(default_factory=dict)

    @property
    def nodes_here(self) -> int:
        """Nodes of the run that share a machine."""
        return self.nodes if self.kind == "local" else 1

    def ssh_of(self, rank: int) -> str:
        """The SSH destination of the host of ``rank``."""
        return self.ssh[rank] if self.ssh else split_host(self.hosts[rank], self.port)[0].strip("[]")

    def python_of(self, rank: int) -> str:
        """The Python on the host of ``rank``."""
        return self.python[rank if len(self.python) > 1 else 0]


def split_host(host: str, default_port: int) -> tuple[str, int]:
    """The first of :func:`host_paths`."""
    return host_paths(host, default_port)[0]


def host_paths(host: str, default_port: int) -> list[tuple[str, int]]:
    """Splits a host into (name, port) pairs, one for each cable: ``"name:port"``, ``"name"``, or ``"name+name"``.

    Raises:
        ValueError: it is none of these.
    """
    paths: list[tuple[str, int]] = []
    for path in host.split("+"):
        match = _HOST.fullmatch(path)
        if match is None or _LINK_LOCAL.match(path):
            raise ValueError(_objection(host, path))
        port = int(match["port"]) if match["port"] else (paths[0][1] if paths else default_port)
        if not 1 <= port <= MAX_PORT:
            raise ValueError(f"'{host}': port {port} is not from 1 to {MAX_PORT}")
        paths.append((match["name"], port))
    if len(paths) > MAX_PATHS:
        raise ValueError(f"'{host}' has {len(paths)} addresses; {MAX_PATHS} are the most")
    return paths


def _objection(host: str, path: str) -> str:
    """Why ``path`` of ``host`` can't be used."""
    if _LINK_LOCAL.match(path):
        return (
            f"'{host}' is a link-local IPv6 address, which needs the name of an interface that differs from machine to "
            "machine; use an IPv4 address or another IPv6 address"
        )
    if path.count(":") > 1 and "[" not in path:
        return f"'{host}': write an IPv6 address in brackets and quotes: \"[{path}]\""
    return f"'{host}' is not a host name or address with an optional :port"


def problems(config: TopologyConfig) -> list[str]:
    """One line for each invalid value; no I/O."""
    lines = []
    if config.kind not in KINDS:
        lines.append(f"topology.kind: '{config.kind}' is not one of {', '.join(KINDS)}")
    if config.nodes < 1:
        lines.append(f"topology.nodes: {config.nodes} must be 1 or more")
    if config.kind == "single" and config.nodes != 1:
        lines.append(f"topology.nodes: topology=single has 1 node, not {config.nodes}; did you mean topology=local?")
    if config.kind in ("hosts", "ssh"):
        if len(config.hosts) < 2 and config.join is None:
            lines.append("topology.hosts: list two or more addresses, for instance [192.168.0.1,192.168.0.2]")
        if config.rank is not None and not 0 <= config.rank < len(config.hosts):
            lines.append(
                f"topology.rank: {config.rank} is not an index of topology.hosts (0 to {len(config.hosts) - 1})"
            )
        if len(set(config.hosts)) != len(config.hosts):
            lines.append("topology.hosts: an address is listed twice")
    elif config.hosts:
        lines.append(f"topology.hosts: only topology=hosts and topology=ssh use them, this is topology={config.kind}")
    lines += _share_problems(config)
    for host in config.hosts:
        try:
            split_host(host, config.port)
        except ValueError as error:
            lines.append(f"topology.hosts: {error}")
    if not 1 <= config.port <= MAX_PORT:
        lines.append(f"topology.port: {config.port} is not from 1 to {MAX_PORT}")
    if config.restart and config.kind != "local":
        lines.append(f"topology.restart: only topology=local starts nodes again, this is topology={config.kind}")
    if not config.start_timeout > 0:
        lines.append(f"topology.start_timeout: {config.start_timeout} must be greater than 0")
    if config.batch not in BATCHES:
        lines.append(f"topology.batch: '{config.batch}' is not one of {', '.join(BATCHES)}")
    lines += _placement_problems(config)
    if not _is_budget(config.memory_budget):
        lines.append(
            f"topology.memory_budget: '{config.memory_budget}' is neither a fraction above 0 and up to 1 (0.9) "
            "nor a size (12GB, 800MB)"
        )
    return lines + _ssh_problems(config)


def _placement_problems(config: TopologyConfig) -> list[str]:
    lines, resident = [], config.resident_blocks
    if config.placement not in PLACEMENTS:
        lines.append(f"topology.placement: '{config.placement}' is not one of {', '.join(PLACEMENTS)}")
    is_count = isinstance(resident, int) and not isinstance(resident, bool) and resident >= 0
    if resident != "auto" and not is_count:
        lines.append(f"topology.resident_blocks: '{resident}' is neither auto nor a number of blocks, 0 or more")
    return lines + _stage_problems(config)


def _stage_problems(config: TopologyConfig) -> list[str]:
    stages, pipelines = config.stages, config.pipelines
    if config.placement != "pipeline":
        named = [("stages", stages != "auto"), ("pipelines", pipelines != 1)]
        return [f"topology.{key}: only topology.placement=pipeline has them" for key, is_set in named if is_set]
    lines = []
    if pipelines < 1:
        lines.append(f"topology.pipelines: {pipelines} must be 1 or more")
    is_list = isinstance(stages, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in stages)
    if stages != "auto" and (not is_list or any(n < 1 for n in stages)):
        lines.append(f"topology.stages: {stages} is neither auto nor a list of numbers of blocks, such as [8,16]")
    return lines


def pipeline_problems(config: TopologyConfig, nodes: int) -> list[str]:
    """One line for what the number of nodes doesn't allow, where they are to form pipelines."""
    stages = config.stages
    if config.placement != "pipeline" or config.join is not None:
        return []
    lines = []
    if nodes < 2:
        lines.append(
            "topology.placement: pipeline needs two or more nodes, and there is one; use topology.placement=stream, "
            "which reads blocks from disk when they are needed"
        )
    elif 2 * config.pipelines > nodes:
        lines.append(
            f"topology.pipelines: {config.pipelines} pipelines of {nodes} nodes; each needs two or more, so use 1"
            + (f" to {nodes // 2}" if nodes > 3 else "")
        )
    if isinstance(stages, list) and len(stages) != nodes:
        lines.append(f"topology.stages: {stages} has {len(stages)} numbers, and there are {nodes} nodes")
    elif isinstance(stages, list) and not lines and nodes % config.pipelines:
        lines.append(f"topology.stages: {nodes} nodes can't form {config.pipelines} equal pipelines; use auto")
    return lines


def _nodes(config: TopologyConfig) -> int:
    return len(config.hosts) if config.kind in ("hosts", "ssh") else config.nodes


def _share_problems(config: TopologyConfig) -> list[str]:
    lines, shares = [], config.shares
    if config.rebalance_every < 1:
        lines.append(f"topology.rebalance_every: {config.rebalance_every} must be 1 or more")
    if isinstance(shares, str):
        if shares not in SHARES:
            lines.append(f"topology.shares: '{shares}' is not auto, equal or a list of numbers such as [2,1]")
        return lines
    nodes = _nodes(config)
    if not isinstance(shares, list) or any(isinstance(n, bool) or not isinstance(n, int | float) for n in shares):
        lines.append(f"topology.shares: {shares} is not auto, equal or a list of numbers such as [2,1]")
    elif len(shares) != nodes:
        lines.append(f"topology.shares: {shares} has {len(shares)} numbers, and there are {nodes} nodes")
    elif not all(math.isfinite(n) and n >= 0 for n in shares) or not any(shares):
        lines.append(f"topology.shares: {shares} must be numbers of 0 or more, and one of them above 0")
    return lines


def _is_budget(text: str) -> bool:
    try:
        return parse_budget(text, 1.0) > 0
    except ValueError:
        return False


def parse_budget(text: str, usable: float) -> float:
    """Parses a memory budget: a fraction of ``usable`` bytes (``"0.9"``) or a size (``"12GB"``, ``"800 MiB"``).

    Returns:
        Bytes.

    Raises:
        ValueError: it is neither.
    """
    if match := _SIZE.fullmatch(text.strip()):
        return float(match[1]) * _UNITS[match[2].lower()]
    fraction = float(text)
    if 0 < fraction <= 1:
        return fraction * usable
    raise ValueError(f"'{text}' is neither a fraction nor a size")


def _ssh_problems(config: TopologyConfig) -> list[str]:
    lines = []
    if config.kind != "ssh":
        return ["topology.ship: only topology=ssh sends anything"] if config.ship else []
    if config.ssh and len(config.ssh) != len(config.hosts):
        lines.append(
            f"topology.ssh: {len(config.ssh)} destinations for {len(config.hosts)} hosts; list one for each, or none"
        )
    if len(config.python) not in (1, len(config.hosts)):
        lines.append(f"topology.python: {len(config.python)} of them; list one for all hosts, or one for each")
    for item in config.ssh:
        if _DESTINATION.fullmatch(item) is None:
            lines.append(f"topology.ssh: '{item}' is not [user@]name[:port]")
    for item in config.ship:
        if item not in SHIPMENTS:
            lines.append(f"topology.ship: '{item}' is not one of {', '.join(SHIPMENTS)}")
    if not config.folder or config.folder.startswith(("/", "~")) or ".." in config.folder.split("/"):
        lines.append(f"topology.folder: '{config.folder}' must be a path below the home folder, such as macft")
    return lines


def split_destination(text: str) -> tuple[str | None, str, int | None]:
    """Splits ``"[user@]name[:port]"`` into (user, name, port). Raises ValueError if it is not of that form."""
    match = _DESTINATION.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is not [user@]name[:port]")
    return match["user"], match["name"].strip("[]"), int(match["port"]) if match["port"] else None
