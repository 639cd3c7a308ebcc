"""Runs that are refused, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

import macft


def refused(*overrides: str, folder: Path) -> macft.MacftError:
    """The error of a run on this machine, which is one line; the command prints it after ``error:``."""
    with pytest.raises(macft.MacftError) as told:
        macft.fit(macft.compose(overrides=overrides), folder=folder)
    assert len(str(told.value).splitlines()) == 1
    return told.value
