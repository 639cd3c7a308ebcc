"""A wish to stop means the same however and whenever it comes, and is answered at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mlx.nn as nn
import numpy as np
import pytest

import macft
from harness.runs import (
    adapter,
    environment,
    losses,
    on_hosts,
    ranks,
    read_line,
    same_bits,
    start,
    train,
    wait_for_step,
)
from helpers.members import Node
from helpers.waiting import wait_until
from macft.collective.solo import Solo
from macft.data.formats import Row
from macft.launch.local import StopWish, rank_status
from macft.membership.paxos import View
from macft.model.execution import Execution
from macft.parallel.shares import DataShard
from macft.rendezvous.server import RendezvousServer
from macft.report.events import Evaluated, Event
from macft.training.batch_layout import DeviceBatch
from macft.training.stop_request import Stopped
from macft.training.validation import validation_loss

LINE = "stopping: all is saved; Ctrl-C again quits now\n"

SCRIPT = """
import hashlib, sys, time
from macft.training.stop_request import StopRequest, announce
stop = StopRequest(announce, farewell=lambda: "quit")
with stop.listening():
    if sys.argv[1] != "undeferred":
        stop.defer("all is saved")
    try:
        print("ready", flush=True)
        if sys.argv[1] == "busy":  # in one call that no signal ends
            hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 1)
        while not (stop.requested and sys.argv[1] == "once"):
            time.sleep(0.01)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(130)
