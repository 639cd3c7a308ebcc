"""Clusters on machines as people have them: dead links, VPNs, containers, one name twice, IPv6, a busy processor."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from harness.runs import adapter_digests, read_line
from helpers.machines import Machine, ended, machines
from macft.topology.settings import TopologyConfig, problems

pytestmark = pytest.mark.slow

TINY = [
    "dataset.metric=null",
    "training.metric_rows=0",
    "adapter.num_layers=-1",
    "training.batch_size=4",
    "training.micro_batch_size=2",
    "training.steps=7",
    "training.eval_every=0",
    "training.save_every=0",
    "report.tensorboard=false",
    "hydra.run.dir=run",
]


def clutter(machine: Machine, number: int) -> None:
    """What a machine has beside its cable: an interface that leads nowhere, a VPN, and networks of containers."""
    for command in (
        "link add en5 type veth peer name nowhere",
        f"addr add 169.254.7.{number}/16 dev en5",
        "link set nowhere up",
        "link set en5 up",
        "tuntap add utun4 mode tun",
        f"addr add 100.64.0.{number}/10 dev utun4",
        "link set utun4 up",
        "link add docker0 type bridge",
        "addr add 172.17.0.1/16 dev docker0",
        "link add veth12ab type veth peer name inner",
        "link set veth12ab master docker0 up",
        "link set inner up",
        "link set docker0 up",
    ):
        machine.ip(command)


def invitation(init: subprocess.Popen[str]) -> tuple[str, str]:
    """The code, and the place behind ``--at``, that ``init`` prints."""
    code = re.search(r"join (\d{4}-\d{4}) --name desk", read_line(init.stdout))
    place = re.search(r"--at (\S+)\)", read_line(init.stdout))
    assert code is not None
    assert place is not None
    return code[1], place[1]


def test_a_cluster_of_two_cluttered_machines_of_one_name_trains_by_the_command_it_prints(
    tmp_path: Path, tiny_task: list[str]
) -> None:
    with machines(tmp_path, [["10.99.0.1/24"], ["10.99.0.2/24"]]) as two:
        for number, machine in enumerate(two, 1):
            clutter(machine, number)
        init = two[0].start("-m", "macft.cluster", "init", "desk", name="MacBook-Pro")
        code, place = invitation(init)
        assert place.startswith("10.99.0.1:")
        busy = [two[1].start("-c", "while True: pass") for _ in range(2)]
        try:
            join = two[1].start("-m", "macft.cluster", "join", code, "--name", "desk", name="MacBook-Pro", niceness=5)
            outputs = [ended(init), ended(join)]
        finally:
            for process in busy:
                process.kill()
                process.communicate()
        assert "two machines are named MacBook-Pro; the one at 10.99.0.2 is called MacBook-Pro-2 here" in outputs[0]
        topology = [yaml.safe_load((machine.home / "config/topology/desk.yaml").read_text()) for machine in two]
        assert topology[0] == topology[1]
        assert topology[0]["hosts"] == ["10.99.0.1", "10.99.0.2"]
        trusted = [(machine.home / "config/keys/trusted").read_text().split()[0] for machine in two]
        assert trusted == ["MacBook-Pro-2", "MacBook-Pro"]
        commands = []
        for output in outputs:
            assert "root@10.99.0.1: can't be reached over SSH" in output
            assert "is Remote Login on there" in output
            command = re.search(r"without SSH, by the same command on each machine: python (.*)", output)
            assert command is not None
            commands.append(command[1].split())
        nodes = [two[rank].start(*commands[rank], *tiny_task, *TINY) for rank in (0, 1)]
        for node in nodes:
            ended(node)
        assert len(set(adapter_digests(two[0].home / "run"))) == 1


GUESTS = """
import socket, struct, sys, time
from macft.errors import LaunchError
from macft.network.link_probe import ProbeServer
from macft.pairing.member import this_machine
from macft.pairing.pake import Channel, WrongCode

host, _, port = sys.argv[1].partition(":")
connect = lambda: socket.create_connection((host, int(port)), 20)

with connect() as old:  # the first frame of version 1
    old.sendall(struct.pack(">I", 256) + bytes(range(256)))
    assert old.recv(4)
for _ in range(4):  # leaves without a guess
    connect().close()
for _ in range(2):
    with connect() as wrong:
        try:
            Channel(wrong, "no code", is_host=False)
            sys.exit("admitted")
        except WrongCode:
            pass
with connect() as leaving:  # Ctrl-C after joining; the same machine joins again below
    channel = Channel(leaving, sys.argv[2], is_host=False)
    channel.send(this_machine(4242).to_message())
    channel.receive(60)
    channel.send({"ready": True})
with connect() as slow:
    probe = ProbeServer(bytes(16))
    channel = Channel(slow, sys.argv[2], is_host=False)
    channel.send(this_machine(probe.port).to_message())
    token = channel.receive(60)["token"]
    time.sleep(1)  # as on a busy machine: who measures now is turned away
    probe.admit(token)
    channel.send({"ready": True})
    while "hosts" not in (message := channel.receive(100)):
        channel.send({"latency": 1e-4, "bandwidth": 1e8})
    print(message["hosts"])
