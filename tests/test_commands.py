"""The commands as programs: ``macft NAME``, ``python -m macft NAME``, ``python -m macft.NAME``; their exit status."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import macft
from harness.runs import environment, losses
from macft.cli.commands import COMMANDS
from macft.cli.run_command import exit_status, run_command
from macft.errors import CollectiveError, ConfigError

ROOT = Path(macft.__file__).parent
MODULES = {path.stem for path in ROOT.glob("*.py")} - {"__init__", "__main__", "errors"}
MODULES |= {path.parent.name for path in ROOT.glob("*/__main__.py")}


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """``macft``, as pip writes it for the entry point."""
    path = tmp_path_factory.mktemp("bin") / "macft"
    path.write_text("import sys\nfrom macft.cli.main import main\nif __name__ == '__main__':\n    sys.exit(main())\n")
    return [sys.executable, str(path)]


def call(command: Sequence[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120, check=False)


def test_the_table_of_commands_is_complete() -> None:
    assert set(COMMANDS) == MODULES


def test_macft_alone_lists_the_commands_without_importing_any(script: list[str]) -> None:
    done = call(script)
    assert done.returncode == 0
    for name, description in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(description)}$", done.stdout, re.M)
    check = "import runpy, sys\ntry: runpy.run_module('macft')\nexcept SystemExit: pass\n"
    check += "from macft.cli.main import _list_commands\n_list_commands([])\n"
    check += "print(sorted({'mlx', 'numpy', 'hydra', 'rich', 'transformers'} & set(sys.modules)))"
    assert call([sys.executable, "-c", check]).stdout.endswith("\n[]\n")


def test_version_is_macfts(script: list[str]) -> None:
    assert call([*script, "--version"]).stdout == f"{macft.__version__}\n"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("trian", "did you mean macft train?"),
        ("+recipe=smoke", "did you mean macft train +recipe=smoke?"),
        ("topology.hosts=[a,b]", "did you mean macft train 'topology.hosts=[a,b]'?"),
        ("xyzzy", "the commands are train, data, plan,"),
    ],
)
def test_an_unknown_command_is_one_line(script: list[str], word: str, hint: str) -> None:
    done = call([*script, word])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: no command '{word}'; ")
    assert hint in done.stderr
    assert done.stderr.count("\n") == 1


def test_flags_of_other_trainers_are_translated(script: list[str]) -> None:
    done = call([*script, "--iters", "600"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --iters: overrides are written key=value: training.steps=600\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["keys", "data"])  # a module, and a package
def test_help_names_the_program_as_it_was_started(script: list[str], name: str) -> None:
    for command, program in (
        ([*script, name], f"macft {name}"),
        ([sys.executable, "-m", "macft", name], f"python -m macft {name}"),
        ([sys.executable, "-m", f"macft.{name}"], f"python -m macft.{name}"),
    ):
        assert call([*command, "--help"]).stdout.startswith(f"usage: {program} ")
        wrong = call([*command, *(["builtin:sql"] if name == "data" else []), "--nonsense"])
        assert wrong.returncode == 2
        assert wrong.stderr == f"error: unrecognized arguments: --nonsense; see {program} --help\n"


@pytest.mark.slow
def test_train_is_the_same_however_it_is_started(script: list[str], tmp_path: Path) -> None:
    commands = ([*script, "train"], [sys.executable, "-m", "macft", "train"], [sys.executable, "-m", "macft.train"])
    jobs = [call([*command, "+recipe=smoke", "training.steps=3", "--cfg", "all"], tmp_path) for command in commands]
    assert [job.returncode for job in jobs] == [0, 0, 0], jobs[0].stderr
    # The resolved configuration, with Hydra's own part: the job's name and where its folders are.
    same = [re.sub(r"(?m)^ *(dir|output_dir|id|cwd|path): .*\n", "", job.stdout) for job in jobs]
    assert same[0] == same[1] == same[2]
    assert "name: train" in same[0]
    wrong = call([*script, "train", "+recipe=smoke", "training.stepz=3"], tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: training.stepz: no such key; did you mean training.steps?\n"
    assert "  macft train +recipe=llama-lora\n" in call([*script, "train", "--help"]).stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_sweep_started_by_macft_has_a_folder_for_each_job(
    script: list[str], tmp_path: Path, tiny_task: list[str]
) -> None:
    short = ["training.batch_size=4", "training.steps=1", "training.eval_every=0", "training.save_every=0"]
    done = call([*script, "train", "-m", *tiny_task, *short, "adapter.rank=2,4"], tmp_path)
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "multirun" / "run").iterdir()
    assert [len(losses(sweep / job)) for job in ("0", "1")] == [1, 1]


@pytest.mark.slow
def test_a_closed_pipe_ends_a_command_quietly(script: list[str]) -> None:
    command, pipe = [*script, "train", "--help"], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment(), text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 1


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (ConfigError("a: is wrong\nb: too"), 2, "error: a: is wrong\nerror: b: too\n"),
        (CollectiveError("rank 1 failed"), 1, "error: rank 1 failed\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_an_error_is_a_line_and_an_exit_status(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, lines: str
) -> None:
    def main(argv: Sequence[str]) -> None:
        assert list(argv) == ["x"]
        raise error

    assert run_command(main, ["x"], interrupted=lambda: "stopped") == status
    assert capsys.readouterr() == ("", lines)


def test_what_main_returns_is_the_exit_status() -> None:
    assert run_command(lambda _: None, []) == 0
    assert run_command(lambda _: 1, []) == 1
    assert [exit_status(reason) for reason in ("finished", "early_stopped", "interrupted")] == [0, 0, 130]


def test_a_broken_connection_is_not_taken_for_a_closed_pipe() -> None:
    def main(_: Sequence[str]) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_command(main, [])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_while_python_closes_down_changes_no_status(name: str) -> None:
    script = (
        "import os, signal, sys\n"
        "from macft.cli.run_command import run_command\n"
        "class Late:\n"
        f"    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.{name}): kill(pid, number)\n"
        "late = Late()\n"
        "sys.exit(run_command(lambda _: 7, []))\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_signal_that_ends_a_command_ends_it_in_order(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    cleaned = []

    def work(_: Sequence[str]) -> None:
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            cleaned.append(number)

    try:
        assert run_command(work, []) == 130
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert cleaned == [number]
    assert capsys.readouterr().err == "interrupted\n"
