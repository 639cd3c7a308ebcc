"""Macs one may not own: what a chip and an amount of memory stand for, from the table in chips.yaml."""

from __future__ import annotations

import difflib
import itertools
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml

from macft.errors import ConfigError

_MAC = re.compile(r"(?P<chip>[A-Za-z0-9 ]*?)\s*(?P<memory>\d{1,9})?\s*(?:gb|gib|g)?", re.IGNORECASE)
_SEVERAL = re.compile(r"(?P<count>\d{1,9})\s*[x*]\s*(?P<mac>.+)", re.IGNORECASE)
_MOST_MACS = 64
_FORM_FACTORS = ("macbook", "air", "mini", "studio", "imac", "mac")


@dataclass(frozen=True)
class Chip:
    """A row of chips.yaml: memory options in GiB, GB/s of memory and of the disk, FP32 TFLOPS of the GPU, watts under
    load (None: unknown).

    ``matrix_tflops``: FP16 TFLOPS of matrix units in the GPU; None: it has none.
    """

    chip: str
    memory: tuple[int, ...]
    bandwidth: float
    tflops: float
    watts: float | None
    disk: float
    source: str
    matrix_tflops: float | None = None


@dataclass(frozen=True)
class Mac:
    """A chip with ``memory`` GiB."""

    name: str
    chip: Chip
    memory: int

    @property
    def usable_bytes(self) -> float:
        """Memory the GPU may use, MLX's ``max_recommended_working_set_size``, bytes.

        Between what was read on Macs: 0.67 of the memory at 8 GB, 0.74 at 24 GB, 0.84 at 128 GB; macOS decides.
        """
        points = ((8, 0.67), (24, 0.74), (128, 0.84))
        share = points[-1][1] if self.memory >= 128 else points[0][1]
        for (low, first), (high, last) in itertools.pairwise(points):
            if low <= self.memory < high:
                share = first + (last - first) * (self.memory - low) / (high - low)
        return share * self.memory * 2**30


@cache
def known_chips() -> dict[str, Chip]:
    """All chips of the table by name."""
    rows = yaml.safe_load(files("macft.device").joinpath("chips.yaml").read_text(encoding="utf-8"))
    return {row["chip"]: Chip(**{**row, "memory": tuple(row["memory"])}) for row in rows}


def chip_of_brand(brand: str) -> Chip | None:
    """The chip that macOS calls ``brand``, "Apple M2 Max"; None for another one."""
    return known_chips().get(brand.removeprefix("Apple ").strip())


def own_chip() -> Chip | None:
    """This Mac's; None for other machines, and for chips that the table doesn't have."""
    return chip_of_brand(own_brand())


def find_macs(texts: Sequence[str]) -> list[Mac]:
    """Each text as :func:`find_mac` reads it; ``"4x M2 Max 32GB"`` is four of them.

    Raises:
        ConfigError: no such chip, it was never sold with that memory, or there are more than 64 in all.
    """
    macs: list[Mac] = []
    for text in texts:
        match = _SEVERAL.fullmatch(text.strip())
        count = int(match["count"]) if match else 1
        if not 1 <= count <= _MOST_MACS - len(macs):
            raise ConfigError(f"plan.chips: '{text}': plan for 1 to {_MOST_MACS} Macs in all")
        macs += [find_mac(match["mac"] if match else text)] * count
    return macs


def find_mac(text: str) -> Mac:
    """``"M4 Max 64GB"``, ``"M1 Air 8GB"`` or ``"m2 pro"`` (its smallest memory) as a Mac.

    Raises:
        ConfigError: no such chip, or it was never sold with that memory.
    """
    match = _MAC.fullmatch(text.strip())
    words = match["chip"].split() if match else []
    name = " ".join(word.capitalize() for word in words if word.lower() not in _FORM_FACTORS)
    if match and match["memory"] and re.fullmatch(r"m", name, re.IGNORECASE):
        name, memory = f"M{match['memory']}", None
    else:
        memory = int(match["memory"]) if match and match["memory"] else None
    chip = known_chips().get(name)
    if chip is None:
        near = difflib.get_close_matches(name, known_chips(), 1, cutoff=0.3)
        hint = f", did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"plan.chips: '{text}' is not a known chip{hint}; there are: {', '.join(known_chips())}")
    if memory is not None and memory not in chip.memory:
        options = ", ".join(map(str, chip.memory))
        raise ConfigError(f"plan.chips: '{text}': {name} comes with {options} GB, not {memory}")
    memory = memory or chip.memory[0]
    return Mac(f"{name} {memory}GB", chip, memory)


def own_brand() -> str:
    """The processor's name on a Mac, "Apple M2 Max"; empty elsewhere."""
    if platform.system() != "Darwin":
        return ""
    try:
        done = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
