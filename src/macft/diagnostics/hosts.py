"""The doctor for all hosts of a topology, over SSH."""

from __future__ import annotations

import asyncio
import json
import secrets
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import asyncssh

from macft.diagnostics import LEVELS, Finding, network, software
from macft.errors import LaunchError
from macft.network.link_probe import TOKEN_BYTES
from macft.remote.ssh import connect, python_command
from macft.topology.settings import TopologyConfig, split_host

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
    count = len(places)
    for rank in range(count if count > 2 else 1):
        following = (rank + 1) % count
        if {places[rank], places[following]} <= versions.keys():
            findings.append(await _measure(topology, rank, following))
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


async def _measure(topology: TopologyConfig, here: int, there: int) -> Finding:
    """Bandwidth and latency from one host to the next, measured between the two."""
    address = split_host(topology.hosts[there], topology.port)[0].strip("[]")
    topic, mend = f"{topology.ssh_of(here)} to {topology.ssh_of(there)}", "look at cable and firewall"
    token = secrets.token_hex(TOKEN_BYTES) + "\n"
    probe = "-m macft.network.link_probe"
    try:
        async with await connect(topology.ssh_of(here)) as client, await connect(topology.ssh_of(there)) as server:
            serving = await server.create_process(f"{python_command(topology.python_of(there))} {probe} serve")
            serving.stdin.write(token)
            port = int(await asyncio.wait_for(serving.stdout.readline(), _SECONDS))
            command = f"{python_command(topology.python_of(here))} {probe} measure {shlex.quote(address)} {port}"
            done = await asyncio.wait_for(client.run(command, input=token), _SECONDS)
            serving.stdin.write_eof()
            if done.exit_status:
                return Finding(topic, "problem", str(done.stderr).strip()[-200:], mend)
            found = json.loads(str(done.stdout))
            latency, bandwidth = float(found["latency"]), float(found["bandwidth"])
    except (LaunchError, TimeoutError, asyncssh.Error, ValueError, KeyError, TypeError) as error:
        return Finding(topic, "problem", f"the link can't be measured: {error}", mend)
    return Finding(topic, "ok", f"{bandwidth * 8e-9:.2f} Gbit/s, {latency * 1e6:.0f} us one way")


def _finding(item: dict[str, Any]) -> Finding:
    finding = Finding(str(item["topic"]), str(item["level"]), str(item["text"]), str(item["mend"]))
    if finding.level not in LEVELS:
        raise ValueError(finding.level)
    return finding
