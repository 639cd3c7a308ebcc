"""What all nodes must have alike, as texts by name: settings and versions when they meet, then contents."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NoReturn, TypeAlias

import msgpack

from macft.collective.base import Collective
from macft.errors import CollectiveError, MacftError, MembershipChanged, RendezvousError

Texts: TypeAlias = Mapping[str, str]
"""For example ``{"seed": "0"}`` or ``{"training rows": "40 rows (5ca1ab1e0ddba115)"}``."""

MAX_TEXTS = 500
MAX_TEXT = 255
_MAX_NAMED = 6
_NOTHING = "nothing"


def read_texts(value: object) -> dict[str, str] | None:
    """``value``, which came from the wire; None if it is not :data:`Texts` or is larger than any node sends."""
    if not isinstance(value, dict) or len(value) > MAX_TEXTS:
        return None
    texts = [text for item in value.items() for text in item]
    return value if all(isinstance(text, str) and len(text) <= MAX_TEXT for text in texts) else None


def difference(theirs: Texts, ours: Texts) -> str:
    """What differs, in words: ``seed: 1 instead of 0``; empty if nothing does."""
    return _listed(
        [
            f"{_shown(name)}: {_shown(theirs.get(name, _NOTHING))} instead of {_shown(ours.get(name, _NOTHING))}"
            for name in {**ours, **theirs}
            if theirs.get(name) != ours.get(name)
        ]
    )


def gather(collective: Collective, host: str, own: Texts) -> dict[str, Texts]:
    """All ranks' texts, by a rank's number and ``host``, its name in messages. A collective call."""
    blobs = collective.all_gather(msgpack.packb([host, dict(own)]))
    received = map(_received, blobs)
    return {f"rank {rank} ({_shown(name)})": texts for rank, (name, texts) in enumerate(received)}


def disagreements(gathered: Mapping[str, Texts]) -> dict[str, str]:
    """For each name whose texts differ between the ranks of :func:`gather`, which rank has what; empty if none does."""
    names = {name: None for texts in gathered.values() for name in texts}
    found = {}
    for name in names:
        values = [texts.get(name, _NOTHING) for texts in gathered.values()]
        if len(set(values)) > 1:
            found[name] = _who_has_what(list(gathered), values)
    return found


def refuse_together(collective: Collective, error: MacftError) -> NoReturn:
    """Raises ``error``, which all ranks raise alike, once all of them are about to. A collective call.

    A rank that left before the others know why would look lost to them, and an elastic run goes on without it.
    """
    with contextlib.suppress(CollectiveError):  # this rank knows enough
        collective.barrier()
    raise error


def require_those_of(collective: Collective, source: int, own: Texts) -> None:
    """Compares this rank's texts with those of rank ``source``. A collective call.

    Raises:
        RendezvousError: They differ.
        MembershipChanged: Those of another rank differ, which leaves; the others can form a ring without it.
    """
    gathered = list(gather(collective, "", own).values())
    if text := difference(own, gathered[source]):
        raise RendezvousError(f"this node differs from the run: {text}; give all nodes the same files and versions")
    for rank, theirs in enumerate(gathered):
        if text := difference(theirs, own):
            raise MembershipChanged(f"rank {rank} differs from the others: {text}")


def _received(blob: bytes) -> tuple[str, Texts]:
    host, texts = msgpack.unpackb(blob)
    return str(host), read_texts(texts) or {}


def _who_has_what(hosts: Sequence[str], values: Sequence[str]) -> str:
    """``rank 2 (c) has X, the other 2 nodes Y``; of two nodes both are named."""
    common, count = Counter(values).most_common(1)[0]  # of equally frequent ones that of the lowest rank
    odd = [f"{host} has {_shown(value)}" for host, value in zip(hosts, values, strict=True) if value != common]
    rest = f"the other {count} nodes" if count > 1 else hosts[values.index(common)]
    return f"{_listed(odd)}, {rest} {'have' if count > 1 else 'has'} {_shown(common)}"


def _listed(items: Sequence[str]) -> str:
    more = [f"and {len(items) - _MAX_NAMED} more"] if len(items) > _MAX_NAMED else []
    return ", ".join([*items[:_MAX_NAMED], *more])


def _shown(text: str) -> str:
    return "".join(filter(str.isprintable, text[:MAX_TEXT]))
