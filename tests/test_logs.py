"""Each rank's log file: who may write there, what a line holds, and that the console stays as it is."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from harness.runs import train
from macft.logs.run_log import log_context, log_path, start_log

LINE = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}) (?P<level>[A-Z]+) +(?P<logger>macft\.\w+) "
    r"rank=(?P<rank>\d+|-) generation=(?P<generation>\d+|-) step=(?P<step>\d+|-) (?P<message>.*)"
)


def lines(path: Path) -> list[dict[str, str]]:
    """The lines of a log by field; each must have all of them."""
    matches = [(line, LINE.fullmatch(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line for line, match in matches if match is None] == []
    return [match.groupdict() for _, match in matches if match is not None]


def test_lines_carry_rank_generation_and_step_from_any_thread(tmp_path: Path) -> None:
    with start_log(tmp_path, 1, "info"):
        logging.getLogger("macft.ring").info("first")
        log_context.update(generation=2, step=17)
        thread = threading.Thread(target=lambda: logging.getLogger("macft.checkpoint").warning("saved %s", "x"))
        thread.start()
        thread.join()
        logging.getLogger("macft.ring").debug("too much")
    logging.getLogger("macft.ring").error("the file is closed")
    first, second = lines(log_path(tmp_path, 1))
    assert [first[name] for name in ("level", "logger", "rank", "generation", "step", "message")] == [
        "INFO", "macft.ring", "1", "-", "-", "first",
    ]  # fmt: skip
    assert [second[name] for name in ("level", "logger", "rank", "generation", "step", "message")] == [
        "WARNING", "macft.checkpoint", "1", "2", "17", "saved x",
    ]  # fmt: skip


CONSOLE = """
import logging, sys
from pathlib import Path
from macft.logs.run_log import console_logger, start_log
console_logger("macft.model")
if sys.argv[2] == "hydra":
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(name)s %(message)s")
folder = Path(sys.argv[1])
for name in ("macft.thermal", "macft.model.fetch.bundled", "other"):
    logging.getLogger(name).warning("before")
with start_log(folder, 0, "error"):
    for name in ("macft.thermal", "macft.model.fetch.bundled", "other"):
        logging.getLogger(name).info("info")
        logging.getLogger(name).warning("warning")
    logging.getLogger("macft.thermal").error("error")
for name in ("macft.thermal", "macft.model.fetch.bundled", "other"):
    logging.getLogger(name).warning("after")
"""


@pytest.mark.parametrize("kind", ["hydra", "plain"])
def test_the_console_shows_what_it_would_without_a_log(tmp_path: Path, kind: str) -> None:
    command = [sys.executable, "-c", CONSOLE, str(tmp_path), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    around = ["before", "before", "before"], ["after", "after", "after"]
    if kind == "hydra":  # other libraries as ever; of macft only that a model can't be found or is damaged
        assert [line.split()[-1] for line in done.stdout.splitlines()] == [
            *around[0], "warning", "info", "warning", *around[1],
        ]  # fmt: skip
        assert "macft.thermal warning" not in done.stdout
        assert "macft.model.fetch.bundled warning" in done.stdout
    else:  # Python's last resort: warnings on stderr, of the console's logger and of other libraries
        assert done.stderr.split() == ["before", "before", "warning", "warning", "after", "after"]
    assert [line["message"] for line in lines(log_path(tmp_path, 0))] == ["error"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_that_cannot_be_written_costs_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = log_path(tmp_path / "full", 0)
    path.parent.mkdir(parents=True)
    path.symlink_to("/dev/full")
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "full", tmp_path / "file"):
        with start_log(folder, 0, "info"):
            for number in range(3):
                logging.getLogger("macft.ring").info("line %d", number)
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        f"warning: no log in {path}, the run goes on: No space left on device",
        f"warning: no log in {log_path(tmp_path / 'file', 0)}, the run goes on: Not a directory",
    ]


@pytest.mark.slow
def test_each_rank_of_a_run_has_its_log(tmp_path: Path, tiny_task: list[str]) -> None:
    settings = [
        *tiny_task,
        "training.steps=4",
        "training.batch_size=4",
        "training.save_every=2",
        "training.eval_every=2",
        "report.log_level=debug",
        "topology=local",
    ]
    folder = tmp_path / "run"
    done = train(*settings, f"hydra.run.dir={folder}", cwd=tmp_path)
    assert done.status == 0, done.errors
    assert "macft." not in done.output.replace("python -m macft.generate", "")
    for rank in (0, 1):
        log = lines(log_path(folder, rank))
        assert {line["rank"] for line in log} == {str(rank)}
        assert {line["logger"] for line in log} >= {"macft.thermal", "macft.run", "macft.rendezvous", "macft.ring"}
        assert ("macft.checkpoint" in {line["logger"] for line in log}) == (rank == 0)
        assert sum(line["message"].startswith(f"ring formed: rank {rank} of 2") for line in log) == 1
        steps = [line for line in log if line["message"].startswith("loss ")]
        assert [(line["generation"], line["step"]) for line in steps] == [("0", str(step)) for step in range(1, 5)]
    saved = [line["message"].split(":")[0] for line in lines(log_path(folder, 0)) if "saved" in line["message"]]
    assert saved == ["saved step-00000002", "saved step-00000004"]
    launcher = [line["message"] for line in lines(log_path(folder, "launcher"))]
    assert [text.split(",")[0] for text in launcher if "started" in text] == ["rank 0 started", "rank 1 started"]
    assert any(text.startswith("all 2 ranks have met") for text in launcher)
    assert sum("ended with status 0" in text for text in launcher) == 2
