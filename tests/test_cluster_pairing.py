"""A code makes a cluster: real sockets, real commands, and machines in network namespaces."""

from __future__ import annotations

import itertools
import json
import re
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.waiting import wait_until
from macft.diagnostics import software
from macft.errors import ConfigError, LaunchError
from macft.network.link_probe import ProbeServer, measure
from macft.network.links import Link, for_contact
from macft.pairing.admission import Admission, Guest
from macft.pairing.member import Member, common_networks, is_further_cable, topology_from, version_objection
from macft.pairing.pake import PAIRING_VERSION, Channel, Guesses, PakeExchange, WrongCode, new_code
from macft.pairing.ring_order import ring_order
from macft.topology import topology_file
from macft.topology.settings import TopologyConfig


def both_sides(host_code: str, guest_code: str) -> tuple[list[Channel | LaunchError], list[socket.socket]]:
    """What the two sides of an exchange end with: host, guest."""
    pair = socket.socketpair()
    ends: list[Channel | LaunchError] = [LaunchError("none"), LaunchError("none")]

    def side(index: int, code: str) -> None:
        pair[index].settimeout(60)
        try:
            ends[index] = Channel(pair[index], code, is_host=index == 0)
        except LaunchError as error:
            ends[index] = error
            pair[index].close()

    threads = [threading.Thread(target=side, args=item) for item in enumerate((host_code, guest_code))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends, list(pair)


def test_one_code_makes_a_secret_channel() -> None:
    code = new_code()
    (host, guest), sockets = both_sides(code, code.replace("-", ""))
    assert isinstance(host, Channel)
    assert isinstance(guest, Channel)
    host.send({"name": "studio"})
    assert guest.receive(60) == {"name": "studio"}
    guest.send({"n": 1})
    guest.send({"n": 2})
    assert [host.receive(60)["n"] for _ in range(2)] == [1, 2]
    sockets[0].sendall(b"\0\0\0\x20" + bytes(32))
    with pytest.raises(LaunchError, match="changed on its way"):
        guest.receive(60)
    assert not host.has_ended
    guest.close()
    assert host.has_ended
    for item in sockets:
        item.close()


def test_a_wrong_code_is_told_on_both_sides() -> None:
    ends, _ = both_sides("1234-5678", "1234-5679")
    assert all(isinstance(end, WrongCode) for end in ends)


def test_after_the_last_wrong_code_the_right_one_lets_nobody_in_either() -> None:
    guesses = Guesses(3)
    assert guesses.judge(is_right=True)
    assert not any(guesses.judge(is_right=False) for _ in range(3))
    assert not guesses.judge(is_right=True)


def test_a_silent_machine_keeps_nobody_waiting() -> None:
    """Nor does one that knows the code and then says nothing."""
    shown: list[str] = []
    token, code = b"t" * 16, new_code()
    admission = Admission(member("host"), code, token, room=2, most_wrong=3, show=shown.append)
    at = ("127.0.0.1", admission.port)
    silent, slow, own = (socket.create_connection(at, 30) for _ in range(3))
    with silent, slow, own:
        Channel(slow, code, is_host=False)
        channel = Channel(own, code, is_host=False)
        channel.send(replace(member("guest"), versions=software.versions(), key="11" * 32).to_message())
        assert channel.receive(30) == {"token": token}
        assert admission.guests() == []
        channel.send({"ready": True})
        guest = admission.outcomes.get(timeout=60)
        assert isinstance(guest, Guest)
        assert admission.guests() == [guest]
        assert shown == ["guest has joined (2 of 3)"]
        own.close()
        wait_until(lambda: not admission.guests())
        assert shown[1:] == ["guest has left"]
    admission.close()


FIRST = b"macft pairing " + bytes([PAIRING_VERSION])
NEUTRAL = (1).to_bytes(32, "little")  # the point that would give a known result for any code


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (b"", "does not follow the protocol"),
        (FIRST, "does not follow the protocol"),
        (FIRST + b"B" + NEUTRAL, "does not follow the protocol"),
        (FIRST + b"B" + b"\xff" * 32, "does not follow the protocol"),
        (FIRST + b"B" + b"\2" * 32, "does not follow the protocol"),
        (b"\x5a" * 256, "runs an older macft; install the same version"),  # what version 1 sent: a number below a prime
        (FIRST[:-1] + bytes([PAIRING_VERSION + 1]) + b"?", "runs a newer macft; install the same version"),
    ],
    ids=["nothing", "no element", "neutral", "no point", "not on the curve", "older", "newer"],
)
def test_first_frames_that_are_none_are_refused(sent: bytes, told: str) -> None:
    with pytest.raises(LaunchError, match=told):
        PakeExchange("1234-5678", is_host=False).keys(sent)


