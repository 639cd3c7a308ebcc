"""Checks of Python, packages and the BLAS that MLX uses."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping

from macft.device import blas
from macft.diagnostics import Finding
from macft.remote import host_probe

PACKAGES = ("macft", "mlx", "mlx-lm", "pyzmq")
"""Packages that need the same version on all nodes, so that a run gives the same numbers."""


def versions() -> dict[str, str]:
    """The versions of Python and of each of :data:`PACKAGES`; ``missing`` if it is not installed."""
    return host_probe.versions(list(PACKAGES))


def check() -> list[Finding]:
    """Checks this machine."""
    installed = versions()
    listed = ", ".join(f"{name} {version}" for name, version in installed.items())
    missing = [name for name, version in installed.items() if version == "missing"]
    findings = [
        Finding("packages", "problem", f"{', '.join(missing)} not installed", f"{sys.executable} -m pip install macft")
        if missing
        else Finding("packages", "ok", listed)
    ]
    if platform.system() == "Darwin" and platform.machine() != "arm64":
        findings.append(
            Finding(
                "python", "problem", "this Python is built for Intel; MLX needs Apple Silicon's", "install arm64 Python"
            )
        )
    blas.preload()
    if blas.is_fast():
        findings.append(Finding("BLAS", "ok", blas.describe()))
    else:
        fix = f"{sys.executable} -m pip install ngsolve-openblas"
        findings.append(Finding("BLAS", "warning", blas.describe(), fix))
    return findings


def differences(reports: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Compares the versions of all hosts, {host: {package: version}}, with those of the first host."""
    hosts = list(reports)
    findings = []
    for package, required in reports[hosts[0]].items() if hosts else ():
        for host in hosts[1:]:
            theirs = reports[host].get(package, "missing")
            if package == "python":
                same = theirs.split(".")[:2] == required.split(".")[:2]
                fix = f"install Python {required} on {host}"
            else:
                same = theirs == required
                fix = f"ssh {host} python3 -m pip install {package}=={required}"
            if not same:
                level = "warning" if package == "python" else "problem"
                text = f"{host} has {package} {theirs}, {hosts[0]} has {required}"
                findings.append(Finding("versions", level, text, fix))
    if len(hosts) > 1 and not findings:
        findings.append(Finding("versions", "ok", f"the same on {len(hosts)} hosts"))
    return findings
