"""Frame headers: what is packed comes back, and nothing else is believed."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from macft.collective.wire import (
    CALL_NAMES,
    DATA_HEADER_BYTES,
    MAX_HEADER_BYTES,
    PROTOCOL_VERSION,
    Cause,
    Header,
    Kind,
    pack,
    split_address,
    unpack,
)
from macft.errors import ProtocolError

PEER = "rank 1 (studio)"
SMALL = st.integers(0, 65_535)
U32 = st.integers(0, 2**32 - 1)
TEXT = st.text(max_size=200)


def headers(kinds: st.SearchStrategy[Kind], **fields: st.SearchStrategy[object]) -> st.SearchStrategy[Header]:
    every = {"kind": kinds, "generation": U32, "sender": SMALL, **fields}
    return st.fixed_dictionaries(every).map(lambda values: Header(**values))


PLACE = {"sequence": st.integers(0, 2**63 - 1), "hop": st.integers(0, 131_072), "piece": U32}
SIZE = {"length": st.integers(0, 2**30)}
BLOBS = st.sampled_from([kind for kind in CALL_NAMES if kind != Kind.PIECE])
HEADERS = st.one_of(
    headers(BLOBS, **PLACE, **SIZE, total=st.integers(0, 2**36)),
    headers(
        st.just(Kind.PIECE),
        **PLACE,
        **SIZE,
        total=st.integers(0, 2**40),
        layout=U32,
        dtype=st.sampled_from(["<f4", "<f8"]),
    ),
    headers(st.just(Kind.HELLO), text=TEXT),
    headers(st.just(Kind.CREDIT), frames=SMALL),
    headers(st.just(Kind.GOODBYE), cause=st.sampled_from(Cause).map(int), culprit=SMALL, text=TEXT),
    headers(st.just(Kind.STREAM), port=SMALL, text=TEXT),
)


@given(HEADERS)
def test_a_header_comes_back_as_it_was(header: Header) -> None:
    assert unpack(pack(header), PEER) == header


OF_DATA_SIZE = st.binary(min_size=DATA_HEADER_BYTES - 2, max_size=DATA_HEADER_BYTES - 2)


@given(st.one_of(st.binary(max_size=200), OF_DATA_SIZE.map(lambda rest: bytes([PROTOCOL_VERSION, Kind.PIECE]) + rest)))
def test_random_bytes_are_a_header_or_refused_by_name(data: bytes) -> None:
    try:
        header = unpack(data, PEER)
    except ProtocolError as error:
        assert str(error).startswith("rank 1 (studio) ")  # noqa: PT017
        return
    assert pack(header) == data


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary())


@given(st.lists(st.one_of(SCALARS, st.lists(SCALARS, max_size=3)), max_size=12), st.sampled_from(Kind))
def test_well_formed_msgpack_is_a_header_or_a_protocol_error(fields: list[object], kind: Kind) -> None:
    data = msgpack.packb([PROTOCOL_VERSION, kind, *fields])
    try:
        header = unpack(data, PEER)
    except ProtocolError:
        return
    assert pack(header) == data


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (0, 9, "speaks protocol version 9, this rank 4"),
        (1, 99, "unknown kind 99"),
        (1, True, "unknown kind True"),
        (1, "two\nlines", r"unknown kind 'two\nlines'"),
        (3, -1, "sender"),
        (4, 2**63, "cause"),
        (4, 1.0, "cause"),
        (5, True, "culprit"),
        (6, "x" * 401, "text"),
        (6, 1, "text"),
    ],
)
def test_a_wrong_field_is_named(place: int, value: object, told: str) -> None:
    fields = msgpack.unpackb(pack(Header(Kind.GOODBYE, 0, 1, cause=1, culprit=1, text="why")))
    fields[place] = value
    with pytest.raises(ProtocolError, match=r"rank 1 \(studio\)") as caught:
        unpack(msgpack.packb(fields), PEER)
    assert told in str(caught.value)


GOOD = Header(Kind.PIECE, 0, 1, 5, 1024, 7, 1, 0, "<f4", 512)


@pytest.mark.parametrize(
    "change",
    [
        {"sequence": 2**63},
        {"total": 2**41},
        {"hop": 131_073},
        {"length": 2**31},
        {"dtype": ""},
        {"kind": Kind.GATHER},
    ],
)
def test_a_wrong_field_of_data_is_named(change: dict[str, Any]) -> None:
    name = next(iter(change))
    with pytest.raises(ProtocolError, match=r"rank 1 \(studio\)") as caught:
        unpack(pack(GOOD._replace(**change)), PEER)
    assert ("dtype" if name == "kind" else name) in str(caught.value)


def test_data_of_an_unknown_kind_is_refused() -> None:
    data = bytearray(pack(GOOD))
    data[1] = 99
    with pytest.raises(ProtocolError, match="unknown kind 99"):
        unpack(data, PEER)


def test_a_long_header_is_refused_unread() -> None:
    with pytest.raises(ProtocolError, match="1025 bytes; 1024 are the most"):
        unpack(bytes(MAX_HEADER_BYTES + 1), PEER)


def test_a_blob_beyond_the_limit_is_refused() -> None:
    with pytest.raises(ProtocolError, match="total"):
        unpack(pack(Header(Kind.GATHER, 0, 1, 1, total=2**37)), PEER)


@given(st.text())
def test_an_address_is_host_and_port_or_a_value_error(text: str) -> None:
    try:
        host, port = split_address(text)
    except ValueError:
        return
    assert host in text
    assert 0 <= port <= 65_535


def test_addresses() -> None:
    assert split_address("studio.local:7071") == ("studio.local", 7071)
    assert split_address("[fe80::1]:7071") == ("fe80::1", 7071)
    with pytest.raises(ValueError, match="not host:port"):
        split_address("studio.local")
