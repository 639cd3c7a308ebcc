"""The ring: right sums, the same bits everywhere, and an end that names the rank to blame."""

from __future__ import annotations

import gc
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import psutil
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.rings import local_listeners, next_message, run_ranks
from macft.collective.base import Collective
from macft.collective.dtypes import from_bfloat16, to_bfloat16
from macft.collective.ring.listener import Listener
from macft.collective.ring.ring import Ring
from macft.collective.settings import CollectiveConfig, problems
from macft.collective.solo import Solo
from macft.collective.wire import Header, Kind, pack
from macft.errors import CollectiveError, PeerLost, PeerStopped, PeerTimeout, ProtocolError

Work = Callable[[Ring], Any]
QUICK = CollectiveConfig(timeout=1.0, heartbeat=0.2)
"""For what ends by the timeout, and nothing else: on a busy machine a rank may be silent for so long."""
both_ways = pytest.mark.parametrize("streams", [True, False], ids=["streams", "zeromq"])


def in_threads(world_size: int, work: Work, config: CollectiveConfig | None = None) -> list[Any]:
    """What ``work`` returns, or the error it raises, on each rank of a ring; every rank is a thread."""
    return run_ranks(local_listeners(world_size, config), work, catch=Exception)


def mine(rank: int, size: int, dtype: str = "f4") -> np.ndarray:
    return np.random.default_rng([rank, size]).standard_normal(size).astype(dtype)


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@both_ways
def test_sums_are_right_and_bit_identical(world_size: int, dtype: str, streams: bool) -> None:
    sizes = [0, 1, world_size - 1, world_size, 1000, 16_384, 100_003, 300_001]

    def work(ring: Ring) -> list[np.ndarray]:
        arrays = [mine(ring.rank, size, dtype) for size in sizes]
        for array in arrays:
            ring.all_reduce([array])
        return arrays

    found = in_threads(world_size, work, CollectiveConfig(streams=streams))
    for place, size in enumerate(sizes):
        expected = sum(mine(rank, size, dtype).astype("f8") for rank in range(world_size))
        np.testing.assert_allclose(found[0][place], expected, rtol=1e-5, atol=1e-5)
        assert len({arrays[place].tobytes() for arrays in found}) == 1


@settings(max_examples=12, deadline=None)
@given(
    st.integers(2, 4),
    st.lists(st.tuples(st.sampled_from(["f4", "f8"]), st.integers(0, 20_000)), max_size=5),
)
def test_several_arrays_of_any_sizes_in_one_call(world_size: int, kinds: list[tuple[str, int]]) -> None:
    def work(ring: Ring) -> list[np.ndarray]:
        arrays = [mine(ring.rank, size, dtype).reshape(-1, 1) for dtype, size in kinds]
        ring.all_reduce(arrays)
        return arrays

    found = in_threads(world_size, work, CollectiveConfig(piece_bytes=8192))
    for place, (dtype, size) in enumerate(kinds):
        expected = sum(mine(rank, size, dtype).astype("f8") for rank in range(world_size)).reshape(-1, 1)
        np.testing.assert_allclose(found[0][place], expected, rtol=1e-4, atol=1e-4)
        assert len({arrays[place].tobytes() for arrays in found}) == 1


@both_ways
def test_an_array_may_change_as_soon_as_its_sum_is_there(streams: bool) -> None:
    """Large arrays are sent from the caller's own memory, which the caller overwrites at once."""

    def work(ring: Ring) -> bool:
        array = np.empty(600_000, np.float32)
        right = True
        for turn in range(40):
            array[:] = turn + ring.rank
            ring.all_reduce([array])
            right = right and bool((array == 3 * turn + 3).all())
        return right

    assert in_threads(3, work, CollectiveConfig(piece_bytes=128 * 1024, streams=streams)) == [True] * 3


def test_infinity_and_nan_are_summed_without_a_word() -> None:
    def work(ring: Ring) -> list[float]:
        array = np.array([np.inf if ring.rank else -np.inf, 3e38], np.float32)
        ring.all_reduce([array])
        return array.tolist()

    assert np.array_equal(in_threads(2, work), [[np.nan, np.inf]] * 2, equal_nan=True)


