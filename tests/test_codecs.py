"""Gradient codecs: how much they lose, that nothing is lost for good, and the same bits on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from helpers.rings import local_listeners, run_ranks
from macft.collective.codecs.choose import choose, make
from macft.collective.codecs.quantization import BLOCK, Bfloat16, Int8, WireCodec
from macft.collective.codecs.registry import CODECS
from macft.collective.ring.ring import Ring
from macft.collective.settings import CODECS as CODEC_NAMES
from macft.collective.settings import CollectiveConfig, problems
from macft.collective.solo import Solo
from macft.errors import CheckpointError, CollectiveError, ProtocolError
from macft.model.joined_parameters import JoinedParameters
from macft.parallel.node_status import NodeStatus
from macft.training.gradients.buckets import buckets_of
from macft.training.gradients.gradient import LocalGradient
from macft.training.gradients.reduce import reduce_gradient
from macft.training.gradients.reducer import GradientReducer

WIRE_CODECS: list[WireCodec] = [Bfloat16(), Int8()]
LOSSY = ["bfloat16", "int8", "powersgd"]
SHAPES = {"layers.1.a": (576, 8), "layers.1.b": (8, 192), "layers.0.a": (576, 8), "layers.0.m": (7,)}


def in_ring(world_size: int, work: Callable[[Ring], Any]) -> list[Any]:
    return run_ranks(local_listeners(world_size, CollectiveConfig(piece_bytes=16 * 1024)), work)


def gradients(rank: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(rank)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


@settings(deadline=None, max_examples=60)
@given(npst.arrays(np.float32, st.integers(1, 700), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
@pytest.mark.parametrize("codec", WIRE_CODECS, ids=lambda codec: codec.name)
def test_rounding_is_bounded(codec: WireCodec, values: np.ndarray) -> None:
    data = codec.encode(values)
    assert len(data) == codec.encoded_bytes(values.size) < 4 * values.size + 5
    assert abs(len(data) / (4 * values.size) - codec.ratio) <= 4 / values.size
    error = np.abs(codec.decode(data.tobytes(), values.size) - values)
    for start in range(0, values.size, BLOCK):
        block = slice(start, start + BLOCK)
        largest = np.abs(values[block]).max()
        allowed = largest / 254 * 1.01 if codec.name == "int8" else np.abs(values[block]) / 256
        assert (error[block] <= allowed + 1e-37).all()


@pytest.mark.parametrize("codec", WIRE_CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(codec: WireCodec, bad: float) -> None:
    values = np.ones(300, np.float32)
    values[7] = bad
    assert not np.isfinite(codec.decode(codec.encode(values), 300)[7])


def test_every_name_that_the_configuration_accepts_has_an_implementation() -> None:
    for name in CODEC_NAMES:
        assert make(name, 1).name == ("none" if name == "auto" else name)
        assert problems(CollectiveConfig(codec=name)) == []
    assert set(CODEC_NAMES) == {*CODECS, "auto"}


def test_a_codec_without_an_implementation_is_an_error() -> None:
    with pytest.raises(CollectiveError, match="'int4' is not one of none, bfloat16, int8, powersgd"):
        make("int4", 1)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("name", LOSSY)
def test_all_ranks_end_with_the_same_bits_and_nothing_is_lost_for_good(name: str, world_size: int) -> None:
    """The same gradients again and again: what a step rounds away comes later, so the mean goes to the exact sum."""
    turns = 40
    exact = {name: sum(gradients(rank)[name] for rank in range(world_size)) for name in SHAPES}

    def work(ring: Ring) -> tuple[list[bytes], dict[str, np.ndarray], float]:
        exchange = GradientReducer(ring, name)
        bits, mean, first = [], {name: np.zeros(shape, np.float64) for name, shape in SHAPES.items()}, 0.0
        for turn in range(turns):
            arrays = {name: mx.array(value) for name, value in gradients(ring.rank).items()}
            mx.eval(arrays)
            exchange.all_reduce(list(arrays), list(arrays.values()))
            bits.append(b"".join(np.array(value).tobytes() for value in arrays.values()))
            for key, value in arrays.items():
                mean[key] += np.array(value) / turns
            if turn == 0:
                first = max(float(np.abs(mean[key] * turns - exact[key]).max()) for key in SHAPES)
        assert exchange.residual_norm > 0
        return bits, mean, first

    results = in_ring(world_size, work)
    assert all(bits == results[0][0] for bits, _, _ in results)
    mean, first = results[0][1:]
    assert first > 0
    last = max(float(np.abs(mean[key] - exact[key]).max()) for key in SHAPES)
    assert last < first / 4


@pytest.mark.parametrize(("name", "error"), [("none", 1e-6), ("bfloat16", 0.01), ("int8", 0.02), ("powersgd", 0.95)])
def test_ranks_with_and_without_joined_gradients_sum_alike(name: str, error: float) -> None:
    """One rank's kernels give the gradient in the pieces of its buckets, the other's parameter by parameter."""
    model = nn.Module()
    for key, shape in SHAPES.items():
        model[key.replace(".", "-")] = mx.zeros(shape)
    buckets = buckets_of(model, 20_000)
    assert [len(piece.names) for bucket in buckets for piece in bucket] == [3, 1]

    def work(ring: Ring) -> dict[str, np.ndarray]:
        own = {key.replace(".", "-"): mx.array(value) for key, value in gradients(ring.rank).items()}
        if ring.rank:
            own = {piece.name: piece.of(own) for bucket in buckets for piece in bucket}
        mx.eval(own)
        local = LocalGradient(own, buckets, [mx.array(1.0)], 3, 5, 0.0)
        status = NodeStatus(5, 1.0)
        reduced = reduce_gradient(
            GradientReducer(ring, name),
            local,
            max_norm=0.0,
            stop=False,
            change=False,
            computed=lambda: None,
            status=lambda _seconds: status,
        )
        joined = JoinedParameters.of(model).join(reduced.gradient)["small-float32"]
        return {"joined": np.array(joined), "norm": np.array(reduced.metrics.norm)}

    first, second = in_ring(2, work)
    for key, value in first.items():
        assert value.tobytes() == second[key].tobytes()
    exact = np.concatenate([sum(gradients(rank)[key] for rank in range(2)).reshape(-1) for key in SHAPES])
    assert np.linalg.norm(first["joined"] - exact) <= error * np.linalg.norm(exact)


@pytest.mark.parametrize(("name", "share"), [("bfloat16", 0.51), ("int8", 0.27), ("powersgd", 0.4)])
def test_fewer_bytes_are_sent(name: str, share: float) -> None:
    def work(ring: Ring) -> tuple[int, int]:
        sent = []
        for codec in ("none", name):
            before = ring.bytes_sent
            arrays = [np.ones((576, 64), np.float32) for _ in range(8)]
            GradientReducer(ring, codec).all_reduce([str(i) for i in range(8)], arrays)
            sent.append(ring.bytes_sent - before)
        return sent[0], sent[1]

    for exact, coded in in_ring(2, work):
        assert 0 < coded < share * exact


@pytest.mark.parametrize("name", LOSSY)
def test_memory_survives_a_checkpoint(name: str) -> None:
    def reduced(exchange: GradientReducer, rank: int, turns: int) -> bytes:
        for _ in range(turns):
            arrays = list(gradients(rank).values())
            exchange.all_reduce(list(SHAPES), arrays)
        return b"".join(array.tobytes() for array in arrays)

    def work(ring: Ring) -> bool:
        whole = GradientReducer(ring, name)
        expected = reduced(whole, ring.rank, 5)
        first, second = GradientReducer(ring, name), GradientReducer(ring, name)
        reduced(first, ring.rank, 3)
        second.restore(first.capture())
        return reduced(second, ring.rank, 2) == expected

    assert in_ring(3, work) == [True] * 3


@pytest.mark.parametrize("name", LOSSY)
def test_fewer_ranks_go_on_with_what_all_of_them_owed(name: str) -> None:
    def work(ring: Ring) -> tuple[list[bytes], dict[str, np.ndarray]]:
        exchange = GradientReducer(ring, name)
        exchange.all_reduce(list(SHAPES), list(gradients(ring.rank).values()))
        return exchange.capture(), exchange._codec.state()

    results = in_ring(3, work)
    alone = GradientReducer(Solo(), name)
    alone.restore(results[0][0])
    for key, value in alone._codec.state().items():
        if not key.startswith("q/"):
            np.testing.assert_allclose(value, sum(state[key] for _, state in results), rtol=1e-5, atol=1e-6)


def test_damaged_memory_is_refused() -> None:
    for blobs in ([b"\xc1"], [b"\x80"], [b"\x01"]):
        with pytest.raises(CheckpointError, match="damaged"):
            GradientReducer(Solo(), "int8").restore(blobs)


def test_ranks_with_different_codecs_are_told_so() -> None:
    def work(ring: Ring) -> str:
        codec = make(["int8", "bfloat16"][ring.rank], 1)
        with pytest.raises(ProtocolError) as caught:
            codec.all_reduce(ring, ["a"], [np.ones(1000, np.float32)])
        return str(caught.value)

    assert all("do all ranks run the same" in told for told in in_ring(2, work))


def test_auto_takes_the_least_lossy_codec_that_is_fast_enough() -> None:
    assert choose(1.0, 0.01)[0] == "none"
    assert choose(1.0, 0.08)[0] == "bfloat16"
    assert choose(1.0, 0.15)[0] == "int8"
    assert choose(10.0, 9.9)[0] == "int8"


def test_auto_comes_to_the_same_choice_on_all_ranks_and_remembers_it() -> None:
    def work(ring: Ring) -> tuple[str, str, str]:
        exchange = GradientReducer(ring, "auto")
        notes = [exchange.observe(1.0, 0.08 if ring.rank == 0 else 0.0) for _ in range(8)]
        later = GradientReducer(ring, "auto")
        later.restore(exchange.capture())
        assert later.observe(1.0, 0.5) == ""
        return exchange.codec, later.codec, "".join(notes)

    for codec, later, note in in_ring(2, work):
        assert codec == later == "bfloat16"
        assert note.startswith("collective.codec=auto: exchanging the gradient took 0.080 s of a step of 1.000 s")


def test_settings_name_their_wrong_keys() -> None:
    wrong = [CollectiveConfig(codec="zip"), CollectiveConfig(powersgd_rank=0)]
    wrong.append(CollectiveConfig(backend="mlx", codec="int8"))
    keys = ["collective.codec", "collective.powersgd_rank", "collective.codec"]
    assert [problems(config)[0].split(":")[0] for config in wrong] == keys