def test_a_good_element_of_the_wrong_side_or_with_more_after_it_is_refused() -> None:
    own, other = (PakeExchange("1", is_host=is_host).first_frame[-32:] for is_host in (False, True))
    for sent in (FIRST + b"A" + own, FIRST + b"B" + other + b"\0"):
        with pytest.raises(LaunchError, match="does not follow the protocol"):
            PakeExchange("1234-5678", is_host=False).keys(sent)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=300))
def test_no_first_frame_is_a_traceback(sent: bytes) -> None:
    for beginning in (b"", FIRST + b"B"):
        with pytest.raises(LaunchError):
            PakeExchange("1234-5678", is_host=False).keys(beginning + sent)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 7).flatmap(lambda n: st.lists(st.floats(1e-6, 1.0), min_size=n * n, max_size=n * n)))
def test_the_ring_with_the_fastest_slowest_link_is_found(values: list[float]) -> None:
    count = int(len(values) ** 0.5)
    cost = [[values[min(i, j) * count + max(i, j)] for j in range(count)] for i in range(count)]

    def slowest(ring: list[int]) -> float:
        return max(cost[node][ring[(place + 1) % count]] for place, node in enumerate(ring))

    found = ring_order(cost)
    assert sorted(found) == list(range(count))
    assert found[0] == 0
    assert slowest(found) == min(slowest([0, *rest]) for rest in itertools.permutations(range(1, count)))


def test_a_large_ring_avoids_the_slow_links() -> None:
    # Twelve machines; every even one has fast links to its odd neighbours in a hidden ring.
    hidden = [0, 7, 2, 11, 4, 9, 6, 1, 8, 3, 10, 5]
    cost = [[1.0] * 12 for _ in range(12)]
    for place, node in enumerate(hidden):
        after = hidden[(place + 1) % 12]
        cost[node][after] = cost[after][node] = 0.1
    ring = ring_order(cost)
    slow = sum(cost[node][ring[(place + 1) % 12]] == 1.0 for place, node in enumerate(ring))
    assert slow <= 4
    assert sorted(ring) == list(range(12))


def member(name: str, *found: Link) -> Member:
    return Member(name, "me", "/usr/bin/python3", "00" * 32, {"macft": "0.1.0"}, found, 4242)


def test_thunderbolt_before_ethernet_before_wifi() -> None:
    wifi = [Link("en0", "wifi", f"192.168.1.{n}/24", 800) for n in (1, 2, 3)]
    wired = [Link("en1", "ethernet", f"10.0.0.{n}/24", 1000) for n in (1, 2, 3)]
    bridge = [Link("bridge0", "thunderbolt", f"169.254.3.{n}/16", 40_000) for n in (1, 2)]
    first, second, third = (member("abc"[n], wifi[n], wired[n], *bridge[n : n + 1]) for n in range(3))
    assert [link.kind for link in common_networks([first, second])[0]] == ["thunderbolt"] * 2
    assert [link.host for link in common_networks([first, second, third])[0]] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    with pytest.raises(LaunchError, match="a, d have no common network"):
        common_networks([first, member("d", Link("en0", "ethernet", "172.16.0.1/24"))])


def with_further_cables(members: list[Member]) -> list[list[Link]]:
    """The networks of ``members`` that are used if all of them work."""
    chosen: list[list[Link]] = []
    for network in common_networks(members):
        if not chosen or is_further_cable(network, chosen):
            chosen.append(network)
    return chosen


def test_further_cables_are_further_addresses_and_wifi_and_own_bridges_are_not() -> None:
    wifi = [Link("en0", "wifi", f"192.168.1.{n}/24", 800) for n in (1, 2)]
    wired = [Link("en1", "ethernet", f"10.0.0.{n}/24", 1000) for n in (1, 2)]
    again = [Link("en7", "ethernet", f"10.0.0.{n}/16", 900) for n in (7, 8)]  # the same network, another cable
    cable = [Link("en2", "thunderbolt", f"10.1.0.{n}/30", 40_000) for n in (1, 2)]
    own = Link("bridge7", "ethernet", "172.17.0.1/16", 10_000)
    two = [member("ab"[n], wifi[n], wired[n], again[n], own, cable[n]) for n in (0, 1)]
    assert topology_from(two, with_further_cables(two), [0, 1]).hosts == ["10.1.0.1+10.0.0.1", "10.1.0.2+10.0.0.2"]
    only = [member("ab"[n], wifi[n], own) for n in (0, 1)]
    assert topology_from(only, with_further_cables(only), [1, 0]).hosts == ["192.168.1.2", "192.168.1.1"]


