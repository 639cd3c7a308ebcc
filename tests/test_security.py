"""Only trusted machines take part, and whoever is refused is told what mends it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from hydra import compose, initialize_config_dir
from zmq.utils.monitor import recv_monitor_message

from harness.runs import environment, free_ports, losses, on_hosts, start, train, uneven_dataset
from helpers.rings import LiveRing, live_ring
from macft.collective.ring.security import KeyPair, encrypt_to
from macft.collective.settings import CollectiveConfig
from macft.collective.wire import split_address
from macft.config.command_line import prepare
from macft.config.paths import config_folder
from macft.config.validate import to_typed
from macft.config.yaml import to_yaml
from macft.errors import CollectiveError, ConfigError, RendezvousError
from macft.rendezvous import keystore
from macft.rendezvous.connect import RankConfig, connect_ring
from macft.rendezvous.keystore import Keyring
from macft.rendezvous.server import RendezvousServer
from macft.report.run_folder import RunFolder
from macft.topology.settings import TopologyConfig

CONFIG = CollectiveConfig(timeout=20.0, heartbeat=0.5)


def keyrings(count: int) -> list[Keyring]:
    """Machines that trust each other."""
    pairs = [KeyPair.new() for _ in range(count)]
    return [
        Keyring(own, {f"mac{i}": other.public for i, other in enumerate(pairs) if other is not own}) for own in pairs
    ]


def serve(keyring: Keyring | None, world_size: int, told: list[str], timeout: float = 30.0) -> RendezvousServer:
    server = RendezvousServer(
        world_size=world_size,
        run_id="run",
        must_match={},
        timeout=timeout,
        keyring=keyring,
        on_refusal=told.append,
    )
    server.start()
    return server


def add_up(server: RendezvousServer, keyring: Keyring | None, rank: int, world_size: int) -> list[float]:
    """Meets the others, and sums a small and a large array with them."""
    config = RankConfig(
        server.address,
        rank,
        world_size,
        run_id="run",
        must_match={},
        name=f"node{rank}",
        timeout=30.0,
        keyring=keyring,
    )
    with connect_ring(config, CONFIG) as ring:
        small, large = np.full(3, rank + 1.0), np.full(1_000_000, rank + 1.0, np.float32)
        ring.all_reduce([small])
        ring.all_reduce([large])
        assert (large == large[0]).all()
        return [*small.tolist(), float(large[0])]


def reason(future: Future[Any]) -> str:
    error = future.exception(timeout=60)
    assert isinstance(error, RendezvousError), error
    assert len(str(error).splitlines()) == 1
    return str(error)


@pytest.mark.parametrize("world_size", [2, 3])
def test_machines_that_trust_each_other_add_up(pool: ThreadPoolExecutor, world_size: int) -> None:
    rings, told = keyrings(world_size), list[str]()
    server = serve(rings[0], world_size, told)
    found = list(pool.map(lambda rank: add_up(server, rings[rank], rank, world_size), range(world_size)))
    total = world_size * (world_size + 1) / 2
    assert found == [[total] * 4] * world_size
    assert told == []
    server.close()
    assert len(set(server.wait().keys)) == world_size


def test_an_unknown_key_is_refused_and_both_sides_say_what_mends_it(pool: ThreadPoolExecutor) -> None:
    rings, told = keyrings(2), list[str]()
    stranger = Keyring(KeyPair.new(), rings[1].trusted)  # it knows the server, the server does not know it
    server = serve(rings[0], 2, told)
    members = [pool.submit(add_up, server, rings[0], 0, 2)]
    key = stranger.own.public.hex()
    text = reason(pool.submit(add_up, server, stranger, 1, 2))
    assert text == (
        f"rendezvous at {server.address}: it does not trust this machine's key; run there: "
        f"python -m macft.keys trust {keystore.own_name()} {key}"
    )
    # The run waits on for the rank that belongs to it.
    members.append(pool.submit(add_up, server, rings[1], 1, 2))
    assert [member.result(60) for member in members] == [[3.0] * 4] * 2
    server.close()
    assert told == [
        "127.0.0.1 used a key that is not trusted here; if `python -m macft.keys show` prints "
        f"{key} there, run `python -m macft.keys trust NAME {key}` here"
    ]


def test_a_server_that_is_not_trusted_hears_nothing(pool: ThreadPoolExecutor) -> None:
    rings, told = keyrings(2), list[str]()
    impostor = Keyring(KeyPair.new(), rings[0].trusted)
    server = serve(impostor, 2, told)
    text = reason(pool.submit(add_up, server, rings[1], 1, 2))
    assert "its key is not trusted here (mac0); run `python -m macft.keys show` there" in text
    assert server.arrived == ()
    server.close()


@pytest.mark.slow
@pytest.mark.parametrize("server_encrypts", [True, False])
def test_one_that_encrypts_and_one_that_does_not_tell_each_other(
    pool: ThreadPoolExecutor, server_encrypts: bool
) -> None:
    rings, told = keyrings(2), list[str]()
    server = serve(rings[0] if server_encrypts else None, 2, told, timeout=3.0)
    text = reason(pool.submit(add_up, server, None if server_encrypts else rings[1], 1, 2))
    how = ("it encrypts", "does not") if server_encrypts else ("it does not encrypt", "does")
    assert f"{how[0]}, this node {how[1]}; use the same collective.encryption" in text
    with pytest.raises(RendezvousError, match="ranks 0, 1 did not arrive within 3 s"):
        server.wait()
    server.close()
    assert server.arrived == ()
    # Which of the two finds the difference first is chance; the other one may only see the connection end.
    assert all("is collective.encryption the same on all nodes?" in line for line in told)


class Recorder:
    """Stands between rank 0 and rank 1 and keeps what rank 0 says, as one on the wire would."""

    def __init__(self, address: str, flip_at: int | None = None):
        self.target, self.flip_at = split_address(address), flip_at
        self.heard = bytearray()
        self.ends: list[socket.socket] = []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.threads = [threading.Thread(target=self._accept)]
        self.threads[0].start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.getsockname()[1]}"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.server.accept()
                far = socket.create_connection(self.target)
                self.ends += [near, far]
                for source, sink in ((near, far), (far, near)):
                    self.threads.append(threading.Thread(target=self._pump, args=(source, sink, source is near)))
                    self.threads[-1].start()

    def _pump(self, source: socket.socket, sink: socket.socket, from_rank_0: bool) -> None:
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(65_536)):
                if from_rank_0:
                    start = len(self.heard)
                    self.heard += data
                    if self.flip_at is not None and start <= self.flip_at < len(self.heard):
                        data[self.flip_at - start] ^= 1
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(20)
        for end in self.ends:
            end.close()


def test_what_was_recorded_on_the_wire_says_nothing_and_does_nothing_when_it_is_sent_again() -> None:
    recorders: list[Recorder] = []

    def via(address: str) -> str:
        recorders.append(Recorder(address))
        return recorders[0].address

    with live_ring(encrypted=True, via=via) as live:
        heard = bytes(recorders[0].heard)
        assert len(heard) > 400_000
        # Sums of ones, and the ring's id, would stand out in the clear.
        assert np.full(16, 1.0, np.float32).tobytes() not in heard
        assert b"live" not in heard
        host, port = split_address(live.listeners[1].address)
        for part in (heard, heard[: len(heard) // 2], heard[64:], heard[:64] + heard[-100_000:]):
            with socket.create_connection((host, port)) as again, contextlib.suppress(OSError):
                again.sendall(part)
            live.goes_on()
    recorders[0].close()


@pytest.mark.parametrize("flip_at", [700, 5_000, 150_000])
def test_a_bit_that_is_changed_on_the_wire_ends_the_ring_and_never_a_wrong_sum(flip_at: int) -> None:
    live = LiveRing(2, encrypted=True, streams=False)  # test_streams.py does the same to a stream
    recorder = Recorder(live.addresses[1], flip_at)
    live.addresses[1] = recorder.address
    with ThreadPoolExecutor(2) as pool:
        for rank in [pool.submit(live.run, rank) for rank in range(2)]:
            assert isinstance(rank.exception(60), CollectiveError)
    assert live.wrong == 0
    recorder.close()


def test_a_trusted_machine_that_is_no_member_of_the_run_is_not_let_into_its_ring() -> None:
    with live_ring(encrypted=True) as live, zmq.Context() as context, context.socket(zmq.DEALER) as other:
        monitor = other.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        other.linger = 0
        encrypt_to(other, KeyPair.new(), live.keys[1])
        other.connect(f"tcp://{live.listeners[1].address}")
        assert monitor.poll(60_000)
        assert recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH
        live.goes_on()
        other.disable_monitor()
        monitor.close()


@pytest.mark.slow
def test_two_machines_train_encrypted_over_hosts(tmp_path: Path, tiny_model_folder: Path) -> None:
    data = uneven_dataset(tmp_path / "data")
    for machine in ("0", "1"):
        keystore.make(tmp_path / machine)
    for machine, other in (("0", "1"), ("1", "0")):
        keystore.trust(tmp_path / machine, "other", keystore.load(tmp_path / other).own.public.hex())
    processes = [
        start(
            f"model={tiny_model_folder}",
            f"dataset={data}",
            "training.steps=3",
            "training.batch_size=4",
            "optimizer.warmup_steps=0",
            "report.console=false",
            "collective.encryption=on",
            *own,
            cwd=tmp_path,
            variables={"MACFT_KEYS": str(tmp_path / str(rank))},
        )
        for rank, own in enumerate(on_hosts(tmp_path / "run"))
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    assert len(losses(tmp_path / "run" / "0")) == 3


@pytest.mark.slow
@pytest.mark.parametrize("topology", [["topology=local"], ["topology=hosts", "topology.hosts=[192.0.2.1,192.0.2.2]"]])
def test_without_a_key_a_run_ends_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, topology: list[str]
) -> None:
    monkeypatch.setenv("MACFT_KEYS", str(tmp_path / "none"))
    more = ["collective.encryption=on"] if len(topology) == 1 else ["topology.rank=0"]
    done = train("model=/nowhere", *topology, *more, f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.status == 2
    assert "this machine has no key yet; run `python -m macft.keys make`" in done.errors
    assert len(done.errors.splitlines()) == 1


@pytest.mark.slow
def test_nodes_started_over_ssh_get_the_runs_key_from_the_terminal(tmp_path: Path, tiny_model_folder: Path) -> None:
    """The agents as SSH starts them, with what the launcher writes to their standard input."""
    ports = free_ports(2)
    overrides = [
        f"model={tiny_model_folder}",
        f"dataset={uneven_dataset(tmp_path / 'data')}",
        "training.steps=2",
        "training.batch_size=4",
        "optimizer.warmup_steps=0",
        "report.console=false",
        "topology=ssh",
        f"topology.hosts=[127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}]",
        "collective.encryption=on",
    ]
    argv = prepare(overrides).argv
    with initialize_config_dir(str(config_folder().absolute()), version_base="1.3"):
        config = to_typed(compose("train", overrides=argv))
    secret, agents = KeyPair.new().secret.hex(), []
    for rank in range(2):
        (tmp_path / f"run{rank}").mkdir()
        RunFolder(tmp_path / f"run{rank}").proposed.write_text(to_yaml(config))
        agents.append(
            subprocess.Popen(
                [sys.executable, "-m", "macft.launch.agent", str(tmp_path / f"run{rank}"), str(rank)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**environment(), "MACFT_KEYS": str(tmp_path / "none")},
            )
        )
        stdin = agents[rank].stdin
        assert stdin is not None
        stdin.write(f"key {secret}\n")
        stdin.flush()
    for agent in agents:
        agent.wait(120)
        assert agent.stdout is not None
        assert agent.returncode == 0, agent.stdout.read()
        agent.communicate()
    assert len(losses(tmp_path / "run0")) == 2


def test_mlx_is_not_used_beyond_loopback_without_a_word() -> None:
    topology = TopologyConfig(kind="hosts", hosts=["192.168.0.1", "192.168.0.2"])
    with pytest.raises(ConfigError, match="mlx has no encryption"):
        keystore.needs_keys(topology, CollectiveConfig(backend="mlx"))
    assert not keystore.needs_keys(topology, CollectiveConfig(backend="mlx", encryption="off"))
