"""Runs the checks on all hosts of a topology over SSH, and compares the hosts."""

from __future__ import annotations

import asyncio
import json
import secrets
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypedDict

import asyncssh

from macft.diagnostics import LEVELS, Finding, network, software
from macft.errors import LaunchError
from macft.network.link_probe import TOKEN_BYTES
from macft.remote.connection import connect, python_command
from macft.topology.settings import TopologyConfig, split_host

_SECONDS = 120.0


class HostsReport(TypedDict):
    """Versions by SSH destination, and all findings as plain maps."""

    versions: dict[str, dict[str, str]]
    findings: list[dict[str, str]]


@dataclass(frozen=True)
class _HostReport:
    """The report of one host; ``offset`` is how many seconds its clock is ahead of this machine's."""

    versions: dict[str, str]
    offset: float
    findings: list[Finding]


def examine_hosts(topology: TopologyConfig, arguments: Sequence[str]) -> HostsReport:
    """Runs the doctor with ``arguments`` on each host, compares the hosts, and measures the links between them."""
    return asyncio.run(_examine(topology, arguments))


async def _examine(topology: TopologyConfig, arguments: Sequence[str]) -> HostsReport:
    destinations = [topology.ssh_of(rank) for rank in range(len(topology.hosts))]
    reports = await asyncio.gather(
        *(_ask(destination, topology.python_of(rank), arguments) for rank, destination in enumerate(destinations)),
        return_exceptions=True,
    )
    findings: list[Finding] = []
    versions, offsets = {}, {}
    for destination, report in zip(destinations, reports, strict=True):
        if isinstance(report, LaunchError):
            findings.append(Finding(destination, "problem", str(report).removeprefix(f"{destination}: ")))
        elif isinstance(report, BaseException):
            raise report
        else:
            versions[destination], offsets[destination] = report.versions, report.offset
            findings += [replace(finding, topic=f"{destination}: {finding.topic}") for finding in report.findings]
    findings += [*software.differences(versions), *network.clock_findings(offsets)]
    count = len(destinations)
    for rank in range(count if count > 2 else 1):
        following = (rank + 1) % count
        if {destinations[rank], destinations[following]} <= versions.keys():
            findings.append(await _measure(topology, rank, following))
    return {"versions": versions, "findings": [asdict(finding) for finding in findings]}


async def _ask(destination: str, python: str, arguments: Sequence[str]) -> _HostReport:
    async with await connect(destination) as connection:
        command = " ".join([python_command(python), "-m", "macft.doctor", "--json", *arguments])
        started = time.time()
        try:
            completed = await asyncio.wait_for(connection.run(command), _SECONDS)
        except (TimeoutError, asyncssh.Error) as error:
            raise LaunchError(f"{destination}: the doctor there gave no answer ({error or 'too slow'})") from None
        ended = time.time()
    try:
        report = json.loads(str(completed.stdout).strip().splitlines()[-1])
        return _HostReport(
            versions={str(key): str(value) for key, value in report["versions"].items()},
            # The host read its clock between `started` and `ended`; only a time outside of these is an offset.
            offset=min(report["time"] - started, 0.0) + max(report["time"] - ended, 0.0),
            findings=[_finding(item) for item in report["findings"]],
        )
    except (IndexError, ValueError, KeyError, TypeError, AttributeError):
        reason = (str(completed.stderr or "").strip().splitlines() or [f"status {completed.exit_status}"])[-1]
        raise LaunchError(f"{destination}: `{python} -m macft.doctor` does not run there: {reason[:200]}") from None


async def _measure(topology: TopologyConfig, first: int, second: int) -> Finding:
    """Measures bandwidth and latency from one rank's host to that of another."""
    address = split_host(topology.hosts[second], topology.port)[0].strip("[]")
    topic, fix = f"{topology.ssh_of(first)} to {topology.ssh_of(second)}", "check cable and firewall"
    token = secrets.token_hex(TOKEN_BYTES) + "\n"
    probe = "-m macft.network.link_probe"
    try:
        async with await connect(topology.ssh_of(first)) as client, await connect(topology.ssh_of(second)) as server:
            serving = await server.create_process(f"{python_command(topology.python_of(second))} {probe} serve")
            serving.stdin.write(token)
            port = int(await asyncio.wait_for(serving.stdout.readline(), _SECONDS))
            command = f"{python_command(topology.python_of(first))} {probe} measure {shlex.quote(address)} {port}"
            completed = await asyncio.wait_for(client.run(command, input=token), _SECONDS)
            serving.stdin.write_eof()
            if completed.exit_status:
                return Finding(topic, "problem", str(completed.stderr).strip()[-200:], fix)
            result = json.loads(str(completed.stdout))
            latency, bandwidth = float(result["latency"]), float(result["bandwidth"])
    except (LaunchError, TimeoutError, asyncssh.Error, ValueError, KeyError, TypeError) as error:
        return Finding(topic, "problem", f"the link can't be measured: {error}", fix)
    return Finding(topic, "ok", f"{bandwidth * 8e-9:.2f} Gbit/s, {latency * 1e6:.0f} us one way")


def _finding(item: dict[str, object]) -> Finding:
    finding = Finding(str(item["topic"]), str(item["level"]), str(item["text"]), str(item["mend"]))
    if finding.level not in LEVELS:
        raise ValueError(finding.level)
    return finding
