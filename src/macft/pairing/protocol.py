"""The pairing protocol: forms a cluster of machines that share a code.

One machine is the host (:mod:`~macft.pairing.host`), all others are guests (:mod:`~macft.pairing.guest`). Messages are
maps, encrypted by :class:`~macft.pairing.pake.Channel`::

    guest                                      host
      |  Member ------------------------------->  |
      |  <------------------ {token} or {refused} |
      |  {ready: True} ------------------------>  |   the guest answers those who send the token from now on
      |  <------------- {measure: address, port}  |   for each link that this guest measures
      |  {latency, bandwidth} or {failed} ----->  |
      |  <---- {hosts, ssh, python, keys}         |   the cluster, once all links are measured

This is version :data:`~macft.pairing.pake.PAIRING_VERSION`.
"""

from __future__ import annotations

from macft.errors import LaunchError
from macft.pairing.pake import NOT_THE_PROTOCOL, Message

HANDSHAKE_SECONDS = 60.0
"""How long either side waits for an answer that needs no measurement. A busy machine may take many seconds."""
MEASURE_SECONDS = 180.0
"""How long the host waits for a guest's measurement of a link."""


def checked(message: Message) -> Message:
    """``message``. Raises LaunchError with the other side's reason if it is a refusal."""
    if "refused" in message:
        raise LaunchError(str(message["refused"])[:1000])
    return message


def texts(message: Message, key: str) -> list[str]:
    """A list of texts; an empty one if there is none. Raises LaunchError if it is something else."""
    values = message.get(key, [])
    if not isinstance(values, list):
        raise LaunchError(NOT_THE_PROTOCOL)
    return [str(value) for value in values]