@pytest.mark.parametrize("world_size", [2, 3, 5])
@both_ways
def test_blobs_reach_every_rank(world_size: int, streams: bool) -> None:
    def blob(rank: int) -> bytes:
        return bytes([rank]) * (300_000 * rank)

    def work(ring: Ring) -> None:
        everyone = [blob(rank) for rank in range(world_size)]
        assert ring.all_gather(blob(ring.rank)) == everyone
        for root in range(world_size):
            assert ring.broadcast(blob(ring.rank), root) == everyone[root]
        for turn in range(100):  # more than fit the window: a root must not run away from the others
            assert ring.broadcast(bytes([turn]) if ring.rank == 0 else b"") == bytes([turn])
        ring.barrier()

    assert in_threads(world_size, work, CollectiveConfig(piece_bytes=65_536, streams=streams)) == [None] * world_size


def test_a_barrier_holds_until_the_last_rank_comes() -> None:
    arrived: list[int] = []

    def work(ring: Ring) -> int:
        for rank in range(3):  # one after the other
            if ring.rank == rank:
                arrived.append(rank)
            ring.barrier()
        return len(arrived)

    assert in_threads(3, work) == [3, 3, 3]
    assert arrived == [0, 1, 2]


def test_wrong_arrays_are_refused_before_anything_is_sent() -> None:
    def work(ring: Ring) -> float:
        read_only = np.ones(4, np.float32)
        read_only.flags.writeable = False
        for wrong in (np.ones(4, np.int64), np.ones((4, 4), np.float32).T[1:], read_only, np.ones(2, ">f4")):
            with pytest.raises(ValueError, match="array 1 is"):
                ring.all_reduce([np.ones(2, np.float32), wrong])
        good = np.ones(3, np.float32)
        ring.all_reduce([good])
        return float(good.sum())

    assert in_threads(2, work) == [6.0, 6.0]


def differ(first: Work, second: Work, world_size: int = 2) -> list[Exception]:
    """Rank 0 does ``first``, the others ``second``."""
    return in_threads(world_size, lambda ring: (first if ring.rank == 0 else second)(ring))


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (lambda r: r.barrier(), lambda r: r.all_reduce([np.ones(256, "f4")]), "all-reduce 1 of 1024 bytes"),
        (
            lambda r: r.all_reduce([np.ones(9, "f4")]),
            lambda r: r.all_reduce([np.ones(8, "f4")]),
            "1 of 32 bytes",
        ),
        (
            lambda r: r.all_reduce([np.ones(4, "f8")]),
            lambda r: r.all_reduce([np.ones(8, "f4")]),
            "other shapes",
        ),
        (lambda r: r.all_gather(b"a"), lambda r: r.barrier(), "barrier 1"),
    ],
)
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_out_of_step_are_told_so(first: Work, second: Work, told: str, world_size: int) -> None:
    errors = differ(first, second, world_size)
    assert {type(error) for error in errors} == {ProtocolError}
    assert any(told in str(error) for error in errors)
    assert all("is at" in str(error) and "this rank at" in str(error) for error in errors)


def test_a_rank_that_leaves_early_is_named() -> None:
    # All have joined after the first barrier: who is still joining hears only that a neighbour's process ended.
    errors = differ(Ring.barrier, lambda ring: (ring.barrier(), ring.barrier()), 4)
    assert errors[0] is None
    assert {type(error) for error in errors[1:]} == {PeerLost}
    assert all("rank 0" in str(error) and "left the ring" in str(error) for error in errors[1:])


def test_a_rank_that_fails_by_itself_tells_the_others_why() -> None:
    def fail(ring: Ring) -> None:
        ring.barrier()
        raise ArithmeticError("loss is not finite")

    errors = differ(fail, lambda ring: (ring.barrier(), ring.barrier()), 4)
    assert {type(error) for error in errors[1:]} == {PeerLost}
    told = [str(error) for error in errors[1:]]
    assert all("rank 0" in message and "loss is not finite" in message for message in told), told


