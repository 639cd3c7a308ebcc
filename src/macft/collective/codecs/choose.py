"""Which codec a run uses: the one configured, or the least lossy one that the measured link asks for."""

from __future__ import annotations

from macft.collective.codecs.base import Exact, GradientCodec
from macft.collective.codecs.coded import Coded
from macft.collective.codecs.powersgd import PowerSGD
from macft.collective.codecs.wire_codec import WIRE_CODECS

ACCEPTABLE = 0.05
"""Part of a step that the exchange may take before a codec has to shrink it."""
_BYTES = {"none": 1.0, "bfloat16": 0.5, "int8": 0.254}


def make(name: str, powersgd_rank: int) -> GradientCodec:
    """The codec called ``name``; ``auto`` begins exact, until a few steps have been measured."""
    if name in WIRE_CODECS:
        return Coded(WIRE_CODECS[name])
    return PowerSGD(powersgd_rank) if name == "powersgd" else Exact()


def choose(step_seconds: float, exposed_seconds: float) -> tuple[str, str]:
    """The codec for a step of which the exact exchange takes ``exposed_seconds``, and why, in words.

    The least lossy one that brings the exchange below 5% of the step; int8 where none does. PowerSGD, whose effect on
    what is learnt is the largest, is never chosen by itself.
    """
    rest = max(step_seconds - exposed_seconds, 1e-9)
    times = {name: exposed_seconds * part for name, part in _BYTES.items()}
    name = next((name for name, time in times.items() if time <= ACCEPTABLE * (rest + time)), "int8")
    before = f"exchanging the gradient took {exposed_seconds:.3f} s of a step of {step_seconds:.3f} s"
    if name == "none":
        return name, f"{before}: less than {ACCEPTABLE:.0%}, so it stays exact"
    return name, f"{before}: {name} takes {_BYTES[name]:.0%} of the bytes"
