"""A wish to stop in every phase of a run: how soon it is answered, how soon the run ends, and what it leaves.

    python benchmarks/stopping.py --folder FOLDER [--model FOLDER] [--topologies single local hosts] [--phases NAME ...]

`local` are two nodes of `topology=local`, whose launcher gets the signal; `hosts` two processes of `topology=hosts` on
this machine's loopback, of which one gets it. Signals (SIGINT, SIGTERM, SIGHUP) take turns, so each phase sees each of
them once. A phase that a point of `macft.device.fault_points` begins is met by stopping a rank there for a moment. With
SmolLM2-135M, the default, phases last long enough on a quiet machine. For the download a stand-in of the Hugging Face
Hub sends a model that never ends. The answer is the first line that says that the run stops or was interrupted. What
the terminals showed is in FOLDER/terminals.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from harness.edges import Terminal
from harness.runs import command, events, on_hosts, write_jsonl
from harness.slow_hub import SlowHub, slow_hub
from macft.report.run_folder import RunFolder

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TOPOLOGIES = ("single", "local", "hosts")
_ANSWERS = ("stopping:", "interrupted")
_LONGEST = 180.0
_INTO_PHASE_SECONDS = 0.3
_LOOK_SECONDS = 0.02


@dataclass(frozen=True)
class Phase:
    """When the signal comes: at what is found ``in`` (seconds, output, log, point, steps, download)."""

    name: str
    found_in: str
    what: str
    more: tuple[str, ...] = ()
    topologies: tuple[str, ...] = TOPOLOGIES
    # Nodes started by hand have not met, and those without a wish would go on waiting.
    is_before_meeting: bool = False


MANY_ROWS, MANY_STEPS = ("training.eval_rows=-1",), ("training.batch_size=16", "training.steps=1000")
SCORED = ("dataset.metric=exact_match", "training.metric_rows=24", "training.metric_max_tokens=200")
PHASES = (
    Phase("Python starts", "seconds", "0.15", is_before_meeting=True),
    Phase("starting", "output", "· starting", is_before_meeting=True),
    Phase("download", "download", "", ("model=org/slow",)),
    Phase("nodes meet", "output", "waiting for", topologies=("local", "hosts"), is_before_meeting=True),
    Phase("rows are tokenized", "log", "tokenizing"),
    Phase("the model is loaded", "log", "loading the model"),
    Phase("first validation", "point", "validation", MANY_ROWS),
    Phase("scoring before", "output", "answering, before", SCORED),
    Phase("a step", "steps", "1", MANY_STEPS),
    Phase("later validation", "steps", "2", (*MANY_ROWS, *MANY_STEPS, "training.eval_every=2")),
    Phase("a checkpoint", "point", "checkpoint"),
    Phase("the adapter is written", "point", "export"),
    Phase("scoring after", "point", "scoring", SCORED),
    Phase("farewell", "point", "farewell"),
)


@dataclass
class Found:
    """What came of a wish; seconds are from the signal on."""

    answered: float | None
    ended: float
    statuses: list[int]
    answer: str
    left: str


def main() -> None:
    """Makes the runs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--topologies", nargs="+", choices=TOPOLOGIES, default=TOPOLOGIES)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--phases", nargs="+", choices=[phase.name for phase in PHASES])
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    basics = [f"model={options.model}", *prepare(folder)]
    print("| phase | topology | signal | answered | ended | status | left | answer |")
    print("| --- | --- | --- | ---: | ---: | --- | --- | --- |", flush=True)
    with slow_hub() as hub:
        for number, phase in enumerate(PHASES):
            for place, topology in enumerate(TOPOLOGIES):
                if topology not in options.topologies or topology not in phase.topologies:
                    continue
                if options.phases and phase.name not in options.phases:
                    continue
                wish = SIGNALS[(number + place) % len(SIGNALS)]
                found = stopped(folder, basics, phase, topology, wish, hub)
                answered = "no" if found.answered is None else f"{found.answered:.2f} s"
                print(
                    f"| {phase.name} | {topology} | {wish.name} | {answered} | {found.ended:.2f} s "
                    f"| {', '.join(map(str, found.statuses))} | {found.left} | {found.answer} |",
                    flush=True,
                )


def prepare(folder: Path) -> list[str]:
    """Rows enough for seconds of tokenizing and validating, and the overrides of a short run on them."""
    rows = [{"prompt": f"Repeat: {n} red river", "completion": f"{n} red river " * (1 + n % 40)} for n in range(6000)]
    for name, part in (("train", rows), ("valid", rows[:400]), ("test", rows[:100])):
        write_jsonl(folder / "data" / f"{name}.jsonl", part)
    return [
        f"dataset={folder / 'data'}",
        "adapter.num_layers=2",
        "training.batch_size=4",
        "training.steps=3",
        "training.eval_every=3",
        "training.eval_rows=4",
        "training.metric_rows=0",
        "training.save_every=2",
        "report.tensorboard=false",
        "report.samples=0",
        "topology.start_timeout=60",
    ]


