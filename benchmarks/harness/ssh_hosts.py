"""Network namespaces as hosts, each with its own address and its own sshd."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from harness.namespaces import missing_requirement, unique_tag

REPOSITORY = Path(__file__).parents[2]
NETWORK = "10.77.{}.{}"
SECOND_NETWORK = "10.78.{}.{}"


@dataclass(frozen=True)
class Host:
    """A namespace with an address; ``home`` is the home folder of whoever comes over SSH."""

    namespace: str
    address: str
    home: Path


@dataclass(frozen=True)
class Cluster:
    """Hosts, and the home folder of the user at the terminal, who may log in to each of them."""

    hosts: list[Host]
    home: Path

    def environment(self) -> dict[str, str]:
        """Of a command typed at the terminal."""
        return {
            **os.environ,
            "HOME": str(self.home),
            "MACFT_CONFIG": str(self.home / "config"),
            "MACFT_KEYS": str(self.home / "keys"),
            "OPENBLAS_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "SSH_AUTH_SOCK": "",
        }

    def agents(self) -> list[psutil.Process]:
        """The processes of ranks on these hosts."""
        homes = {str(host.home) for host in self.hosts}
        found = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            line, home = process.info["cmdline"] or [], (process.info["environ"] or {}).get("HOME")
            if "macft.launch.agent" in line and home in homes:
                found.append(process)
        return found

    def inside(self, host: Host, *command: str) -> list[str]:
        """``command`` as typed on ``host`` itself."""
        return ["ip", "netns", "exec", host.namespace, *command]

    def over_ssh(self, host: Host, command: str) -> None:
        """Runs a command in ``host``'s home folder."""
        known, key = self.home / ".ssh/known_hosts", self.home / ".ssh/id_ed25519"
        _run("ssh", "-F", "none", "-i", str(key), "-o", f"UserKnownHostsFile={known}", f"root@{host.address}", command)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def why_not() -> str:
    """Why there can be no such hosts here; empty if there can."""
    return missing_requirement(["ssh", "ssh-keygen", "unshare", "sshd"])


@contextmanager
def cluster(folder: Path, count: int, *, two_cables: bool = False) -> Iterator[Cluster]:
    """``count`` hosts on one switch, with the terminal's machine beside them; see :func:`why_not`.

    With ``two_cables`` each host has a second one, ``eth1``, to a switch that nobody else is on.
    """
    number = _free_network()
    tag = unique_tag()
    home = folder / "terminal"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / ".ssh/id_ed25519"))
    Path("/run/sshd").mkdir(exist_ok=True)
    with ExitStack() as stack:
        bridge = f"mb{tag}"
        _run("ip", "link", "add", bridge, "type", "bridge")
        stack.callback(_run, "ip", "link", "del", bridge)
        _run("ip", "addr", "add", NETWORK.format(number, 1) + "/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        hosts = [_host(stack, folder, home, tag, bridge, number, index) for index in range(count)]
        if two_cables:
            _second_cables(stack, hosts, tag, number)
        known = [f"{host.address} {(folder / 'host_key.pub').read_text()}" for host in hosts]
        (home / ".ssh/known_hosts").write_text("".join(known))
        (home / ".ssh/config").write_text("SendEnv MACFT_FAULT\n")
        yield Cluster(hosts, home)


def _free_network() -> int:
    """The number of a network that no other cluster on this machine has."""
    used = {address.address for card in psutil.net_if_addrs().values() for address in card}
    first = os.getpid()
    return next(n for n in ((first + i) % 200 + 20 for i in range(200)) if NETWORK.format(n, 1) not in used)


def _host(stack: ExitStack, folder: Path, home: Path, tag: str, bridge: str, number: int, index: int) -> Host:
    namespace, address = f"mn{tag}-{index}", NETWORK.format(number, index + 2)
    outer, inner = f"mo{tag}{index}", "eth0"
    own = folder / f"host{index}"
    own.mkdir()
    _run("ip", "netns", "add", namespace)
    stack.callback(_run, "ip", "netns", "del", namespace)
    _run("ip", "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", namespace)
    _run("ip", "link", "set", outer, "master", bridge, "up")
    for command in (f"addr add {address}/24 dev {inner}", f"link set {inner} up", "link set lo up"):
        _run("ip", "-n", namespace, *command.split())
    key = folder / "host_key"
    if not key.exists():
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    path = os.pathsep.join(filter(None, [str(REPOSITORY / "src"), os.environ.get("PYTHONPATH")]))
    (folder / "authorized_keys").write_text((home / ".ssh/id_ed25519.pub").read_text())
    settings = {
        "PYTHONPATH": path,
        "MACFT_KEYS": own / "keys",
        "OPENBLAS_NUM_THREADS": 1,
        "HF_HUB_OFFLINE": 1,
        "XDG_CACHE_HOME": Path.home() / ".cache",
    }
    configuration = own / "sshd_config"
    configuration.write_text(
        f"ListenAddress {address}\nHostKey {key}\nAuthorizedKeysFile {folder / 'authorized_keys'}\nStrictModes no\n"
        f"PidFile none\nUsePAM no\nPermitRootLogin yes\nAcceptEnv MACFT_FAULT\nSubsystem sftp internal-sftp\n"
        f"SetEnv {' '.join(f'{name}={value}' for name, value in settings.items())}\n"
    )
    log = (own / "sshd.log").open("wb")
    stack.callback(log.close)
    users = own / "passwd"
    users.write_text(f"root:x:0:0:root:{own}:/bin/sh\nsshd:x:105:65534::/run/sshd:/usr/sbin/nologin\n")
    # `ip netns exec` gives a mount namespace too, so this host alone has its own home folder for root.
    script = f"mount --bind {users} /etc/passwd && exec /usr/sbin/sshd -D -e -f {configuration}"
    server = subprocess.Popen(["ip", "netns", "exec", namespace, "sh", "-c", script], stderr=log)
    stack.callback(server.wait)
    stack.callback(server.terminate)
    _await_port(address, own / "sshd.log")
    return Host(namespace, address, own)


def _second_cables(stack: ExitStack, hosts: list[Host], tag: str, number: int) -> None:
    bridge = f"mc{tag}"
    _run("ip", "link", "add", bridge, "type", "bridge")
    stack.callback(_run, "ip", "link", "del", bridge)
    _run("ip", "link", "set", bridge, "up")
    for index, host in enumerate(hosts):
        outer, address = f"mp{tag}{index}", SECOND_NETWORK.format(number, index + 2)
        _run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth1", "netns", host.namespace)
        _run("ip", "link", "set", outer, "master", bridge, "up")
        _run("ip", "-n", host.namespace, "addr", "add", f"{address}/24", "dev", "eth1")
        _run("ip", "-n", host.namespace, "link", "set", "eth1", "up")


def _await_port(address: str, log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            socket.create_connection((address, 22), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"sshd did not start: {log.read_text()}")
