"""Runs on one node in this process: for what a run computes, where how it is started does not matter."""

from __future__ import annotations

from pathlib import Path

import pytest

import macft


def train_here(*overrides: str, folder: Path) -> Path:
    """Trains with ``folder`` as the run's folder, which it returns."""
    return macft.fit(macft.compose(overrides=overrides), folder=folder).folder


def refused(*overrides: str, folder: Path) -> macft.MacftError:
    """The error of a run, which is one line; the command prints it after ``error:``."""
    with pytest.raises(macft.MacftError) as told:
        train_here(*overrides, folder=folder)
    assert len(str(told.value).splitlines()) == 1
    return told.value