def test_self_assigned_addresses_come_behind_others_of_their_kind_and_vpns_never() -> None:
    wired = [Link("en1", "ethernet", f"10.0.0.{n}/24", 1000) for n in (1, 2)]
    assigned = [Link("en5", "ethernet", f"169.254.1.{n}/16", 10_000) for n in (1, 2)]
    again = [Link("en6", "ethernet", f"169.254.2.{n}/16", 10_000) for n in (1, 2)]
    wifi = [Link("en0", "wifi", f"192.168.1.{n}/24") for n in (1, 2)]
    tunnel = [Link("utun3", "other", f"100.64.0.{n}/10") for n in (1, 2)]
    two = [member("ab"[n], assigned[n], again[n], wifi[n], tunnel[n], wired[n]) for n in (0, 1)]
    tried = [(network[0].host, network[1].host) for network in common_networks(two)]
    assert tried[0] == ("10.0.0.1", "10.0.0.2")
    assert tried[-1] == ("192.168.1.1", "192.168.1.2")
    # Each self-assigned address may belong to a cable that leads to any of the others.
    assert {(a, b) for a in ("169.254.1.1", "169.254.2.1") for b in ("169.254.1.2", "169.254.2.2")} == set(tried[1:-1])
    assert [link.host for link in for_contact(two[0].links)] == [
        "10.0.0.1",
        "192.168.1.1",
        "169.254.1.1",
        "169.254.2.1",
    ]
    with pytest.raises(LaunchError, match=r"no common network.*VPN"):
        common_networks([member("ab"[n], tunnel[n]) for n in (0, 1)])


def test_a_member_comes_through_as_it_was_and_nonsense_does_not() -> None:
    one = member("a", Link("en0", "wifi", "192.168.1.1/24"))
    assert Member.from_message(one.to_message()) == one
    assert "runs on" not in version_objection(one)
    for key, value in (("links", 3), ("name", "a\nb"), ("probe_port", 0), ("key", None), ("links", [{"name": "x"}])):
        with pytest.raises(LaunchError, match="describe itself"):
            Member.from_message({**one.to_message(), key: value})


def test_links_are_measured_for_those_who_know_the_token() -> None:
    server = ProbeServer(b"t" * 16)
    found = measure("127.0.0.1", server.port, b"t" * 16)
    assert found.latency > 0
    assert found.bandwidth > 0
    with pytest.raises(LaunchError, match="can't be reached"):
        measure("127.0.0.1", server.port, b"u" * 16)
    server.close()
    with pytest.raises(LaunchError, match="can't be reached"):
        measure("127.0.0.1", server.port, b"t" * 16)


def test_a_topology_file_and_a_hostfile_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACFT_CONFIG", str(tmp_path))
    made = TopologyConfig(kind="ssh", hosts=["10.0.0.1", "10.0.0.2"], ssh=["a", "me@b"])
    path = topology_file.save_topology("desk", made)
    assert topology_file.load_topology("desk") == made
    assert "start_timeout" not in path.read_text()
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(topology_file.to_hostfile(made))
    assert json.loads(hostfile.read_text())[1] == {"ssh": "me@b", "ips": ["10.0.0.2"]}
    assert topology_file.from_hostfile(hostfile) == made
    made.hosts = ["10.0.0.1+10.1.0.1", "10.0.0.2+10.1.0.2"]
    hostfile.write_text(topology_file.to_hostfile(made))
    assert topology_file.from_hostfile(hostfile) == made
    path.write_text("kind: ssh\nhosts: [a]\nhots: 3\n")
    with pytest.raises(ConfigError, match="hots"):
        topology_file.load_topology("desk")
    for text in ("[]", "{", '[{"ips": ["1"]}]', '{"hosts": 3}'):
        hostfile.write_text(text)
        with pytest.raises(ConfigError, match=re.escape(str(hostfile))):
            topology_file.from_hostfile(hostfile)
