"""Memory, disk, thermal state, power and sleep settings."""

from __future__ import annotations

import platform
import re
import shutil
from pathlib import Path

import psutil

from macft.device import disk_speed
from macft.device.memory import cgroup_limit
from macft.diagnostics import Finding
from macft.network.system_tools import output_of

_GIB = 2**30
_LOW_MEMORY = 2 * _GIB
_LOW_DISK, _FULL_DISK = 10 * _GIB, 1 * _GIB
# Bytes a second below which blocks that are read from disk slow a run down.
_SLOW_DISK = 1e9
_PRESSURE = ("nominal", "moderate", "heavy", "trapping", "sleeping")


def check(folder: Path) -> list[Finding]:
    """Checks this machine; runs are stored in ``folder``."""
    machine, limit = psutil.virtual_memory(), cgroup_limit()
    findings = [memory(*(int(min(size, limit)) for size in (machine.available, machine.total)))]
    findings += [disk(shutil.disk_usage(folder).free, folder), disk_reads()]
    if platform.system() == "Darwin":
        findings += sleep_settings(output_of("pmset", "-g") or "")
        findings += pressure(output_of("notifyutil", "-g", "com.apple.system.thermalpressurelevel") or "")
        findings += wired_limit(output_of("sysctl", "iogpu.wired_limit_mb") or "")
    else:
        findings.append(_linux_thermal())
    return findings


def memory(available: int, total: int) -> Finding:
    """Checks the available memory, in bytes."""
    text = f"{available / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    if available < _LOW_MEMORY:
        return Finding("memory", "warning", text, "close other programs, or use model.quantization=4bit")
    return Finding("memory", "ok", text)


def disk(free: int, folder: Path) -> Finding:
    """Checks the free disk space (bytes) in the folder of the runs."""
    text = f"{free / _GIB:.1f} GiB free below {folder}"
    if free < _FULL_DISK:
        return Finding("disk", "problem", text, "remove old runs, or give hydra.run.dir on another disk")
    if free < _LOW_DISK:
        return Finding("disk", "warning", text, "remove old runs: a model and its checkpoints take several GiB")
    return Finding("disk", "ok", text)


def disk_reads() -> Finding:
    """Measures how fast the disk of the models reads; plans and placements use the figure from then on."""
    try:
        speed = disk_speed.measure()
    except OSError as error:
        reason = str(error) if error.strerror is None else f"{error.strerror}: {error.filename}"
        return Finding("disk speed", "warning", f"not measured: {reason}", "free some space in the user's cache folder")
    text = f"reads {speed / 1e9:.2f} GB/s; macft plan and topology.placement use this figure"
    if speed < _SLOW_DISK:
        return Finding("disk speed", "warning", text, "keep models on the internal SSD for topology.placement=stream")
    return Finding("disk speed", "ok", text)


def sleep_settings(text: str) -> list[Finding]:
    """Checks the output of ``pmset -g``: low-power mode, and when the Mac sleeps."""
    settings = dict(re.findall(r"^ (\w+)\s+(\d+)", text, re.MULTILINE))
    if not settings:
        return [Finding("power", "warning", "`pmset -g` gave nothing", "pmset -g")]
    findings = []
    low = settings.get("lowpowermode") == "1" or settings.get("powermode") == "1"
    if low:
        key = "powermode" if "powermode" in settings else "lowpowermode"
        text = "low-power mode is on; training takes up to half as long again"
        findings.append(Finding("power", "warning", text, f"sudo pmset -a {key} 0"))
    else:
        findings.append(Finding("power", "ok", "low-power mode is off"))
    minutes = int(settings.get("sleep", "0"))
    if minutes:
        text = f"falls asleep after {minutes} minutes (a run keeps it awake by caffeinate)"
        findings.append(Finding("sleep", "warning", text, "sudo pmset -c sleep 0"))
    else:
        findings.append(Finding("sleep", "ok", "does not fall asleep by itself"))
    return findings


def pressure(text: str) -> list[Finding]:
    """Checks the output of ``notifyutil -g com.apple.system.thermalpressurelevel``."""
    match = re.fullmatch(r"com\.apple\.system\.thermalpressurelevel (\d)", text.strip())
    if match is None or int(match[1]) >= len(_PRESSURE):
        return [Finding("thermal", "warning", "the thermal pressure can't be read", "sw_vers")]
    level = int(match[1])
    if level >= 2:
        return [Finding("thermal", "warning", f"thermal pressure is {_PRESSURE[level]}", "let it cool down")]
    return [Finding("thermal", "ok", f"thermal pressure is {_PRESSURE[level]}")]


def wired_limit(text: str) -> list[Finding]:
    """Checks the output of ``sysctl iogpu.wired_limit_mb``: how much memory the GPU may use."""
    match = re.search(r"iogpu\.wired_limit_mb: (\d+)", text)
    if match is None:
        return []
    limit = "the system's default" if match[1] == "0" else f"{match[1]} MB"
    return [Finding("GPU memory", "ok", f"limit of wired memory: {limit}")]


def _linux_thermal(root: Path = Path("/sys/class/thermal")) -> Finding:
    count = sum(1 for zone in root.glob("thermal_zone*/temp"))
    if not count:
        return Finding("thermal", "ok", "this machine shows no thermal sensors; training runs without them")
    return Finding("thermal", "ok", f"{count} thermal sensors")
