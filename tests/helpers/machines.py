"""Network namespaces as machines on one switch, without SSH: each with its own name, links, configuration and keys."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.namespaces import missing_requirement, run, unique_tag


@dataclass(frozen=True)
class Machine:
    """A namespace whose interface ``eth0`` is on the switch; ``home`` is its user's home folder."""

    namespace: str
    home: Path

    def ip(self, command: str) -> None:
        """Runs ``ip`` with the words of ``command`` on this machine."""
        run(f"ip -n {self.namespace} {command}")

    def start(self, *words: str, name: str = "", niceness: int = 0) -> subprocess.Popen[str]:
        """Starts ``python`` with ``words`` on this machine, which calls itself ``name``."""
        environment = {
            **{key: value for key, value in os.environ.items() if key != "MACFT_KEYS"},
            "HOME": str(self.home),
            "MACFT_CONFIG": str(self.home / "config"),
            "OPENBLAS_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "SSH_AUTH_SOCK": "",
            "XDG_CACHE_HOME": str(Path.home() / ".cache"),
        }
        script = f'hostname {name or self.namespace}; exec nice -n {niceness} "$0" "$@"'
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", script, sys.executable, *words],
            env=environment,
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def ended(process: subprocess.Popen[str], status: int = 0) -> str:
    """What a command has printed by its end."""
    output, errors = process.communicate(timeout=240)
    assert process.returncode == status, output + errors
    return output + errors


@contextmanager
def machines(folder: Path, addresses: Sequence[Sequence[str]]) -> Iterator[list[Machine]]:
    """A machine for each of ``addresses``, which lists those of its ``eth0`` with prefix lengths.

    Skips where that is not permitted.
    """
    if reason := missing_requirement(["unshare"]):
        pytest.skip(reason)
    tag = unique_tag()
    with ExitStack() as stack:
        made = []
        for index in range(len(addresses)):
            machine = Machine(f"mm{tag}-{index}", folder / f"machine{index}")
            machine.home.mkdir()
            run(f"ip netns add {machine.namespace}")
            stack.callback(run, f"ip netns del {machine.namespace}")
            made.append(machine)
        switch = made[0].namespace + "s"
        run(f"ip netns add {switch}")
        stack.callback(run, f"ip netns del {switch}")
        run(f"ip -n {switch} link add switch type bridge")
        run(f"ip -n {switch} link set switch up")
        for index, machine in enumerate(made):
            run(f"ip -n {switch} link add port{index} type veth peer name eth0 netns {machine.namespace}")
            run(f"ip -n {switch} link set port{index} master switch up")
            machine.ip("link set lo up")
            for address in addresses[index]:
                machine.ip(f"addr add {address} dev eth0{' nodad' if ':' in address else ''}")
            machine.ip("link set eth0 up")
        yield made
