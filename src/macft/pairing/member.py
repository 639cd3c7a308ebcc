"""How a machine describes itself when a cluster is formed, and the topology that results from all of them."""

from __future__ import annotations

import getpass
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypedDict, cast

from macft.diagnostics import software
from macft.errors import LaunchError
from macft.network import links
from macft.rendezvous import keystore
from macft.topology.settings import TopologyConfig

_MAX_LINKS = 64
_MAX_COMBINATIONS = 8
"""Combinations that are tried of one link with those of the others: more than one only where addresses overlap."""
_MAX_CANDIDATES = 16


class _PlainLink(TypedDict):
    name: str
    kind: str
    address: str
    speed_mbit: int | None


class _PlainMember(TypedDict):
    name: str
    user: str
    python: str
    key: str
    versions: dict[str, str]
    links: list[_PlainLink]
    probe_port: int


@dataclass(frozen=True)
class Member:
    """A machine of the cluster that is being formed.

    Attributes:
        name: As :func:`macft.rendezvous.keystore.own_name`.
        user: Its user, for SSH.
        python: The path of its Python.
        key: Its public key (:mod:`macft.rendezvous.keystore`), hexadecimal.
        versions: {package: version}.
        links: Its network links.
        probe_port: Where its :class:`~macft.network.link_probe.ProbeServer` listens.
    """

    name: str
    user: str
    python: str
    key: str
    versions: Mapping[str, str]
    links: tuple[links.Link, ...]
    probe_port: int

    def to_message(self) -> dict[str, object]:
        """The message that describes it."""
        return asdict(self)

    @staticmethod
    def from_message(message: Mapping[str, object]) -> Member:
        """The inverse of :meth:`to_message`, for an untrusted sender. Raises LaunchError if it is not valid."""
        try:
            if message.keys() != _PlainMember.__annotations__.keys():
                raise KeyError("not the keys of a member")
            plain = cast(_PlainMember, message)  # its values are checked below
            own_links = tuple(links.Link(**link) for link in plain["links"])
            member = Member(
                name=plain["name"],
                user=plain["user"],
                python=plain["python"],
                key=plain["key"],
                versions=plain["versions"],
                links=own_links,
                probe_port=plain["probe_port"],
            )
            texts = [member.name, member.user, member.python, member.key, *member.versions.values()]
            texts += [text for link in own_links for text in (link.name, link.kind, link.address)]
            is_valid = all(isinstance(text, str) and 0 < len(text) < 1024 and text.isprintable() for text in texts)
            is_valid = is_valid and len(own_links) <= _MAX_LINKS
            is_valid = is_valid and all(link.kind in links.KINDS for link in own_links)
            is_valid = is_valid and type(member.probe_port) is int and 0 < member.probe_port < 65536
            for link in own_links:
                link.reaches(link)  # raises for an invalid address
        except (KeyError, TypeError, ValueError, AttributeError):
            is_valid = False
        if not is_valid:
            raise LaunchError("pairing: the other side does not describe itself correctly")
        return member


def this_machine(probe_port: int) -> Member:
    """This machine. It gets a key if it has none.

    Raises:
        ConfigError: its keys cannot be used.
        LaunchError: it has no network.
    """
    own_links = links.physical(links.discover())
    if not own_links:
        raise LaunchError(
            "this machine has no network with an IPv4 address, apart from VPNs and virtual ones; plug in a cable, then "
            "run `python -m macft.doctor`"
        )
    keyring, _ = keystore.make(keystore.key_folder())
    return Member(
        keystore.own_name(),
        getpass.getuser(),
        sys.executable,
        keyring.own.public.hex(),
        software.versions(),
        own_links[:_MAX_LINKS],
        probe_port,
    )


def version_objection(member: Member) -> str:
    """How a machine's packages differ from this one's, with the command that fixes it; empty if they do not."""
    for package, ours in software.versions().items():
        theirs = member.versions.get(package)
        if package != "python" and theirs != ours:
            fix = f"python3 -m pip install {package}=={ours}"
            return f"{member.name} has {package} {theirs}, the others have {ours}; run on {member.name}: {fix}"
    return ""


def common_networks(members: Sequence[Member]) -> list[list[links.Link]]:
    """The networks that might connect all members, as one link of each member, the one to try first at the beginning.

    Thunderbolt comes before Ethernet before Wi-Fi, and self-assigned addresses behind others of their kind: an
    interface has one when nothing that assigns addresses is connected, perhaps nothing at all. So whether the members
    reach each other has to be tried.

    Raises:
        LaunchError: no network connects all members.
    """
    candidates = []
    for first in links.physical(members[0].links):
        same = [
            sorted((link for link in links.physical(member.links) if first.reaches(link)), key=links.order)
            for member in members[1:]
        ]
        for rest in itertools.islice(itertools.product(*same), _MAX_COMBINATIONS):
            chosen = [first, *rest]
            if len({link.host for link in chosen}) == len(chosen):  # local bridges have the same address everywhere
                candidates.append((max(links.order(link) for link in chosen), chosen))
    if not candidates:
        names = ", ".join(member.name for member in members)
        raise LaunchError(
            f"{names} have no common network; connect them to one switch or Wi-Fi, or, with cables from Mac to Mac, "
            "turn on Thunderbolt Bridge (System Settings > Network) on all of them; addresses of a VPN and IPv6 can be "
            "listed in topology.hosts by hand"
        )
    candidates.sort(key=lambda candidate: candidate[0])
    return [chosen for _, chosen in candidates[:_MAX_CANDIDATES]]


def is_further_cable(network: Sequence[links.Link], chosen: Sequence[Sequence[links.Link]]) -> bool:
    """Whether a network is a cable beside the ``chosen`` networks; Wi-Fi would add little and slow a cable down."""
    is_cable = all(link.kind in ("thunderbolt", "ethernet") for link in network)
    return is_cable and not any(network[0].overlaps(other[0]) for other in chosen)


def topology_from(
    members: Sequence[Member], chosen: Sequence[Sequence[links.Link]], order: Sequence[int]
) -> TopologyConfig:
    """The cluster as a topology of kind ``ssh``.

    Args:
        members: All machines.
        chosen: The networks to use, of those that :func:`common_networks` returns.
        order: Indices of ``members`` in ring order.
    """
    pythons = [members[index].python for index in order]
    return TopologyConfig(
        kind="ssh",
        hosts=["+".join(network[index].host for network in chosen) for index in order],
        ssh=[f"{members[index].user}@{chosen[0][index].host}" for index in order],
        python=pythons[:1] if len(set(pythons)) == 1 else pythons,
    )