def test_a_rank_whose_user_stops_it_is_not_lost() -> None:
    def stop(ring: Ring) -> None:
        ring.barrier()
        ring.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)

    def stop_at_the_end(ring: Ring) -> None:
        ring.barrier()
        ring.tell_stopped()

    for way in (stop, stop_at_the_end):
        errors = differ(way, lambda ring: (ring.barrier(), ring.barrier()), 4)
        assert {type(error) for error in errors[1:]} == {PeerStopped}
        assert all(str(error).startswith("rank 0 ") for error in errors[1:])
        assert all(str(error).endswith(" was stopped by its user") for error in errors[1:])


@pytest.mark.slow
def test_a_rank_that_computes_is_alive_for_as_long_as_patience_lasts() -> None:
    released = threading.Event()
    config = CollectiveConfig(timeout=3.0, heartbeat=0.2, patience=4.0)

    def work(ring: Ring) -> None:
        if ring.rank == 2:
            released.wait(20)  # far longer than `timeout`, and none the worse for it
        try:
            ring.all_reduce([np.ones(400_000, "f4")])
        finally:
            released.set()

    errors = in_threads(4, work, config)
    assert {type(error) for error in errors} == {PeerTimeout}
    told = [str(error) for error in errors]
    assert all("rank 2" in message and "collective.patience" in message for message in told), told


def test_a_failed_ring_keeps_saying_why() -> None:
    def work(ring: Ring) -> str:
        told = []
        for _ in range(2):
            try:
                ring.all_reduce([np.ones(2 + ring.rank, "f4")])
            except ProtocolError as error:
                told.append(str(error))
        assert told[0] == told[1]
        return told[0]

    assert all("all-reduce 1" in told for told in in_threads(2, work))


RANK = """
import json, signal, sys
import mlx.core as mx
import numpy as np
from macft.collective.dtypes import from_bfloat16, to_bfloat16
from macft.collective.ring.listener import Listener
from macft.collective.ring.ring import Ring
from macft.collective.settings import CollectiveConfig

def say(*words):
    print(json.dumps(words), flush=True)

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore it
rank, options, call_bytes = int(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
listener = Listener("127.0.0.1:0", CollectiveConfig(**options))
say(listener.address)
addresses = json.loads(sys.stdin.readline())
try:
    with Ring(rank, len(addresses), addresses, listener) as ring:
        array = np.ones(call_bytes // 4, np.float32)
        for turn in range(1_000_000):
            array[:] = 1.0
            ring.all_reduce([array])
            if turn == 20:
                say("in step")
except BaseException as error:
    say(type(error).__name__, str(error))
"""


