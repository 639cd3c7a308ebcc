"""10,000 malformed frames over all ports: the work goes on, and nothing grows. `benchmarks/fuzz_wire.py` sends more."""

from __future__ import annotations

import pytest

from fuzz_wire import SHARES, attack
from harness.fuzz.mutations import Mutator
from harness.fuzz.targets import ring_frames

FRAMES = 10_000
_MOST = {"pairing": 40, "guest": 40, "link probe": 150, "announcement": 400, "rendezvous": 150}
_SAME_CODE = {("channel", "encrypted"), ("guest", "plain"), ("monitor", "plain")}
"""What differs from the other mode is tested for streams, for pairing, and in that mode."""


@pytest.mark.slow
@pytest.mark.parametrize(("surface", "mode"), [key for key in SHARES if key not in _SAME_CODE])
def test_a_port_stands_malformed_frames(surface: str, mode: str) -> None:
    frames = min(round(FRAMES * SHARES[surface, mode]), _MOST.get(surface, FRAMES))
    assert attack(surface, mode, frames=frames, seed=18).frames >= frames


def test_the_same_seed_makes_the_same_frames_and_few_of_them_are_valid() -> None:
    valid = ring_frames()
    one, again = (Mutator("seed 18") for _ in range(2))
    frames = [one.frame(valid, replay=False) for _ in range(2_000)]
    assert frames == [again.frame(valid, replay=False) for _ in range(2_000)]
    assert len(set(frames)) > 1_500
    assert not set(frames) & set(valid)
    assert any(len(frame) < 10 for frame in frames)
    assert any(len(frame) > 1_024 for frame in frames)
