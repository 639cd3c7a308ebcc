"""Tab completion, in the table and typed in real shells."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from harness.runs import environment
from helpers.names import NASTY
from macft.completion import candidates as completion
from macft.completion.candidates import candidates
from macft.completion.command import main
from macft.completion.scripts import SCRIPTS, install_path
from macft.errors import ConfigError

PROGRAM = """#!/bin/sh
[ "$1" = completion ] && exec {python} -m macft "$@"
for word; do printf '<%s>' "$word"; done
printf 'END\\n'
"""
"""Answers the shell's questions as macft does; otherwise it shows the words it was called with."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two runs, a dataset, and a cluster of the user's own."""
    for run in ("llama-lora/2026-01-31_12-00-00", "smoke/2026-02-01_08-00-00"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "config.yaml").touch()
    (tmp_path / "my data").mkdir()
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / ".hidden").touch()
    (tmp_path / "own" / "topology").mkdir(parents=True)
    (tmp_path / "own" / "topology" / "desk.yaml").write_text('# The cluster "desk".\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MACFT_CONFIG", str(tmp_path / "own"))
    return tmp_path


def words(line: str) -> list[str]:
    return [word for word, _ in candidates(line)]


# What can follow


def test_the_table_is_that_of_the_commands_and_of_the_schema() -> None:
    made = [sys.executable, "-c", "from macft.completion.make_table import make_table; print(make_table(), end='')"]
    done = subprocess.run(made, capture_output=True, text=True, check=True, env=environment(), timeout=120)
    assert done.stdout == completion.TABLE.read_text(), "run: python -m macft.completion.make_table"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("macft tra", ["train"]),
        ("macft --v", ["--version"]),
        ("macft train +rec", ["+recipe="]),
        ("macft train +recipe=smo", ["+recipe=smoke"]),
        ("macft train training.st", ["training.steps="]),
        ("macft train thermal.simulated.am", ["thermal.simulated.ambient="]),
        ("macft train therm", ["thermal=", "thermal."]),
        ("macft train report.log_level=w", ["report.log_level=warning"]),
        ("macft train training.recompute=b", ["training.recompute=blocks"]),
        ("macft train topology=d", ["topology=desk"]),
        ("macft train --cf", ["--cfg"]),
        ("macft plan adapter=lo", ["adapter=lora"]),
        ("macft plan --ch", ["--chips"]),
        ("macft train +resume=", ["+resume=runs/smoke/2026-02-01_08-00-00"]),
        ("macft generate ", ["runs/smoke/2026-02-01_08-00-00", "runs/llama-lora/2026-01-31_12-00-00"]),
        ("macft generate runs/l", ["runs/llama-lora/2026-01-31_12-00-00"]),
        ("macft evaluate --split t", ["test", "train"]),
        ("macft evaluate --dataset ro", ["rows.jsonl"]),
        ("macft train dataset=ro", ["dataset=rows.jsonl"]),
        ("macft cluster l", ["list"]),
        ("macft cluster init --no", ["--nodes"]),
        ("macft doctor --topology de", ["desk"]),
        ("macft generate my", ["my data/"]),
        ("macft completion z", ["zsh"]),
        ("macft train 'topology.hosts=[a", []),
        ("macft nothing ", []),
    ],
)
def test_what_can_follow(line: str, expected: list[str]) -> None:
    found = words(line)
    assert found[: len(expected)] == expected or sorted(found) == sorted(expected)
    if not line.endswith(("=", " ")):
        assert sorted(found) == sorted(expected)


def test_the_newest_run_is_offered_once(folder: Path) -> None:
    newest = folder / "runs/smoke/2026-02-01_08-00-00"
    (newest / ".hydra").mkdir()
    (newest / ".hydra" / "config.yaml").touch()
    (folder / "runs/latest").symlink_to(newest)
    assert words("macft generate runs/la") == ["runs/latest"]


@pytest.mark.usefixtures("folder")
def test_hidden_files_are_offered_only_to_who_asks() -> None:
    assert ".hidden" not in words("macft fuse --save-path ")
    assert words("macft fuse --save-path .h") == [".hidden"]


def test_a_tab_loads_nothing_that_takes_long() -> None:
    script = (
        "import sys; sys.argv = ['macft', 'completion', '--words', 'macft train training.st']\n"
        "import runpy\n"
        "try: runpy.run_module('macft', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print({'mlx', 'numpy', 'hydra', 'omegaconf', 'yaml', 'rich', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.splitlines()[0].split("\t")[0] == "training.steps="
    assert done.stdout.splitlines()[-1] == "set()"


# Shells


@pytest.fixture
def typed(folder: Path, request: pytest.FixtureRequest) -> Typed:
    shell = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    (folder / "bin").mkdir()
    (folder / "bin" / "macft").write_text(PROGRAM.format(python=sys.executable))
    (folder / "bin" / "macft").chmod(0o755)
    (folder / "script").write_text(SCRIPTS[shell])
    return Typed(shell, folder)


class Typed:
    """What a shell calls macft with when keys are typed at its prompt."""

    START: ClassVar = {
        "bash": (["bash", "--norc", "--noprofile", "-i"], "source ./script"),
        "zsh": (["zsh", "-f", "-i"], "autoload -Uz compinit; compinit -u -d ./dump; source ./script"),
        "fish": (["fish", "--no-config", "-i"], "source ./script"),
    }

    def __init__(self, shell: str, folder: Path):
        self._command, self._first = self.START[shell]
        self._folder = folder

    def __call__(self, keys: str) -> str:
        variables = environment() | {
            "PATH": f"{self._folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HOME": str(self._folder),
            "TERM": "xterm",
            "MACFT_CONFIG": str(self._folder / "own"),
        }
        process, master = pty.fork()
        if process == 0:
            os.chdir(self._folder)
            os.execvpe(self._command[0], self._command, variables)
        try:
            self._read(master, "")
            os.write(master, f"{self._first}; echo REA''DY\r".encode())
            self._read(master, "READY")
            os.write(master, f"{keys}\r".encode())
            shown = self._read(master, "END")
        finally:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            os.close(master)
        return re.findall(r"((?:<[^<>\r\n]*>)+)END", shown)[-1]

    @staticmethod
    def _read(master: int, until: str) -> str:
        """What the shell shows until a text appears, or its first output."""
        shown = ""
        while select.select([master], [], [], 60)[0]:
            shown += os.read(master, 65536).decode(errors="replace")
            if until in shown and shown:
                return shown
        raise AssertionError(f"no {until!r} in {shown!r}")


SHELLS = pytest.mark.parametrize("typed", ["bash", "zsh", "fish"], indirect=True)


@pytest.mark.slow
@SHELLS
def test_tab_completes_commands_keys_options_groups_and_runs(typed: Typed) -> None:
    # A key is left open for its value, a whole word is followed by a space.
    line = "macft tra\t+recipe=smo\ttraining.ste\t7 report.log_level=w\ttopology=d\t--cf\tjob"
    expected = ["train", "+recipe=smoke", "training.steps=7", "report.log_level=warning", "topology=desk"]
    assert typed(line) == "".join(f"<{word}>" for word in [*expected, "--cfg", "job"])
    assert typed("macft generate runs/s\t--pro\tHi") == "<generate><runs/smoke/2026-02-01_08-00-00><--prompt><Hi>"


@pytest.mark.parametrize("shell", SCRIPTS)
def test_installing_writes_where_the_shell_looks(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / NASTY))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / NASTY / "data"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / NASTY / "config"))
    monkeypatch.setenv("SHELL", f"/bin/{shell}")
    main(["--install"])
    path = install_path(shell)
    assert path.is_relative_to(tmp_path)
    assert path.read_text() == SCRIPTS[shell]
    assert str(path) in capsys.readouterr().out
    main([shell])
    assert capsys.readouterr().out == SCRIPTS[shell]


def test_a_shell_that_is_not_known_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    with pytest.raises(ConfigError, match="'tcsh' is not one of bash, zsh, fish"):
        main([])
