"""Sends malformed frames to a target in another process, and measures that process."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil
import zmq

from harness.fuzz.mutations import CURVE_GREETING, CURVE_HELLO, NULL_GREETING, READY, Mutator, zmtp
from harness.runs import read_line
from macft.collective.ring.security import KeyPair, encrypt_to
from macft.collective.ring.stream import StreamOut
from macft.collective.wire import split_address

SECONDS = 150.0
"""A target that doesn't answer for so long hangs."""
_A_CONNECTION = 50
"""Frames sent over one ZeroMQ connection."""
_HALF_OPEN = 24
_MOST_BODY = 4096
_SETTLE_SECONDS = 10.0
_ZEROMQ = ("ring", "membership", "join", "rendezvous")
_BATCH = {
    "rendezvous": 60,
    "pairing": 60,
    "guest": 60,
    "link probe": 300,
    "announcement": 4_000,
    "channel": 40,
    "serve": 500,
    "monitor": 500,
}
"""Frames between two checks, by surface; of the others 2,000."""


class Broken(Exception):
    """A target has not stood the attack; what and at which batch of which seed."""


@dataclass
class Measured:
    """What a process takes."""

    rss: int
    threads: int
    descriptors: int


@dataclass
class Result:
    """A surface under attack.

    Attributes:
        frames: Frames sent.
        connections: Connections made.
        before: The process after a twentieth of the frames, when its buffers and caches are filled.
            after: At the end.
        longest: Seconds that the longest check took.
        notes: What the target has counted.
        done: How often the port's work was done meanwhile.
    """

    surface: str
    mode: str
    frames: int = 0
    connections: int = 0
    checks: int = 0
    before: Measured | None = None
    after: Measured | None = None
    longest: float = 0.0
    done: int = 0
    seconds: float = 0.0
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def wrong(self) -> str:
        """What the target has counted, in words: what is not a fault, and not nothing either."""
        return ", ".join(f"{text}: {count}" for text, count in self.notes.items() if count)


def difference(result: Result) -> Measured:
    """What the process has more of at the end."""
    before, after = result.before, result.after
    assert before is not None
    assert after is not None
    return Measured(after.rss - before.rss, after.threads - before.threads, after.descriptors - before.descriptors)


