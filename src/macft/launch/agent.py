"""A rank's process on a host, started over SSH: ``python -m macft.launch.agent RUN_FOLDER RANK [--resume]``.

Its standard input is the line to the terminal that started it: ``stop`` asks for an orderly end, and so does its end,
which comes when that terminal, its machine or the connection dies. ``key HEX`` gives the key of an encrypted run.
"""

from __future__ import annotations

import os
import platform
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

from macft.cli.run_command import exit_status, run_command
from macft.config.yaml import read
from macft.errors import LaunchError
from macft.launch.hosts import run_on_hosts
from macft.logs.run_log import start_log
from macft.rendezvous.keystore import Keyring, needs_keys, run_keyring
from macft.training.stop import StopRequest

_LOG_SECONDS = 5.0
_KEY_SECONDS = 30.0
_LAST_SECONDS = 60.0
"""How long an orderly end may take once nobody listens any more."""


def main(argv: list[str]) -> int:
    """Runs one rank of the run in a folder; returns the exit status."""
    folder, rank = Path(argv[0]), int(argv[1])
    end_log = _keep_log(folder / "logs" / f"rank-{rank}.log")
    _keep_awake()
    gone = threading.Event()
    keys: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=(gone, keys), name="terminal", daemon=True).start()
    stop = StopRequest()

    def run() -> str:
        config = read(folder / "config.yaml")
        config.topology.rank = rank
        keyring = _given_keyring(keys) if needs_keys(config.topology, config.collective) else None
        with start_log(folder, rank, config.report.log_level):
            return run_on_hosts(config, folder, resume="--resume" in argv, stop=stop, keyring=keyring)

    with stop.listening(gone):
        status = run_command(lambda _: exit_status(run()), interrupted="interrupted; the newest checkpoint is kept")
    end_log()
    return status


def _given_keyring(keys: SimpleQueue[bytes]) -> Keyring:
    try:
        return run_keyring(bytes.fromhex(keys.get(timeout=_KEY_SECONDS).decode()))
    except (queue.Empty, ValueError):
        raise LaunchError("the terminal that started this node gave it no proper key for the run") from None


def _listen(gone: threading.Event, keys: SimpleQueue[bytes]) -> None:
    waiting = b""
    while piece := os.read(0, 1024):
        *lines, waiting = (waiting + piece)[-1024:].split(b"\n")
        if b"stop" in lines:
            gone.set()
        for line in lines:
            if line.startswith(b"key "):
                keys.put(line.removeprefix(b"key "))
    gone.set()
    time.sleep(_LAST_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _keep_log(path: Path) -> Callable[[], None]:
    """Sends what this process prints to ``path`` too: the terminal may go away, and the run must not care.

    Returns what sends the rest, to be called at the end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    terminal, (reading, writing) = os.dup(1), os.pipe()
    log = path.open("ab", buffering=0)
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    os.close(writing)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def copy() -> None:
        listens = True
        while piece := os.read(reading, 65536):
            log.write(piece)
            if listens:
                try:
                    os.write(terminal, piece)
                except OSError:
                    listens = False

    thread = threading.Thread(target=copy, name="log", daemon=True)
    thread.start()

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        thread.join(_LOG_SECONDS)

    return end


def _keep_awake() -> None:
    """Keeps a Mac from falling asleep while this process lives."""
    if platform.system() == "Darwin":
        nothing = subprocess.DEVNULL
        subprocess.Popen(["caffeinate", "-i", "-w", str(os.getpid())], stdin=nothing, stdout=nothing, stderr=nothing)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.exit(code)
