"""Every error macft raises on purpose.

::

    MacftError                  base; str() is one line a user can act on
    ├── ConfigError             a wrong key, type, value or combination; found before any model loads
    ├── ModelError              the model can't be found, fetched, verified or read
    ├── DataError               the dataset can't be found, read or understood
    ├── CheckpointError         no checkpoint can be read, or it doesn't fit this run
    ├── LaunchError             a host of the cluster can't be reached, paired with or started
    ├── CollectiveError         communication between ranks
    │   ├── PeerTimeout         a named peer stayed silent longer than the time allowed
    │   ├── PeerLost            the connection to a named peer broke
    │   │   └── PeerStopped     its user stopped it
    │   ├── MembershipChanged   a peer was lost or wants to join; the others can go on in a new ring
    │   ├── ProtocolError       a frame or message that breaks the protocol
    │   └── RendezvousError     the ranks could not find or agree with each other
    └── TrainingError           training can't go on
        ├── NonFiniteLoss       the loss or the gradient became NaN or infinite
        └── RanksDiverged       the ranks no longer hold the same parameters
"""

from __future__ import annotations


class MacftError(Exception):
    """Base of all errors macft raises on purpose."""

    exit_code = 1
    needs_logs = False
    """Whether the logs in the run's folder tell more than the message."""


class ConfigError(MacftError):
    """The configuration is wrong. Exit status 2, as command-line tools use for bad usage."""

    exit_code = 2


class ModelError(MacftError):
    """The model can't be found, fetched, verified or read."""


class DataError(MacftError):
    """The dataset can't be found, read or understood."""


class CheckpointError(MacftError):
    """No checkpoint can be read, or the one named doesn't fit this run."""


class LaunchError(MacftError):
    """A host of the cluster can't be reached, paired with or started."""


class CollectiveError(MacftError):
    """Communication between the ranks failed."""

    needs_logs = True


class PeerTimeout(CollectiveError):
    """A named peer stayed silent longer than the time allowed."""


class PeerLost(CollectiveError):
    """The connection to a named peer broke."""


class PeerStopped(PeerLost):
    """A named peer has left because its user stopped it."""


class MembershipChanged(CollectiveError):
    """A peer was lost, or one wants to join: the ring has ended, and those who are left can form a new one."""


class ProtocolError(CollectiveError):
    """A frame or message that breaks the protocol."""


class RendezvousError(CollectiveError):
    """The ranks could not find each other or do not agree on version, run, settings or contents."""


class TrainingError(MacftError):
    """Training can't go on."""


class NonFiniteLoss(TrainingError):
    """The loss or the gradient became NaN or infinite; ``updates``: the updates that the run's progress counts."""

    def __init__(self, message: str, updates: int = 0):
        super().__init__(message)
        self.updates = updates


class RanksDiverged(TrainingError):
    """The ranks no longer hold bit-identical parameters."""
