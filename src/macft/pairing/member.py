"""What a machine tells of itself when a cluster is formed, and what is made of it."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from macft.diagnostics import software
from macft.errors import LaunchError
from macft.network import links
from macft.rendezvous import keystore
from macft.topology.settings import MAX_PATHS, TopologyConfig

_MAX_LINKS = 64


@dataclass(frozen=True)
class Member:
    """A machine of the cluster to be.

    Attributes:
        key: Public key of :mod:`macft.rendezvous.keystore`, hexadecimal.
        probe_port: Where its :class:`~macft.network.link_probe.ProbeServer` listens.
    """

    name: str
    user: str
    python: str
    key: str
    versions: Mapping[str, str]
    links: tuple[links.Link, ...]
    probe_port: int

    def to_message(self) -> dict[str, Any]:
        """As it is sent."""
        return asdict(self)

    @staticmethod
    def of_message(message: Mapping[str, Any]) -> Member:
        """The reverse of :meth:`to_message`, for what a stranger sent. Raises LaunchError if it is not one."""
        try:
            found = tuple(links.Link(**link) for link in message["links"])
            member = Member(**{**message, "links": found})
            texts = [member.name, member.user, member.python, member.key, *member.versions.values()]
            texts += [text for link in found for text in (link.name, link.kind, link.address)]
            proper = all(isinstance(text, str) and 0 < len(text) < 1024 and text.isprintable() for text in texts)
            proper = proper and len(found) <= _MAX_LINKS and all(link.kind in links.KINDS for link in found)
            proper = proper and type(member.probe_port) is int and 0 < member.probe_port < 65536
            for link in found:
                link.reaches(link)
        except (KeyError, TypeError, ValueError, AttributeError):
            proper = False
        if not proper:
            raise LaunchError("pairing: the other side does not describe itself properly")
        return member


def this_machine(probe_port: int) -> Member:
    """This machine, which gets a key if it has none.

    Raises:
        ConfigError: its keys can't be used.
        LaunchError: it has no network.
    """
    found = links.discover()
    if not found:
        raise LaunchError("this machine has no network; plug in a cable, then look at `python -m macft.doctor`")
    ring, _ = keystore.make(keystore.key_folder())
    public = ring.own.public.hex()
    return Member(
        keystore.own_name(),
        getpass.getuser(),
        sys.executable,
        public,
        software.versions(),
        found[:_MAX_LINKS],
        probe_port,
    )


def version_objection(member: Member) -> str:
    """Why a machine's software does not fit this one's, or nothing."""
    for package, ours in software.versions().items():
        theirs = member.versions.get(package)
        if package != "python" and theirs != ours:
            mend = f"python3 -m pip install {package}=={ours}"
            return f"{member.name} has {package} {theirs}, the others have {ours}; run on {member.name}: {mend}"
    return ""


def networks(members: Sequence[Member]) -> list[list[links.Link]]:
    """One link of each member for every network that has all of them: Thunderbolt before Ethernet before Wi-Fi.

    The first network is the one to use; the others are further cables. Wi-Fi and tunnels are no further cables: what
    they add to a cable is little, and they would hold it up.

    Raises:
        LaunchError: no network has all of them.
    """
    candidates = []
    for first in members[0].links:
        chosen = [first]
        for member in members[1:]:
            same = sorted((link for link in member.links if first.reaches(link)), key=links.order)
            if not same:
                break
            chosen.append(same[0])
        else:
            if len({link.host for link in chosen}) == len(chosen):  # every machine has the same one in its own bridges
                candidates.append((max(links.order(link) for link in chosen), chosen))
    if not candidates:
        names = ", ".join(member.name for member in members)
        raise LaunchError(
            f"{names} are in no common network; connect them to one switch or Wi-Fi, or, with cables from Mac to Mac, "
            "turn on Thunderbolt Bridge (System Settings > Network) on all of them"
        )
    found: list[list[links.Link]] = []
    for _, chosen in sorted(candidates, key=lambda candidate: candidate[0]):
        is_cable = all(link.kind in ("thunderbolt", "ethernet") for link in chosen)
        if not found or (is_cable and not any(chosen[0].overlaps(other[0]) for other in found)):
            found.append(chosen)
    return found[:MAX_PATHS]


def topology_of(
    members: Sequence[Member], chosen: Sequence[Sequence[links.Link]], order: Sequence[int]
) -> TopologyConfig:
    """The cluster as a topology, in ring order; ``chosen`` as of :func:`networks`."""
    pythons = [members[index].python for index in order]
    return TopologyConfig(
        kind="ssh",
        hosts=["+".join(network[index].host for network in chosen) for index in order],
        ssh=[f"{members[index].user}@{chosen[0][index].host}" for index in order],
        python=pythons[:1] if len(set(pythons)) == 1 else pythons,
    )