print("stopped", flush=True)
"""


def process(how: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", SCRIPT, how]
    made = subprocess.Popen(
        argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert read_line(made.stdout) == "ready\n"
    return made


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_wish_is_answered_and_met_later(number: signal.Signals) -> None:
    with process("once") as made:
        made.send_signal(number)
        output, errors = made.communicate(timeout=60)
    assert (made.returncode, output, errors) == (0, "stopped\n", LINE)


def test_the_second_wish_quits_and_a_closed_terminal_is_one_wish() -> None:
    with process("on") as made:
        made.send_signal(signal.SIGHUP)
        assert read_line(made.stderr) == LINE
        made.send_signal(signal.SIGHUP)  # the kernel and the shell both send it
        made.send_signal(signal.SIGTERM)
        output, errors = made.communicate(timeout=60)
    assert (made.returncode, output, errors) == (130, "interrupted\n", "")


def test_before_there_is_anything_to_save_the_first_wish_quits() -> None:
    with process("undeferred") as made:
        made.send_signal(signal.SIGINT)
        output, errors = made.communicate(timeout=60)
    assert (made.returncode, output, errors) == (130, "interrupted\n", "")


def test_a_long_call_is_no_reason_not_to_answer_or_to_stay() -> None:
    with process("busy") as made:
        made.send_signal(signal.SIGINT)
        assert read_line(made.stderr) == LINE
        made.send_signal(signal.SIGINT)
        output, errors = made.communicate(timeout=60)
    assert (made.returncode, output, errors) == (130, "", "quit\n")


def test_all_members_learn_of_a_wish_even_from_one_that_quits() -> None:
    nodes = [Node(f"n{rank}", None) for rank in range(3)]
    try:
        view = View(0, tuple(node.membership.own for node in nodes))
        for node in nodes:
            node.enter(view, b"secret of this run")
        first, second, third = [node.ring for node in nodes]
        assert first is not None
        assert second is not None
        assert third is not None
        assert not second.stop_wanted
        assert not third.stop_wanted
        first.tell_stop(lambda: True)
        wait_until(lambda: second.stop_wanted)
        nodes[0].close()
        wait_until(lambda: third.stop_wanted)
    finally:
        for node in nodes:
            node.close()


class _Losses:
    """Counts batches instead of computing them."""

    count = 0

    def of_batches(
        self, batches: Sequence[Sequence[DeviceBatch]], stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[list[float]]:
        for parts in batches:
            if stopped():
                return
            self.count += 1
            yield [1.0 for _ in parts]


def test_a_validation_stops_between_two_batches() -> None:
    rows = [Row(np.array([1, 2, 3, 4], np.int32), 1) for _ in range(64)]
    counted = _Losses()
    with pytest.raises(Stopped):
        validation_loss(
            nn.Linear(1, 1),
            counted,
            Execution("cpu", "mlx", "float32", evaluation_rows=4),
            rows,
            Solo(),
            shard=DataShard(0, 1),
            progress=lambda *_: None,
            stopped=lambda: counted.count == 2,
        )
    assert counted.count == 2


def test_a_rank_that_the_wish_has_ended_has_not_failed() -> None:
    """It comes again while a rank's Python is closing down, which can't handle signals any more."""
    server = RendezvousServer("127.0.0.1:0", world_size=2, run_id="x", must_match={}, timeout=1.0)
    with subprocess.Popen(["sleep", "60"]) as process:
        wish = StopWish([process], server, None)
        assert rank_status(process, wish) is None
        wish.count = 1
        wish.pass_on()
        process.wait()
        assert rank_status(process, wish) == 130
    with subprocess.Popen(["sleep", "60"]) as process:
        process.terminate()
        process.wait()
        assert rank_status(process, StopWish([process], server, None)) == -signal.SIGTERM
    server.close()


# Whole runs.


@pytest.fixture(scope="module")
def basics(tiny_task: list[str]) -> list[str]:
    return [
        *tiny_task,
        "training.batch_size=6",
        "training.steps=100000",
        "training.eval_every=0",
        "training.save_every=0",
        "training.export=last",
        "optimizer.schedule=constant",
        "report.tensorboard=false",
    ]


def test_before_the_first_step_nothing_is_said_to_be_saved(
    tmp_path: Path, basics: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    told = ""

    def interrupt(event: Event) -> None:
        nonlocal told
        if isinstance(event, Evaluated):
            os.kill(os.getpid(), signal.SIGINT)
            while not told.endswith("quits now\n"):
                told += capfd.readouterr().err

    config = macft.compose("smoke", [*basics, "training.eval_every=1", "report.console=false"])
    run = macft.fit(config, folder=tmp_path / "run", callbacks=[interrupt])
    assert told == "stopping: no step was made yet, so there is nothing to save; Ctrl-C again quits now\n"
    assert run.reason == "interrupted"


def assert_can_be_tried(folder: Path) -> None:
    """The run was stopped after its last step, and this state was saved and exported."""
    summary = json.loads((folder / "summary.json").read_text())
    made = len(losses(folder))
    assert (summary["reason"], summary["steps"]) == ("interrupted", made)
    assert (folder / "checkpoints" / f"step-{made:08d}").is_dir()
    assert adapter(folder)


@pytest.mark.slow
def test_a_closed_terminal_saves_what_can_be_tried_and_gone_on_with(tmp_path: Path, basics: list[str]) -> None:
    folder = tmp_path / "run"
    process = start(*basics, f"hydra.run.dir={folder}", cwd=tmp_path)
    wait_for_step(process, folder, 3)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert errors.startswith("stopping: the current step is finished, then the state and the adapter are saved;")
    assert_can_be_tried(folder)
    stopped = adapter(folder)
    made = len(losses(folder))
    done = train(f"+resume={folder}", f"training.steps={made + 1}", cwd=tmp_path)
    assert done.status == 0, done.errors
    assert not same_bits(adapter(folder), stopped)


@pytest.mark.slow
def test_ctrl_c_twice_is_no_lost_node(tmp_path: Path, basics: list[str]) -> None:
    process = start(*basics, "topology=local", f"hydra.run.dir={tmp_path}", cwd=tmp_path)
    wait_for_step(process, tmp_path, 3)
    running = ranks(process)
    process.send_signal(signal.SIGSTOP)  # so that both are there at the same time
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130, errors
    assert "stopping: the nodes save what there is to save; Ctrl-C again quits now" in errors
    assert not any(rank.is_running() for rank in running.values())
    assert not (tmp_path / "adapters").exists() or json.loads((tmp_path / "summary.json").read_text())["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("point", ["rendezvous", "load"])
def test_ctrl_c_while_ranks_start(tmp_path: Path, basics: list[str], point: str) -> None:
    variables = {"MACFT_FAULT": f"{point}:1:launcher-int"}
    process = start(*basics, "topology=local", f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path, variables=variables)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted; no checkpoint had been saved"


@pytest.mark.slow
def test_the_other_hosts_stop_too_if_the_one_that_wants_it_quits(tmp_path: Path, basics: list[str]) -> None:
    # Steps long enough that the wish is known before its step ends.
    slow = [*basics, "training.batch_size=40", "training.micro_batch_size=1"]
    first, second = (start(*slow, *own, cwd=tmp_path) for own in on_hosts(tmp_path))
    wait_for_step(first, tmp_path / "0")
    first.send_signal(signal.SIGINT)
    while not read_line(first.stderr).startswith("stopping: "):
        assert first.poll() is None
    first.send_signal(signal.SIGINT)
    for process in (first, second):
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 130, errors
