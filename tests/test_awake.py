"""A run keeps a Mac from falling asleep."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from macft.device import awake
from macft.device.awake import keep_awake


def test_caffeinate_runs_as_long_as_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "told"
    program = tmp_path / "caffeinate"
    program.write_text(f'#!/bin/sh\necho "$@" > {told}.part && mv {told}.part {told}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    keep_awake()
    keep_awake()  # once is enough
    (process,) = awake._running
    assert process.wait(60) == 0
    awake._running.clear()
    assert told.read_text().split() == ["-i", "-w", str(os.getpid())]


def test_a_mac_without_it_and_other_systems_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    keep_awake()
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    keep_awake()
    assert not awake._running