class TargetProcess:
    """A target of :mod:`harness.fuzz.targets` and the questions to it. A context manager."""

    def __init__(self, surface: str, mode: str):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.fuzz.targets", surface, mode],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._own = psutil.Process(self._process.pid)

    def ask(self, question: str) -> dict[str, Any]:
        """The target's answer. Raises Broken if there is none, or if it says that something is wrong."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(question + "\n")
            stdin.flush()
        except OSError:
            raise Broken(f"its process has ended with status {self._process.wait(10)}") from None
        if not select.select([stdout], [], [], SECONDS)[0]:
            raise Broken("it hangs")
        line = read_line(stdout)
        if not line:
            raise Broken(f"its process has ended with status {self._process.wait(10)}")
        answer: dict[str, Any] = json.loads(line)
        if answer["wrong"]:
            raise Broken(answer["wrong"])
        return answer

    def measure(self) -> Measured:
        """What the process takes now."""
        return Measured(self._own.memory_info().rss, self._own.num_threads(), self._own.num_fds())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


class Attack:
    """Sends frames to one surface.

    Args:
        surface: A key of :data:`harness.fuzz.targets.TARGETS`.
        mode: ``plain`` or ``encrypted``.
        seed: All frames follow from it.
    """

    def __init__(self, surface: str, mode: str, seed: str):
        self._surface, self._mode, self._seed = surface, mode, seed
        self.result = Result(surface, mode)
        self._context: zmq.Context[Any] = zmq.Context()
        self._half_open: list[socket.socket] = []
        self._addresses: list[str] = []
        self._valid: list[bytes] = []
        self._mutator = Mutator(seed)

    def run(self, frames: int, *, first_batch: int = 0) -> Result:
        """Sends at least ``frames``, batch by batch; after each one the target does its work.

        Raises:
            Broken: the target has not stood it; names the batch.
        """
        started, result = time.monotonic(), self.result
        batch, size = first_batch, _BATCH.get(self._surface, 2_000)
        warm = max(size, frames // 20)
        with ExitStack() as stack:
            stack.callback(self._context.destroy, 0)
            target = stack.enter_context(TargetProcess(self._surface, self._mode))
            try:
                target.ask("check")
                while result.frames < frames:
                    self._mutator = Mutator(f"{self._seed} {self._surface} {self._mode} {batch}")
                    self._send_batch(target.ask("open"), min(size, frames - result.frames))
                    self._check(target)
                    batch += 1
                    if result.before is None and result.frames >= warm:
                        result.before = self._settled(target)
                for sock in self._half_open:
                    sock.close()
                self._half_open.clear()
                result.after = self._settled(target, result.before)
                self._check(target)
            except Broken as error:
                raise Broken(f"{self._surface}, {self._mode}, seed {self._seed}, batch {batch}: {error}") from None
        result.before = result.before or result.after
        result.seconds = time.monotonic() - started
        return result

    def _check(self, target: TargetProcess) -> None:
        begun = time.monotonic()
        answer = target.ask("check")
        self.result.longest = max(self.result.longest, time.monotonic() - begun)
        self.result.checks += 1
        self.result.done = answer["done"]
        self.result.notes.update({text: n - self.result.notes[text] for text, n in answer["notes"].items()})

    def _settled(self, target: TargetProcess, goal: Measured | None = None) -> Measured:
        """Once the frames on their way are read and the ended connections closed, or not within 10 seconds."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        found = target.measure()
        while time.monotonic() < deadline:
            self._check(target)
            before, found = found, target.measure()
            is_still = found.descriptors >= before.descriptors and found.rss >= before.rss - 100_000
            is_reached = goal is None or (found.descriptors <= goal.descriptors and found.threads <= goal.threads)
            if is_still and is_reached:
                break
            time.sleep(0.1)
        return found

    def _send_batch(self, opened: dict[str, Any], frames: int) -> None:
        self._addresses, self._valid = opened["addresses"], [bytes.fromhex(frame) for frame in opened["valid"]]
        goal = self.result.frames + frames
        while self.result.frames < goal:
            left = goal - self.result.frames
            if self._surface == "announcement":
                self._send_datagrams(left)
            elif self._surface == "channel":
                self._send_over_channel(opened["server"], left)
            elif self._surface in _ZEROMQ and self._mutator.random.random() < 0.8:
                self._send_messages(opened, min(left, _A_CONNECTION))
            else:
                self._send_bytes(left)
        if self._surface not in ("announcement", "channel"):
            self._keep_half_open()

    def _address(self) -> tuple[str, int]:
        return split_address(self._mutator.random.choice(self._addresses))

    def _send_messages(self, opened: dict[str, Any], frames: int) -> None:
        """Over ZeroMQ; encrypted with the key of a machine that takes part, or of a stranger."""
        draw = self._mutator.random
        with self._context.socket(zmq.DEALER) as sock:
            sock.linger = 3_000
            if opened["server"]:
                # A stranger's frames are never read; one connection in ten is such a stranger's.
                known = [KeyPair(bytes.fromhex(public), bytes.fromhex(secret)) for public, secret in opened["keys"]]
                is_stranger = draw.random() < 0.1
                encrypt_to(sock, KeyPair.new() if is_stranger else known[0], bytes.fromhex(opened["server"]))
                sock.linger = 0 if is_stranger else sock.linger
                frames = 1 if is_stranger else frames
            host, port = self._address()
            sock.connect(f"tcp://{host}:{port}")
            if opened["server"] and is_stranger:
                sock.poll(20)
            self.result.connections += 1
            for _ in range(frames):
                parts = [self._mutator.frame(self._valid)]
                parts += [
                    draw.randbytes(draw.choice((0, 1, 40, 3_000))) for _ in range(draw.choice((0, 0, 0, 1, 1, 2)))
                ]
                with suppress(zmq.Again):
                    sock.send_multipart(parts, zmq.NOBLOCK)
                    self.result.frames += 1

    def _send_bytes(self, frames: int) -> None:
        """Over TCP, as ZeroMQ would send it or as the port expects it, and not quite."""
        draw, frame = self._mutator.random, self._mutator.random.choice(self._valid)
        if self._surface in _ZEROMQ:
            greeting = [CURVE_GREETING, CURVE_HELLO] if self._mode == "encrypted" else [NULL_GREETING, READY]
            session = [*greeting, *zmtp(frame, draw.randbytes(40)), *zmtp(b"")]
        else:
            session = [frame[:4], frame[4:]] if draw.random() < 0.5 else [frame]
        chunks = self._mutator.chunks(session)[:frames] or [b"\0"]
        if self._surface == "stream":  # the token itself is not sent
            chunks = [chunk[:31] for chunk in chunks]
        with socket.socket() as sock, suppress(OSError):
            sock.settimeout(5)
            sock.connect(self._address())
            self.result.connections += 1
            self.result.frames += len(chunks)
            for chunk in chunks:
                sock.sendall(chunk)
            if self._surface == "stream":  # its queue is short, and who finds it full tries again after a second only
                sock.shutdown(socket.SHUT_WR)
                sock.recv(1)
            if draw.random() < 0.3:  # a reset instead of an orderly end
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    def _send_over_channel(self, secret: str, frames: int) -> None:
        """With the channel's secret, as another rank that is not macft; the port accepts one connection."""
        draw, (host, port) = self._mutator.random, self._address()
        out = StreamOut.connect(
            f"{host}:{port}", port, bytes.fromhex(secret), _MOST_BODY, encrypted=self._mode == "encrypted"
        )
        self.result.connections += 1
        self.result.frames += frames
        if out is None:
            return
        for number in range(frames):
            # Half of the connections begin as they should.
            is_valid = number < 2 and draw.random() < 0.7
            header = self._valid[number] if is_valid else self._mutator.frame(self._valid)
            out.send(header[:_MOST_BODY], draw.randbytes(draw.choice((0, 1, 40, 1904, _MOST_BODY))))
            deadline = time.monotonic() + 1
            while out.pending and time.monotonic() < deadline:
                out.flush()
                time.sleep(0.001)
            if out.pending or out.broken_at is not None:
                break
        out.close()

    def _send_datagrams(self, frames: int) -> None:
        host, port = self._address()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(host))
            self.result.connections += 1
            for number in range(frames):
                to = ("224.0.0.251", port) if number % 2 else (host, port)
                with suppress(OSError):
                    sock.sendto(self._mutator.frame(self._valid)[:8_000], to)
                self.result.frames += 1
                if number % 100 == 99:
                    time.sleep(0.005)  # else the system drops them

    def _keep_half_open(self) -> None:
        """Connections that say little, a byte with each batch, and never go on; the oldest make room for new ones."""
        for sock in self._half_open:
            with suppress(OSError):
                sock.send(b"\xff", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        if len(self._half_open) >= _HALF_OPEN:
            for sock in self._half_open[: _HALF_OPEN // 2]:
                sock.close()
            del self._half_open[: _HALF_OPEN // 2]
        for _ in range(4):
            sock = socket.socket()
            sock.settimeout(5)
            with suppress(OSError):
                sock.connect(self._address())
                sock.sendall(self._mutator.random.choice((b"", b"\xff", NULL_GREETING[:11], NULL_GREETING)))
            self._half_open.append(sock)
