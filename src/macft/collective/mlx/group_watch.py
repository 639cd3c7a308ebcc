"""Finds out from the ranks' health why a call of MLX will not complete."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from macft.collective.mlx.health import Health, ask
from macft.collective.settings import CollectiveConfig
from macft.errors import CollectiveError, PeerLost, PeerStopped, PeerTimeout, ProtocolError

_FAILURES: dict[str, type[CollectiveError]] = {
    "lost": PeerLost,
    "timeout": PeerTimeout,
    "protocol": ProtocolError,
    "stopped": PeerStopped,
}
_log = logging.getLogger("macft.ring")


class GroupFailure(NamedTuple):
    """Why the group has ended; ``kind`` is "lost", "timeout", "protocol" or "stopped"."""

    kind: str
    text: str

    @property
    def error(self) -> CollectiveError:
        """As an exception."""
        return _FAILURES[self.kind](self.text)


class GroupWatch:
    """Asks the other ranks for their health.

    Attributes:
        addresses: Of all ranks' health servers, by rank.

    Args:
        own: This rank's health.
        addresses: Those that are known already.
        settings: Its timeouts.
        names: Host names by rank, for messages.
        secret: Known to the ranks of this run only.
    """

    def __init__(
        self, own: Health, addresses: Sequence[str], settings: CollectiveConfig, names: Sequence[str], secret: str
    ):
        self.addresses = list(addresses)
        self._own, self._settings, self._names, self._secret = own, settings, names, secret
        # By rank: why it reports no health, and since when.
        self._unhealthy: dict[int, tuple[str, float]] = {}

    def begin_call(self) -> None:
        """A call begins: what was seen before does not count."""
        self._unhealthy.clear()

    def obstacle(self, call: str, seconds: float) -> GroupFailure | None:
        """Why ``call``, which has taken ``seconds`` so far, will not complete; None while it may."""
        timeout, patience = self._settings.timeout, self._settings.patience
        if self._own.operation == 1:  # the group has not formed
            if seconds > timeout:
                return GroupFailure("timeout", f"MLX's group did not form within {timeout:g} s; do all ranks run?")
            return None
        healths = self._ask_all()
        for rank, (state, since) in self._unhealthy.items():
            # MLX raises when a connection breaks; this is for failures that it does not notice.
            if (lasted := time.monotonic() - since) > timeout:
                kind = "lost" if state == "ended" else "timeout"
                return GroupFailure(kind, f"{self.name(rank)} has been {state} for {lasted:.0f} s while {call} went on")
        if (reported := self._reported(healths)) is not None:
            return reported
        for rank, health in healths.items():
            if health.operation == self._own.operation and health.call and health.call != call:
                text = f"{self.name(rank)} is at {health.call}, this rank at {call}"
                return GroupFailure("protocol", f"{text}; do all ranks run the same macft, data and configuration?")
        behind = {rank: health for rank, health in healths.items() if health.operation < self._own.operation}
        if behind and seconds > patience:
            rank = min(behind, key=lambda rank: behind[rank].operation)
            text = f"{self.name(rank)} is alive but did not reach {call} for {seconds:.0f} s"
            return GroupFailure("timeout", f"{text}; it may still compute: collective.patience sets the limit")
        all_stuck = all(health.call and health.seconds > timeout for health in healths.values())
        if not behind and not self._unhealthy and seconds > timeout and all_stuck:
            text = f"all ranks have been in {call} for {seconds:.0f} s and it does not end"
            text += ": MLX's communication hangs (mlx issue 4475); collective=ring does not"
            return GroupFailure("timeout", text)
        if seconds > patience:
            text = f"{call} did not end for {seconds:.0f} s; collective.patience sets the limit"
            return GroupFailure("timeout", text)
        return None

    def explain(self, call: str, error: str) -> GroupFailure:
        """Why MLX has raised ``error`` in ``call``, with the name of the rank that is gone if its health shows it."""
        if (reported := self._reported(self._ask_all())) is not None:
            return reported
        gone = " and ".join(self.name(rank) for rank in self._unhealthy) or "a neighbour"
        return GroupFailure("lost", f"{gone} left while {call} went on (MLX: {error})")

    def name(self, rank: int) -> str:
        """A rank in messages, with its host and address where they are known."""
        known = [*self._names[rank : rank + 1], *self.addresses[rank : rank + 1]]
        return f"rank {rank}" + (f" ({', '.join(dict.fromkeys(word for word in known if word))})" if known else "")

    def _ask_all(self) -> dict[int, Health]:
        healths = {}
        for rank, address in enumerate(self.addresses):
            if rank == self._own.rank:
                continue
            answer = ask(address, self._secret)
            if isinstance(answer, Health):
                healths[rank] = answer
                self._unhealthy.pop(rank, None)
            elif self._unhealthy.get(rank, ("", 0.0))[0] != answer:
                self._unhealthy[rank] = (answer, time.monotonic())
                _log.warning("%s is %s", self.name(rank), answer)
        return healths

    def _reported(self, healths: Mapping[int, Health]) -> GroupFailure | None:
        """The failure that another rank reports, if any does."""
        for health in healths.values():
            if health.reason:
                kind, _, reason = health.reason.partition(" ")
                return GroupFailure(kind if kind in _FAILURES else "lost", reason)
        return None
