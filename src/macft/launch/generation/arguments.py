"""The arguments by which a command that answers is told to use a cluster, and that cluster."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from macft.collective.settings import CollectiveConfig
from macft.errors import ConfigError
from macft.run.tuned_model import TunedModel
from macft.topology.hosts import own_rank
from macft.topology.settings import TopologyConfig
from macft.topology.topology_file import load_topology

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from macft.run.generation.rank import DistributedModel, GenerationRank

_LOCAL = "local"


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """``--topology``, ``--nodes`` and ``--by-hand``."""
    parser.add_argument(
        "--topology",
        metavar="NAME",
        help="spread the model's blocks over the machines of this cluster, or over processes here (local)",
    )
    parser.add_argument("--nodes", type=int, help="number of processes of --topology local (default 2)")
    parser.add_argument(
        "--by-hand",
        action="store_true",
        help="start nothing over SSH: this command is given on each machine of --topology, and the first one leads",
    )


def topology_of(arguments: argparse.Namespace) -> TopologyConfig | None:
    """The cluster that ``arguments`` name; None for this process alone.

    Raises:
        ConfigError: there is no such cluster, or the arguments contradict each other.
    """
    name, nodes = arguments.topology, arguments.nodes
    if arguments.by_hand and name in (None, _LOCAL):
        raise ConfigError("--by-hand: is for the machines of a cluster; name it by --topology")
    if nodes is not None and name != _LOCAL:
        raise ConfigError("--nodes: is for --topology local; a cluster has the machines that its file lists")
    if name is None:
        return None
    if arguments.placement in ("replicate", "stream"):
        raise ConfigError(
            f"--placement: {arguments.placement} is for one machine; with --topology each machine has a part of the "
            "blocks, and reads those from disk that don't fit its memory"
        )
    if name == _LOCAL:
        count = 2 if nodes is None else nodes
        if count < 2:
            raise ConfigError(f"--nodes: {count} must be 2 or more; leave --topology out for one process")
        return TopologyConfig(kind="local", nodes=count)
    topology = load_topology(name)
    return replace(topology, kind="hosts") if arguments.by_hand else topology


def distributed_model(tuned: TunedModel, *, is_tuned: bool) -> DistributedModel:
    """What the ranks load of ``tuned``; without its tuning if not ``is_tuned``."""
    from macft.run.generation.rank import DistributedModel

    topology = tuned.run.topology if tuned.run else TopologyConfig()
    if is_tuned and tuned.whole is not None:
        return DistributedModel.of(replace(tuned.model, path=str(tuned.whole)), None, topology.memory_budget)
    return DistributedModel.of(
        tuned.model,
        tuned.adapter if is_tuned else None,
        topology.memory_budget,
        path_on_hosts=topology.paths.get(tuned.model.path, ""),
    )


@contextmanager
def leading_rank(
    topology: TopologyConfig, tuned: TunedModel, tokenizer: TokenizerWrapper | None = None
) -> Iterator[GenerationRank]:
    """The rank of this process, which leads, of the cluster ``topology``; the others end with it.

    They are started, but for ``kind: hosts``; see :func:`follow_first_host`. ``tokenizer`` is that of ``tuned``, if it
    was loaded before.

    Raises:
        ConfigError: processes here would be more than the model has blocks.
        MacftError: the model can't be found, or the ranks do not come together.
    """
    if topology.kind == "local":
        _check_processes(topology.nodes, tuned)
    from macft.launch.generation.cluster import generation_cluster
    from macft.run.generation.leader import dismiss
    from macft.run.generation.rank import GenerationRank

    share = 1 / topology.nodes_here
    with generation_cluster(topology, CollectiveConfig()) as collective:
        rank = GenerationRank(collective, name="this machine", machine_share=share, tokenizer=tokenizer)
        yield rank
        dismiss(rank)


def _check_processes(count: int, tuned: TunedModel) -> None:
    """Each process needs a block; found before they are started."""
    from macft.model.fetch.resolve import resolve
    from macft.model.shape import read_shape

    blocks = read_shape(tuned.whole or resolve(tuned.model)).blocks
    if count > blocks:
        raise ConfigError(
            f"--nodes: {count} nodes are more than the {blocks} blocks of the model; use {blocks} or fewer"
        )


def follow_first_host(topology: TopologyConfig | None) -> bool:
    """Whether this is a host whose user gave the command as those of the others did: then it computes until the end.

    With ``kind: hosts`` the first host leads. The others need neither the run nor the adapter.

    Raises:
        MacftError: the ranks do not come together, or the first host is gone.
    """
    if topology is None or topology.kind != "hosts" or (rank := own_rank(topology)) == 0:
        return False
    from macft.device.mlx_device import prepare_device
    from macft.launch.generation.cluster import generation_cluster
    from macft.run.generation.rank import GenerationRank, follow_leader

    print(f"rank {rank}: the answers are on {topology.hosts[0]}, which leads", file=sys.stderr, flush=True)
    prepare_device()
    with generation_cluster(topology, CollectiveConfig()) as collective:
        follow_leader(GenerationRank(collective, name=topology.hosts[rank]))
    return True
