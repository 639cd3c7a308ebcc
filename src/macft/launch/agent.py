"""A rank's process on a host, started over SSH: ``python -m macft.launch.agent RUN_FOLDER RANK [--resume]``.

The terminal that started it writes commands to its standard input: ``stop`` stops the run cleanly, a second one at
once, ``key HEX`` gives the key of an encrypted run, ``lost NAME`` says that another node has ended, which this one need
not wait for if it has not met all. When standard input ends, because that terminal, its machine or the
connection is gone, the run is stopped cleanly too.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

from macft.cli.run_command import exit_status, run_command
from macft.config.yaml import read
from macft.device.awake import keep_awake
from macft.errors import LaunchError
from macft.launch.run_on_hosts import run_on_hosts
from macft.logs.run_log import start_log
from macft.rendezvous.keystore import Keyring, needs_keys, run_keyring
from macft.report.phase_lines import printed_phases
from macft.report.run_folder import RunFolder
from macft.run.claim import after_interrupt
from macft.training.stop_request import StopRequest

_LOG_SECONDS = 5.0
_KEY_SECONDS = 30.0
_STOP_SECONDS = 60.0
"""How long a clean stop may take after standard input has ended."""
_log = logging.getLogger("macft.launch")


def main(argv: list[str]) -> int:
    """Runs one rank of the run in a folder; returns the exit status."""
    folder, rank = Path(argv[0]), int(argv[1])
    close_log = _copy_output_to(folder / "logs" / f"rank-{rank}.log")
    keep_awake()
    stop = StopRequest(farewell=lambda: after_interrupt(folder))
    keys: SimpleQueue[bytes] = SimpleQueue()
    has_met = threading.Event()

    def lost(name: str) -> None:
        if not has_met.is_set():
            stop.give_up(LaunchError(f"{name} has ended before all nodes had met"))

    def run() -> str:
        with stop.listening():  # from now on the terminal's commands can end what the main thread does
            threading.Thread(target=_read_commands, args=(stop, keys, lost), name="terminal", daemon=True).start()
            config = read(RunFolder(folder).proposed)
            config.topology.rank = rank
            keyring = _receive_keyring(keys) if needs_keys(config.topology, config.collective) else None
            with (
                start_log(folder, rank, config.report.log_level),
                printed_phases(is_shown=config.report.console) as phases,
            ):
                resume = "--resume" in argv
                return run_on_hosts(
                    config, folder, resume=resume, stop=stop, phases=phases, keyring=keyring, on_met=has_met.set
                )

    status = run_command(lambda _: exit_status(run()), interrupted=lambda: after_interrupt(folder))
    close_log()
    return status


def _receive_keyring(keys: SimpleQueue[bytes]) -> Keyring:
    try:
        return run_keyring(bytes.fromhex(keys.get(timeout=_KEY_SECONDS).decode()))
    except (queue.Empty, ValueError):
        raise LaunchError("the terminal that started this node sent it no valid key for the run") from None


def _read_commands(stop: StopRequest, keys: SimpleQueue[bytes], lost: Callable[[str], None]) -> None:
    incomplete = b""
    while piece := os.read(0, 1024):
        *lines, incomplete = (incomplete + piece)[-1024:].split(b"\n")
        for _ in range(lines.count(b"stop")):  # the second one quits
            _log.info("the terminal asks to stop")
            stop.request()
        for line in lines:
            if line.startswith(b"key "):
                keys.put(line.removeprefix(b"key "))
            if line.startswith(b"lost "):
                lost(line.removeprefix(b"lost ").decode(errors="replace"))
    _log.info("the terminal is gone; stopping")
    stop.request(may_quit=False)
    time.sleep(_STOP_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _copy_output_to(path: Path) -> Callable[[], None]:
    """Copies the output of this process to ``path``, so that the run continues when the terminal is gone.

    Returns a function that flushes the output, to be called at the end.
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
        has_terminal = True
        while piece := os.read(reading, 65536):
            log.write(piece)
            if has_terminal:
                try:
                    os.write(terminal, piece)
                except OSError:
                    has_terminal = False

    thread = threading.Thread(target=copy, name="log", daemon=True)
    thread.start()

    def close() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        thread.join(_LOG_SECONDS)

    return close


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.exit(code)
