"""Which codec a run uses: the configured one, or with ``auto`` the least lossy one that the measured link allows."""

from __future__ import annotations

from macft.collective.codecs.base import GradientCodec
from macft.collective.codecs.registry import CODECS
from macft.errors import CollectiveError

ACCEPTABLE = 0.05
"""Share of a step that communication may take before ``auto`` chooses a codec that sends less."""


def make(name: str, powersgd_rank: int) -> GradientCodec:
    """The codec called ``name``. ``auto`` starts with the exact one, until a few steps have been measured.

    Raises:
        CollectiveError: there is no such codec.
    """
    if name == "auto":
        name = "none"
    if name not in CODECS:
        raise CollectiveError(f"collective.codec: '{name}' is not one of {', '.join(CODECS)}")
    return CODECS[name].make(powersgd_rank)


def choose(step_seconds: float, exposed_seconds: float) -> tuple[str, str]:
    """The codec for a step of which the exact exchange takes ``exposed_seconds``, and the reason in words.

    The least lossy codec that brings the exchange below 5% of the step, or else the one that sends the fewest bytes.
    PowerSGD is never chosen: it affects training most, and its ratio depends on the shapes.
    """
    other_seconds = max(step_seconds - exposed_seconds, 1e-9)
    ratios = {name: codec.ratio for name, codec in CODECS.items() if codec.ratio is not None}
    by_loss = sorted(ratios, key=lambda name: -ratios[name])
    times = {name: exposed_seconds * ratios[name] for name in by_loss}
    name = next((name for name in by_loss if times[name] <= ACCEPTABLE * (other_seconds + times[name])), by_loss[-1])
    before = f"exchanging the gradient took {exposed_seconds:.3f} s of a step of {step_seconds:.3f} s"
    if name == "none":
        return name, f"{before}: less than {ACCEPTABLE:.0%}, so it stays exact"
    return name, f"{before}: {name} takes {ratios[name]:.0%} of the bytes"