def stopped(
    folder: Path, basics: Sequence[str], phase: Phase, topology: str, wish: signal.Signals, hub: SlowHub
) -> Found:
    """A run of ``topology`` that gets ``wish`` in ``phase``."""
    where = folder / f"{phase.name.replace(' ', '-')}-{topology}"
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir(parents=True)
    variables = {"HF_HOME": str(folder / "hf")}
    if phase.found_in == "download":
        hub.is_downloading.clear()
        variables |= hub.variables
    if phase.found_in == "point":
        variables["MACFT_FAULT"] = f"{phase.what}:0:stop"
    if topology == "local" and phase.found_in == "output" and phase.what == "waiting for":
        variables["MACFT_FAULT"] = "rendezvous:1:stop"
    words = {"single": ["topology=single"], "local": ["topology=local"]}.get(topology)
    if words is not None:
        lines = [[*words, f"hydra.run.dir={where / '0'}"]]
    else:
        lines = on_hosts(where)[: 1 if phase.is_before_meeting else 2]
    terminals = [Terminal(command(*basics, *phase.more, *words), where, variables) for words in lines]
    try:
        _await(phase, terminals, where, hub)
        return _wish(terminals, where, wish)
    finally:
        output = "\n".join(terminal.output for terminal in terminals)
        (folder / "terminals").mkdir(exist_ok=True)
        (folder / "terminals" / f"{where.name}.txt").write_text(output)


def _await(phase: Phase, terminals: Sequence[Terminal], where: Path, hub: SlowHub) -> None:
    """Until the phase has begun on the first terminal."""
    first = terminals[0]
    if phase.found_in == "seconds":
        time.sleep(float(phase.what))
        return

    def logs() -> str:
        return "".join(log.read_text(errors="replace") for log in where.glob("0/logs/*.log"))

    def stopped_one() -> psutil.Process | None:
        for process in _family(first):
            if process.status() == psutil.STATUS_STOPPED:
                return process
        return None

    begun: dict[str, Callable[[], object]] = {
        "output": lambda: phase.what in first.output,
        "log": lambda: phase.what in logs(),
        "steps": lambda: len(events(where / "0", "step_done")) >= int(phase.what),
        "download": hub.is_downloading.is_set,
        "point": stopped_one,
    }
    deadline = time.monotonic() + _LONGEST
    while not begun[phase.found_in]():
        assert all(terminal.process.poll() is None for terminal in terminals), first.output
        assert time.monotonic() < deadline, first.output
        time.sleep(_LOOK_SECONDS)
    if phase.found_in == "point" and (process := stopped_one()) is not None:
        process.send_signal(signal.SIGCONT)
    if phase.found_in in ("point", "steps", "log", "download"):
        time.sleep(_INTO_PHASE_SECONDS)


def _wish(terminals: Sequence[Terminal], where: Path, wish: signal.Signals) -> Found:
    """Sends ``wish`` to the first terminal's process and waits for the end of all."""
    family = {process.pid: process for terminal in terminals for process in _family(terminal)}
    began = time.monotonic()
    terminals[0].process.send_signal(wish)
    ended: dict[int, float] = {}
    while len(ended) < len(terminals) and time.monotonic() < began + _LONGEST:
        for terminal in terminals:
            if terminal.process.pid not in ended and terminal.process.poll() is not None:
                ended[terminal.process.pid] = time.monotonic() - began
        family |= {process.pid: process for terminal in terminals for process in _family(terminal)}
        time.sleep(_LOOK_SECONDS)
    alive = [process for process in psutil.wait_procs(list(family.values()), timeout=1)[1] if process.is_running()]
    for process in alive:
        process.kill()
    for terminal in terminals:
        terminal.close()
    answers = [line for line in terminals[0].lines if line[0] >= began and any(text in line[1] for text in _ANSWERS)]
    left = _left(where)
    if alive:
        left = f"{left}, {len(alive)} PROCESSES"
    return Found(
        answered=answers[0][0] - began if answers else None,
        ended=max(ended.values(), default=_LONGEST),
        statuses=[terminal.process.returncode for terminal in terminals],
        answer=answers[0][1] if answers else "",
        left=left,
    )


def _left(where: Path) -> str:
    """What is in the run folders, in words: nothing, or a run that can go on; anything else in capitals."""
    texts = []
    for place in sorted(path for path in where.iterdir() if path.name.isdecimal()):
        folder, found = RunFolder(place), []
        if folder.has_checkpoint:
            found.append(f"checkpoint of step {max(int(each.name[5:]) for each in folder.checkpoints.glob('step-*'))}")
        if (folder.adapters / "adapters.safetensors").is_file():
            found.append("adapter")
        if not folder.config.is_file():
            found.append(f"NO RUN: {', '.join(sorted(path.name for path in place.iterdir()))}")
        if unfinished := [path.name for path in place.rglob(".*") if path.name != ".hydra"]:
            found.append(f"UNFINISHED: {', '.join(unfinished)}")
        if _is_locked(place):
            found.append("LOCKED")
        texts.append(" and ".join(found) or "an empty run")
    return "; ".join(texts) or "nothing"


def _is_locked(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _family(terminal: Terminal) -> list[psutil.Process]:
    try:
        process = psutil.Process(terminal.process.pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


if __name__ == "__main__":
    sys.exit(main())