@contextmanager
def processes(world_size: int, call_bytes: int, **options: float) -> Iterator[list[subprocess.Popen[str]]]:
    """Ranks as processes that reduce arrays without end and say how they ended; yielded once in step."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), json.dumps(options), str(call_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        addresses = [next_message(rank)[0] for rank in ranks]
        for rank in ranks:
            assert rank.stdin is not None
            print(json.dumps(addresses), file=rank.stdin, flush=True)
        assert [next_message(rank) for rank in ranks] == [["in step"]] * world_size
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "call_bytes"),
    [
        (2, 4096),
        pytest.param(2, 8 << 20, marks=pytest.mark.slow),
        pytest.param(4, 4096, marks=pytest.mark.slow),
        pytest.param(4, 8 << 20, marks=pytest.mark.slow),
    ],
)
@both_ways
def test_a_killed_rank_is_named_by_all_others(world_size: int, call_bytes: int, streams: bool) -> None:
    with processes(world_size, call_bytes, streams=streams) as ranks:
        ranks[1].kill()
        for rank in (0, *range(2, world_size)):
            kind, message = next_message(ranks[rank])  # long before `timeout`, which is 30 s
            assert kind == "PeerLost"
            assert "rank 1 (127.0.0.1" in message
            assert "is gone" in message


@pytest.mark.slow
@both_ways
def test_a_stopped_rank_is_named_by_all_others(streams: bool) -> None:
    with processes(4, 8 << 20, timeout=3.0, heartbeat=0.2, streams=streams) as ranks:
        ranks[2].send_signal(signal.SIGSTOP)
        for rank in (0, 1, 3):
            kind, message = next_message(ranks[rank])
            assert kind == "PeerTimeout"
            assert "rank 2 (127.0.0.1" in message
            assert "sent nothing for 3 s during all-reduce" in message


def test_ctrl_c_in_a_call_leaves_a_ring_that_closes() -> None:
    with processes(3, 8 << 20) as ranks:
        ranks[0].send_signal(signal.SIGINT)
        assert next_message(ranks[0])[0] == "KeyboardInterrupt"
        for rank in ranks[1:]:
            kind, message = next_message(rank)
            assert kind == "PeerStopped"
            assert "rank 0" in message
        assert ranks[0].wait(60) == 0


def test_strangers_do_not_disturb() -> None:
    inside, outside, answered = threading.Barrier(3), threading.Barrier(3), threading.Event()
    addresses: dict[int, str] = {}

    def work(ring: Ring) -> float:
        addresses[ring.rank] = ring.address
        assert isinstance(ring, Collective)
        inside.wait(60)
        outside.wait(60)
        array = np.ones(500_000, np.float32)
        for _ in range(3):
            ring.all_reduce([array])
        over = np.zeros(1)
        while not over[0]:  # strangers are answered now and then
            over[0] = ring.rank == 0 and answered.is_set()
            ring.all_reduce([over])
        return float(array[0])

    with ThreadPoolExecutor(1) as pool:
        ring = pool.submit(in_threads, 2, work)
        inside.wait(60)
        host, port = addresses[0].split(":")
        web = socket.create_connection((host, int(port)))
        web.sendall(b"GET / HTTP/1.1\r\n\r\n")
        context = zmq.Context()
        stranger = context.socket(zmq.DEALER)
        stranger.linger = 0
        stranger.connect(f"tcp://{addresses[0]}")
        for garbage in (b"", b"\xff" * 100, pack(Header(Kind.BARRIER, 0, 1, 1))):
            stranger.send(garbage)
        stranger.send_multipart([pack(Header(Kind.PIECE, 0, 1, 1, dtype="<f4", length=4)), b"1234"])
        stranger.send(pack(Header(Kind.HELLO, 0, 1, text="another run")))
        outside.wait(60)
        told = stranger.poll(60_000)
        answered.set()
        assert told, "a macft of another run is told that it is not welcome"
        assert ring.result(60) == [8.0, 8.0]
        web.close()
        stranger.close()
        context.term()


def test_a_rank_of_another_run_is_refused() -> None:
    listeners = local_listeners(2)
    addresses = [listener.address for listener in listeners]

    def join(rank: int) -> CollectiveError:
        with pytest.raises(CollectiveError) as caught:
            Ring(rank, 2, addresses, listeners[rank], ring_id=f"run {rank}")
        return caught.value

    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(join, range(2)))
    assert any(isinstance(error, ProtocolError) and "of its own run" in str(error) for error in errors)


def test_an_absent_rank_is_named() -> None:
    listener = Listener("127.0.0.1:0", QUICK)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        absent = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(PeerTimeout, match=r"rank 0 can't reach rank 1 \(ghost, 127.*nothing listens there"):
            Ring(0, 2, [listener.address, absent], listener, names=["here", "ghost"])


def test_an_address_in_use_is_named() -> None:
    listener = Listener("127.0.0.1:0", QUICK)
    with pytest.raises(CollectiveError, match=f"can't listen on {listener.address}"):
        Listener(listener.address, QUICK)
    listener.close()


@pytest.mark.slow
def test_ten_thousand_calls_of_gradient_like_shapes() -> None:
    shapes = [(8, 576), (8,), (3, 5, 7), (1,), (576, 8), (2048,)]
    calls = 10_000

    def work(ring: Ring) -> int:
        wrong = 0
        for turn in range(calls):
            arrays = [np.full(shapes[turn % 6], 1.0, np.float32), np.full(4, 2.0)]
            ring.all_reduce(arrays)
            wrong += bool(arrays[0].flat[-1] != 2.0) + bool(arrays[1][0] != 4.0)
        return wrong

    assert in_threads(2, work) == [0, 0]


def test_nothing_is_left_open() -> None:
    in_threads(2, lambda ring: ring.all_reduce([np.ones(400_000, "f4")]))  # pyzmq keeps one thread from here on
    gc.collect()  # what earlier tests have left would be closed meanwhile
    process = psutil.Process()
    threads, descriptors = set(threading.enumerate()), process.num_fds()
    in_threads(3, lambda ring: ring.all_reduce([np.ones(400_000, "f4")]))
    differ(lambda _: None, lambda ring: ring.barrier(), 3)
    assert set(threading.enumerate()) <= threads
    assert process.num_fds() == descriptors


def test_close_twice_and_then_call() -> None:
    def work(ring: Ring) -> None:
        ring.barrier()
        ring.close()
        ring.close()
        ring.barrier()

    assert all("is closed" in str(error) for error in in_threads(2, work))


def test_solo_is_a_collective() -> None:
    with Solo() as solo:
        assert isinstance(solo, Collective)
        array = np.arange(3.0)
        solo.all_reduce([array])
        solo.barrier()
        assert array.tolist() == [0.0, 1.0, 2.0]
        assert solo.all_gather(b"a") == [b"a"]
        assert solo.broadcast(b"a") == b"a"
        with pytest.raises(ValueError, match="root 1"):
            solo.broadcast(b"a", root=1)


def test_settings_name_their_wrong_keys() -> None:
    assert problems(CollectiveConfig()) == []
    wrong = CollectiveConfig(
        "mpi", timeout=-1.0, patience=float("nan"), heartbeat=0.0, piece_bytes=5001, bucket_bytes=1
    )
    keys = ["backend", "timeout", "patience", "heartbeat", "heartbeat", "piece_bytes", "bucket_bytes"]
    assert [line.split(":")[0] for line in problems(wrong)] == [f"collective.{key}" for key in keys]
    assert "multiple of 8" in problems(wrong)[-2]
    assert "must be from 4096 to" in problems(CollectiveConfig(piece_bytes=8))[0]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("kind", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("size", [1_000, 200_000])  # one that is exchanged whole, one that goes round in pieces
def test_mlx_arrays_are_summed_where_they_lie(world_size: int, kind: mx.Dtype, size: int) -> None:
    values = [mx.random.normal((size,), key=mx.random.key(rank)).astype(kind) for rank in range(world_size)]
    expected = np.array(sum(value.astype(mx.float32) for value in values))
    mx.eval(values)
    in_threads(world_size, lambda ring: ring.all_reduce([values[ring.rank]]))
    error = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 2e-2}[kind]
    for value in values:
        assert mx.array_equal(value, values[0])
        np.testing.assert_allclose(np.array(value.astype(mx.float32)), expected, rtol=error, atol=2 * error)


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
@settings(deadline=None)
def test_bfloat16_rounds_as_mlx_does(numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    ours = from_bfloat16(to_bfloat16(values))
    theirs = np.array(mx.array(values).astype(mx.bfloat16).astype(mx.float32))
    np.testing.assert_array_equal(ours, theirs)


def test_tuning_comes_out_alike_on_all_ranks() -> None:
    def work(ring: Ring) -> list[float]:
        ring.tune()
        sums = []
        for size in (1_000, 60_000, 120_000):
            array = np.ones(size, np.float32)
            ring.all_reduce([array])
            sums.append(float(array.sum() / size))
        return sums

    assert in_threads(4, work) == [[4.0] * 3] * 4
    assert in_threads(2, work) == [[2.0] * 3] * 2
