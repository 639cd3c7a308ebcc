"""Hosts with SSH for tests, which are skipped where there can be none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness import ssh_hosts
from harness.ssh_hosts import Cluster


@contextmanager
def cluster(folder: Path, count: int, *, two_cables: bool = False) -> Iterator[Cluster]:
    """See :func:`harness.ssh_hosts.cluster`."""
    if reason := ssh_hosts.why_not():
        pytest.skip(reason)
    with ssh_hosts.cluster(folder, count, two_cables=two_cables) as made:
        yield made
