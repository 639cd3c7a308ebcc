"""``python -m macft.doctor``: checks that this machine, or each host of a topology, is ready to train."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

from macft.cli.parser import Parser, check_output, command_parser
from macft.cli.run_command import run_command
from macft.config.paths import models_by_name
from macft.device.durable import write_atomically
from macft.device.mlx_device import prepare_device
from macft.diagnostics import LEVELS, Finding, machine, network, software
from macft.diagnostics.hosts import HostsReport, examine_hosts
from macft.diagnostics.shareable import shareable
from macft.errors import ConfigError, MacftError
from macft.model.fetch.bundled import BUNDLED
from macft.model.fetch.local import find_local
from macft.model.fetch.resolve import is_hub_id
from macft.network import links
from macft.rendezvous import keystore
from macft.report.run_folder import RunFolder
from macft.thermal.load import Load
from macft.thermal.sensors.choose import choose
from macft.thermal.settings import ThermalConfig
from macft.topology.topology_file import load_topology

_SMOKE_SECONDS = 900


class MachineReport(TypedDict):
    """This machine's report: versions, the time in seconds since 1970, and the findings as plain maps."""

    versions: dict[str, str]
    time: float
    findings: list[dict[str, str]]


_MARKS = dict(zip(LEVELS, (" ok     ", "warning ", "PROBLEM "), strict=True))


def main(argv: Sequence[str]) -> int:
    """Prints the findings; returns 1 if one of them is a problem, otherwise 0.

    Raises:
        MacftError: The arguments are wrong, or the topology can't be read.
    """
    arguments = _parser().parse_args(argv)
    if arguments.report is not None:
        if arguments.topology is not None:
            raise ConfigError("--report: it describes this machine; run it on each host, without --topology")
        check_output("--report", Path(arguments.report))
        write_report(Path(arguments.report), arguments.port)
        return 0
    if arguments.topology is None:
        report: MachineReport | HostsReport = examine(arguments.port, arguments.model)
    else:
        topology = load_topology(arguments.topology)
        model = ["--model", shlex.quote(arguments.model)] if arguments.model else []
        report = examine_hosts(topology, ["--port", str(topology.port), *model])
    findings = [Finding(**finding) for finding in report["findings"]]
    if arguments.json:
        print(json.dumps(report))
    else:
        for finding in findings:
            print(f"{_MARKS[finding.level]} {finding.topic}: {finding.text}")
            if finding.mend:
                print(f"         to fix it: {finding.mend}")
    return int(any(finding.level == "problem" for finding in findings))


def examine(port: int, model: str | None) -> MachineReport:
    """Checks this machine; ``port`` is the run's, ``model`` a folder or hub id."""
    findings = [*software.check(), *machine.check(Path.cwd()), *network.check(port), _keys()]
    findings.append(
        Finding("model", "ok", "none given (--model NAME checks whether it is on this machine)")
        if model is None
        else find_model(model)
    )
    return {"versions": software.versions(), "time": time.time(), "findings": [asdict(item) for item in findings]}


def write_report(path: Path, port: int) -> None:
    """Writes what people attach to an issue; trains for three steps first. Raises ConfigError where it can't write."""
    found = [*software.check(), *machine.check(Path.cwd()), *network.check(port)]
    print("A short run of recipe=smoke shows whether training works here. It takes a minute or so.", flush=True)
    sensors, missing = choose(ThermalConfig(), Load(), rank=0)
    named = [f"{sensor.name}: {', '.join(sensor.kinds)}" for sensor in sensors]
    for sensor in sensors:
        sensor.close()
    tried = {"found": named, "missing": missing}
    report = shareable(software.versions(), prepare_device(), links.discover(), found, tried, _smoke_run())
    try:
        write_atomically(path, json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--report: {path} can't be written: {error.strerror}") from error
    print(f"{path} has versions, chip, memory, kinds of links, sensors and the short run's result.")
    print("It has no names, addresses or serial numbers; read it before you attach it to an issue.")


def _smoke_run() -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "macft.train", "+recipe=smoke", f"hydra.run.dir={folder}/run"]
        try:
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=_SMOKE_SECONDS)
        except subprocess.TimeoutExpired:
            return {"result": f"not done within {_SMOKE_SECONDS} s"}
        if done.returncode:
            return {"result": f"exit status {done.returncode}", "errors": done.stderr.strip().splitlines()[-5:]}
        summary = RunFolder(Path(folder) / "run").read_summary()
        kept = ("reason", "steps", "seconds", "results", "tokens_per_second", "peak_memory_bytes", "device")
        return {"result": "works", **{name: summary.get(name) for name in kept}}


def _keys() -> Finding:
    try:
        keyring = keystore.load(keystore.key_folder())
    except MacftError as error:
        return Finding("keys", "warning", str(error), "python -m macft.keys make")
    trusted = ", ".join(keyring.trusted) or "no machine yet"
    return Finding("keys", "ok", f"this machine has a key; trusted: {trusted}")


def find_model(name: str) -> Finding:
    """Whether a model is on this machine: a folder, a hub id, or one that ``model=NAME`` knows."""
    named = models_by_name()
    path = named.get(name, name)
    folder = find_local(path)
    if folder is not None:
        return Finding("model", "ok", f"{name} is in {folder}")
    if path not in BUNDLED and not is_hub_id(path):
        fix = f"give a folder, a hub id (org/name), or one of {', '.join(named)}"
        return Finding("model", "problem", f"there is no model {name}", fix)
    fix = "'topology.ship=[model]'   # sends it from the machine on which you start the run"
    if path not in BUNDLED:
        fix = f"hf download {path}   # or {fix}"
    return Finding("model", "warning", f"{name} is not on this machine; it is fetched when a run starts", fix)


def _parser() -> Parser:
    parser = command_parser("doctor")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--report", metavar="FILE", help="write a file to attach to an issue, without names or addresses"
    )
    parser.add_argument("--topology", metavar="NAME", help="check all hosts of this topology, over SSH")
    parser.add_argument("--model", metavar="NAME", help="check whether this model is on this machine: as in model=NAME")
    parser.add_argument("--port", type=int, default=7070, help="the run's port (default 7070)")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
