"""The doctor for all hosts of a topology, over SSH."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import asyncssh

from macft.cluster.checks import LEVELS, Finding, network, software
from macft.cluster.settings import TopologyConfig
from macft.cluster.ssh import connect
from macft.cluster.ssh_launch import python_command
from macft.errors import LaunchError

_SECONDS = 120.0


def examine_hosts(topology: TopologyConfig, arguments: Sequence[str]) -> dict[str, Any]:
    """Each host's own findings, then how they differ; ``arguments`` are the doctor's."""
    return asyncio.run(_examine(topology, arguments))


async def _examine(topology: TopologyConfig, arguments: Sequence[str]) -> dict[str, Any]:
    places = [topology.ssh_of(rank) for rank in range(len(topology.hosts))]
    answers = await asyncio.gather(
        *(_ask(place, topology.python_of(rank), arguments) for rank, place in enumerate(places)), return_exceptions=True
    )
    findings: list[Finding] = []
    versions, offsets = {}, {}
    for place, answer in zip(places, answers, strict=True):
        if isinstance(answer, LaunchError):
            findings.append(Finding(place, "problem", str(answer)))
        elif isinstance(answer, BaseException):
            raise answer
        else:
            versions[place], offsets[place] = answer["versions"], answer["offset"]
            findings += [replace(finding, topic=f"{place}: {finding.topic}") for finding in answer["findings"]]
    findings += [*software.differences(versions), *network.clock_findings(offsets)]
    return {"versions": versions, "findings": [asdict(finding) for finding in findings]}


async def _ask(place: str, python: str, arguments: Sequence[str]) -> dict[str, Any]:
    async with await connect(place) as connection:
        command = " ".join([python_command(python), "-m", "macft.doctor", "--json", *arguments])
        started = time.time()
        try:
            done = await asyncio.wait_for(connection.run(command), _SECONDS)
        except (TimeoutError, asyncssh.Error) as error:
            raise LaunchError(f"{place}: the doctor there gave no answer ({error or 'too slow'})") from None
        ended = time.time()
    try:
        answer = json.loads(str(done.stdout).strip().splitlines()[-1])
        return {
            "versions": {str(key): str(value) for key, value in answer["versions"].items()},
            # The other clock's reading lies between the two here: only what is beyond either is an offset.
            "offset": min(answer["time"] - started, 0.0) + max(answer["time"] - ended, 0.0),
            "findings": [_finding(item) for item in answer["findings"]],
        }
    except (IndexError, ValueError, KeyError, TypeError, AttributeError):
        said = (str(done.stderr or "").strip().splitlines() or [f"status {done.exit_status}"])[-1]
        raise LaunchError(f"{place}: `{python} -m macft.doctor` does not run there: {said[:200]}") from None


def _finding(item: dict[str, Any]) -> Finding:
    finding = Finding(str(item["topic"]), str(item["level"]), str(item["text"]), str(item["mend"]))
    if finding.level not in LEVELS:
        raise ValueError(finding.level)
    return finding
