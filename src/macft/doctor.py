"""``python -m macft.doctor``: is this machine, or each host of a topology, fit to train?"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from macft.diagnostics import LEVELS, Finding, machine, network, software
from macft.diagnostics.hosts import examine_hosts
from macft.errors import MacftError
from macft.model.local import find_local
from macft.rendezvous import keystore
from macft.topology.topology_file import load_topology

_MARKS = dict(zip(LEVELS, (" ok     ", "warning ", "PROBLEM "), strict=True))


def main(argv: list[str] | None = None) -> int:
    """Prints the findings; exit status 1 if one of them is a problem."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.topology is None:
            report = examine(arguments.port, arguments.model)
        else:
            topology = load_topology(arguments.topology)
            asked = ["--model", shlex.quote(arguments.model)] if arguments.model else []
            report = examine_hosts(topology, ["--port", str(topology.port), *asked])
        findings = [Finding(**finding) for finding in report["findings"]]
    except MacftError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.json:
        print(json.dumps(report))
    else:
        for finding in findings:
            print(f"{_MARKS[finding.level]} {finding.topic}: {finding.text}")
            if finding.mend:
                print(f"         to mend: {finding.mend}")
    return int(any(finding.level == "problem" for finding in findings))


def examine(port: int, model: str | None) -> dict[str, Any]:
    """This machine: its versions, the time, and all findings, as JSON can hold them."""
    findings = [*software.check(), *machine.check(Path.cwd()), *network.check(port), _keys(), _model(model)]
    return {"versions": software.versions(), "time": time.time(), "findings": [asdict(item) for item in findings]}


def _keys() -> Finding:
    try:
        ring = keystore.load(keystore.key_folder())
    except MacftError as error:
        return Finding("keys", "warning", str(error), "python -m macft.keys make")
    trusted = ", ".join(ring.trusted) or "nobody yet"
    return Finding("keys", "ok", f"this machine has one; trusted: {trusted}")


def _model(name: str | None) -> Finding:
    if name is None:
        return Finding("model", "ok", "none asked for (--model NAME looks whether it is here)")
    folder = find_local(name)
    if folder is None:
        mend = f"hf download {name}   # or topology.ship=[model]"
        return Finding("model", "warning", f"{name} is not on this machine; it is fetched when a run starts", mend)
    return Finding("model", "ok", f"{name} is in {folder}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m macft.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--topology", metavar="NAME", help="look at all hosts of this topology, over SSH")
    parser.add_argument("--model", metavar="NAME", help="look whether this model is here: a folder or a hub id")
    parser.add_argument("--port", type=int, default=7070, help="the run's port (default 7070)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
