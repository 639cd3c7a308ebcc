"""All gradient codecs by name: the one place where a codec is registered.

To add a codec, write it in a file of its own and add a line to ``CODECS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from macft.collective.codecs.base import Exact, GradientCodec
from macft.collective.codecs.error_feedback import ErrorFeedback
from macft.collective.codecs.powersgd import PowerSGD
from macft.collective.codecs.quantization import Bfloat16, Int8, WireCodec


@dataclass(frozen=True)
class RegisteredCodec:
    """A codec as ``collective.codec`` offers it.

    Attributes:
        make: Makes a codec without state; takes ``collective.powersgd_rank``.
        ratio: Bytes on the wire per byte of float32 gradient. None if it depends on the shapes; ``auto`` then never
            chooses the codec.
        ring_only: Whether it encodes every hop, which only ``collective=ring`` can do.
    """

    make: Callable[[int], GradientCodec]
    ratio: float | None
    ring_only: bool = False


def _every_hop(codec: WireCodec) -> RegisteredCodec:
    return RegisteredCodec(lambda _: ErrorFeedback(codec), codec.ratio, ring_only=True)


CODECS: dict[str, RegisteredCodec] = {
    "none": RegisteredCodec(lambda _: Exact(), 1.0),
    "bfloat16": _every_hop(Bfloat16()),
    "int8": _every_hop(Int8()),
    "powersgd": RegisteredCodec(PowerSGD, None),
}
