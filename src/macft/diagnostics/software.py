"""Python, packages and the BLAS behind MLX."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from importlib import metadata

from macft.device import blas
from macft.diagnostics import Finding

PACKAGES = ("macft", "mlx", "mlx-lm", "pyzmq")
"""What must be alike on all nodes for one run to give the same numbers."""


def versions() -> dict[str, str]:
    """Version of Python and of each of :data:`PACKAGES`; ``missing`` where it is not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def check() -> list[Finding]:
    """Findings for this machine."""
    found = versions()
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    missing = [name for name, version in found.items() if version == "missing"]
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
        mend = f"{sys.executable} -m pip install ngsolve-openblas"
        findings.append(Finding("BLAS", "warning", blas.describe(), mend))
    return findings


def differences(reports: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Compares the versions of several hosts, {host: {package: version}}; the first host sets the standard."""
    hosts = list(reports)
    findings = []
    for package, wanted in reports[hosts[0]].items() if hosts else ():
        for host in hosts[1:]:
            theirs = reports[host].get(package, "missing")
            if package == "python":
                same = theirs.split(".")[:2] == wanted.split(".")[:2]
                mend = f"install Python {wanted} on {host}"
            else:
                same = theirs == wanted
                mend = f"ssh {host} python3 -m pip install {package}=={wanted}"
            if not same:
                level = "warning" if package == "python" else "problem"
                text = f"{host} has {package} {theirs}, {hosts[0]} has {wanted}"
                findings.append(Finding("versions", level, text, mend))
    if len(hosts) > 1 and not findings:
        findings.append(Finding("versions", "ok", f"alike on {len(hosts)} hosts"))
    return findings
