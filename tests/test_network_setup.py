"""Clusters on machines as people have them: dead links, VPNs, containers, one name twice, IPv6, and a busy processor."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from harness.runs import adapter_digests
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
    assert init.stdout is not None
    code = re.search(r"join (\d{4}-\d{4}) --name desk", init.stdout.readline())
    place = re.search(r"--at (\S+)\)", init.stdout.readline())
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