"""


def test_guesses_are_counted_and_a_slow_guest_is_waited_for(tmp_path: Path) -> None:
    with machines(tmp_path, [["10.99.0.1/24"], ["10.99.0.2/24"], ["10.99.0.3/24"]]) as three:
        init = three[0].start("-m", "macft.cluster", "init", "desk", "--nodes", "3")
        code, place = invitation(init)
        guests = three[1].start("-c", GUESTS, place, code)
        printed = [read_line(init.stdout)]
        while "has left" not in printed[-1]:
            printed.append(read_line(init.stdout))
            assert printed[-1], ended(init)
        ended(three[2].start("-m", "macft.cluster", "join", code, "--at", place))
        assert "'10.99.0.1', '10.99.0.2', '10.99.0.3'" in ended(guests)
        output = "".join(printed) + ended(init)
    assert "10.99.0.2: pairing: the other side runs an older macft; install the same version on all" in output
    assert output.count("not admitted") == 5
    assert output.count("used a wrong code") == 2
    assert "(2 of 3 tries)" in output
    assert "two machines are named" not in output


def test_three_wrong_codes_end_it(tmp_path: Path) -> None:
    with machines(tmp_path, [["10.99.0.1/24"], ["10.99.0.2/24"]]) as two:
        init = two[0].start("-m", "macft.cluster", "init", "desk")
        _, place = invitation(init)
        for _ in range(3):
            join = two[1].start("-m", "macft.cluster", "join", "no-code", "--at", place)
            assert "the code is wrong" in ended(join, 1)
        assert "three wrong codes; start again, with a new code" in ended(init, 1)


def test_two_machines_with_self_assigned_addresses_only(tmp_path: Path) -> None:
    """As two Macs have them with one cable between them and nothing set up."""
    with machines(tmp_path, [["169.254.3.1/16"], ["169.254.9.2/16"]]) as two:
        init = two[0].start("-m", "macft.cluster", "init", "desk")
        code, _ = invitation(init)
        join = two[1].start("-m", "macft.cluster", "join", code, "--name", "desk")
        output = ended(init)
        ended(join)
        topology = yaml.safe_load((two[1].home / "config/topology/desk.yaml").read_text())
    assert topology["hosts"] == ["169.254.3.1", "169.254.9.2"]
    assert "note: 169.254.3.1 is a self-assigned address" in output


WAITING = """
import socket, sys
from macft.network.connections import end_if_unreachable
with socket.create_connection((sys.argv[1], 4242), 20) as connection:
    end_if_unreachable(connection, idle=1, every=1, probes=2)
    connection.settimeout(60)
    print("waiting", flush=True)
    try:
        connection.recv(1)
    except OSError as error:
        print(error.strerror)
"""
LISTENING = """
import socket
with socket.create_server(("", 4242)) as server:
    print("listening", flush=True)
    connection, _ = server.accept()
    connection.recv(1)
"""


def test_a_machine_that_vanishes_is_noticed_by_one_that_waits(tmp_path: Path) -> None:
    with machines(tmp_path, [["10.99.0.1/24"], ["10.99.0.2/24"]]) as (host, guest):
        listening = host.start("-c", LISTENING)
        assert read_line(listening.stdout) == "listening\n"
        waiting = guest.start("-c", WAITING, "10.99.0.1")
        assert read_line(waiting.stdout) == "waiting\n"
        host.ip("link set eth0 down")
        assert ended(waiting).strip() in ("Connection timed out", "No route to host")
        listening.kill()
        listening.communicate()


def test_nodes_meet_over_ipv6(tmp_path: Path, tiny_task: list[str]) -> None:
    with machines(tmp_path, [["fd99::1/64"], ["fd99::2/64"]]) as two:
        hosts = 'topology.hosts=["[fd99::1]","[fd99::2]"]'
        command = ["-m", "macft.train", "topology=hosts", hosts, "collective.encryption=off", *tiny_task, *TINY]
        for node in [machine.start(*command) for machine in two]:
            ended(node)
        assert len(set(adapter_digests(two[0].home / "run"))) == 1
        refused = ended(two[0].start("-m", "macft.cluster", "init", "desk"), 1)
    assert "no network with an IPv4 address" in refused


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("[fe80::1]", "'[fe80::1]' is a link-local IPv6 address"),
        ("[fe80::1%en0]:7070", "'[fe80::1%en0]:7070' is a link-local IPv6 address"),
        ("fd99::1", 'write an IPv6 address in brackets and quotes: "[fd99::1]"'),
        ("fe80::1%en0", "is a link-local IPv6 address"),
    ],
)
def test_ipv6_addresses_that_cannot_work_are_refused_with_the_reason(host: str, told: str) -> None:
    lines = problems(TopologyConfig(kind="hosts", hosts=[host, "[fd99::2]"]))
    assert [told in line for line in lines] == [True], lines
