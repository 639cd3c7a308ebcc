"""``python -m macft.cluster``: sets up clusters, and lists and removes them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from macft.cli.parser import Parser, command_parser
from macft.cli.run_command import run_command
from macft.errors import LaunchError
from macft.pairing.discovery import announce, discover_offers
from macft.pairing.guest import join_pairing
from macft.pairing.host import PairingHost
from macft.pairing.pake import new_code
from macft.remote.access import closed_to_ssh
from macft.topology import topology_file
from macft.topology.settings import TopologyConfig, split_host

_SEARCH_SECONDS = 30.0


def main(argv: Sequence[str]) -> None:
    """Sets up, joins, lists or removes a cluster.

    Raises:
        MacftError: The arguments are wrong, pairing failed, or a topology can't be read or written.
    """
    arguments = _parser().parse_args(argv)
    {"init": _init, "join": _join, "list": _list, "remove": _remove}[arguments.command](arguments)


def _show(line: str) -> None:
    print(line, flush=True)


def _init(arguments: argparse.Namespace) -> None:
    topology_file.path_of(arguments.name)  # rejects an invalid name before waiting
    if arguments.hostfile is not None:
        topology = topology_file.from_hostfile(arguments.hostfile)
    else:
        code = new_code()
        host = PairingHost(code, arguments.nodes, _show)
        with announce(arguments.name, host.addresses, host.port):
            _show(f"on each of the other machines, run: python -m macft.cluster join {code} --name {arguments.name}")
            _show(f"(if it can't find this machine, add --at {host.addresses[0]}:{host.port})")
            topology = host.form(arguments.timeout)
    _finish(arguments.name, topology)


def _join(arguments: argparse.Namespace) -> None:
    name = arguments.name
    if arguments.at is not None:
        addresses = [_place(arguments.at)]
    else:
        _show("looking for the machine of `init` on the local network")
        discovered = discover_offers(_SEARCH_SECONDS, cluster=name)
        offers = [offer for offer in discovered if name in (None, offer.cluster)]
        if len(offers) != 1:
            clusters = ", ".join(offer.cluster for offer in offers)
            problem = (
                f"several clusters are being formed ({clusters}); give --name"
                if offers
                else "no cluster is being formed"
            )
            raise LaunchError(f"{problem}; is `macft.cluster init` running on the same network? Or give --at HOST:PORT")
        name = offers[0].cluster
        addresses = [(address, offers[0].port) for address in offers[0].addresses]
    name = name or "cluster"
    topology_file.path_of(name)
    _finish(name, join_pairing(addresses, arguments.code, _show))


def _place(at: str) -> tuple[str, int]:
    """The address and port of ``--at``."""
    try:
        host, port = split_host(at, 0)
    except ValueError as error:
        raise LaunchError(f"--at: {error}; write it as `init` printed it") from None
    if host.startswith("["):
        raise LaunchError(f"--at: '{at}' is an IPv6 address; `init` uses IPv4: write it as `init` printed it")
    return host, port


def _finish(name: str, topology: TopologyConfig) -> None:
    """Writes the cluster's file and shows the commands that come next, as far as they will work."""
    _show(f"the cluster is in {topology_file.save_topology(name, topology)}")
    _show("trying to log in to each machine over SSH")
    problems = closed_to_ssh([topology.ssh_of(rank) for rank in range(len(topology.hosts))])
    train = f"python -m macft.train +recipe=llama-lora topology={name}"
    if problems:
        _show(f"`topology={name}` starts all nodes over SSH; from this machine that still needs:")
        for problem in problems:
            _show(f"  {problem}")
        _show(f"then check it: python -m macft.doctor --topology {name}")
        _show(f"and train on it: {train}")
        _show(f"or train without SSH, by the same command on each machine: {train} topology.kind=hosts")
    else:
        _show(f"check it: python -m macft.doctor --topology {name}")
        _show(f"train on it: {train}")


def _list(arguments: argparse.Namespace) -> None:
    if arguments.name is not None:
        topology = topology_file.load_topology(arguments.name)
        if arguments.hostfile:
            sys.stdout.write(topology_file.to_hostfile(topology))
            return
        for rank, host in enumerate(topology.hosts):
            print(f"{rank}  {host}  ssh {topology.ssh_of(rank)}  {topology.python_of(rank)}")
        return
    for name in topology_file.names():
        topology = topology_file.load_topology(name)
        print(f"{name}: {len(topology.hosts)} nodes, {', '.join(topology.hosts)}")
    if not topology_file.names():
        print("no cluster yet; make one: python -m macft.cluster init NAME")


def _remove(arguments: argparse.Namespace) -> None:
    if arguments.host is None:
        topology_file.remove_topology(arguments.name)
        print(f"removed {arguments.name}; `python -m macft.keys forget` stops trusting its machines")
        return
    topology = topology_file.load_topology(arguments.name)
    rank = next((rank for rank, host in enumerate(topology.hosts) if arguments.host in (host, *host.split("+"))), None)
    if rank is None:
        raise LaunchError(f"'{arguments.host}' is not in {arguments.name}: {', '.join(topology.hosts)}")
    if len(topology.hosts) <= 2:
        raise LaunchError(f"{arguments.name} would have one machine left; leave the host out to remove the cluster")
    for values in (topology.hosts, topology.ssh, topology.python if len(topology.python) > 1 else []):
        if values:
            del values[rank]
    path = topology_file.save_topology(arguments.name, topology)
    print(f"removed {arguments.host} from {path}")


def _parser() -> Parser:
    parser = command_parser("cluster")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    init = commands.add_parser("init", help="set up a cluster with this machine as the first")
    init.add_argument("name", metavar="NAME", help="of the cluster; a run uses it with topology=NAME")
    init.add_argument("--nodes", type=int, default=2, help="number of machines, this one included (default 2)")
    init.add_argument("--timeout", type=float, default=600.0, help="seconds to wait for each machine (default 600)")
    init.add_argument("--hostfile", type=Path, help="take the machines from a hostfile of mlx.launch instead")
    joining = commands.add_parser("join", help="add this machine to a cluster that is being set up")
    joining.add_argument("code", metavar="CODE", help="as `init` shows it")
    joining.add_argument("--name", help="of the cluster, where several are being set up")
    joining.add_argument("--at", metavar="HOST:PORT", help="where `init` runs, if it is not found automatically")
    listing = commands.add_parser("list", help="show the clusters, or the machines of one")
    listing.add_argument("name", metavar="NAME", nargs="?")
    listing.add_argument("--hostfile", action="store_true", help="as a hostfile for mlx.launch")
    remove = commands.add_parser("remove", help="remove a cluster, or one machine from it")
    remove.add_argument("name", metavar="NAME")
    remove.add_argument("host", metavar="HOST", nargs="?")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
