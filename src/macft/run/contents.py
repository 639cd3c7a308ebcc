"""The contents that decide a run's result: alike on all nodes before the first step, and the same after a resume.

Paths are not compared: each node may keep its model and its dataset where it likes. What a node has read is compared,
before the weights are loaded.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgpack

from macft.collective.base import Collective
from macft.collective.elastic import ElasticCollective
from macft.collective.matching import MAX_TEXT, Texts, difference, disagreements, gather, read_texts, refuse_together
from macft.config.schema import TrainConfig, is_scored
from macft.config.yaml import package_versions
from macft.data.digest import GROUP, first_different, order_digest, row_digests, split_digest
from macft.data.load import LoadedData, Split
from macft.data.order import RowOrder
from macft.data.template_clock import shows_time
from macft.device.durable import write_atomically
from macft.errors import CheckpointError, CollectiveError, MacftError, RendezvousError
from macft.model.files.contents import model_contents, template_contents
from macft.report.run_folder import RunFolder

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

log = logging.getLogger("macft.run")

_KEYS = {
    "model weights": "model.path",
    "model configuration": "model.path",
    "tokenizer": "model.path",
    "chat template": "model.path",
    "training rows": "dataset",
    "validation rows": "dataset",
    "test rows": "dataset",
    "sample rows": "dataset",
    "order of the training rows": "dataset",
}
"""Each part, and the key that says where it comes from."""
_FAILURE = "failure"
"""The name of the text of a node that can't read its contents."""
_NEVER_CHANGE = ("model weights", "model configuration", "training rows", "validation rows", "test rows")
"""What a resumed run must have as before. The other parts act through these, or they change bits only."""


def contents_of(
    config: TrainConfig, data: LoadedData, order: RowOrder, model_folder: Path, tokenizer: TokenizerWrapper
) -> dict[str, str]:
    """A text for each part of :data:`_KEYS`; ``test rows`` where they are scored, else ``sample rows``, if any.

    Raises:
        ModelError: A file of the model can't be read.
    """
    time = config.dataset.template_time if shows_time(tokenizer) else None
    parts = {
        **model_contents(model_folder),
        "chat template": template_contents(tokenizer, time),
        "training rows": split_digest(data.train),
        "validation rows": split_digest(data.valid),
        "order of the training rows": order_digest(order),
    }
    tests = "test rows" if is_scored(config) else "sample rows"
    return parts | ({tests: split_digest(data.test, with_records=True)} if data.test.rows else {})


@contextlib.contextmanager
def told_to_others(collective: Collective, host: str) -> Iterator[None]:
    """Tells an error in reading the contents to the others, who wait to compare them: an elastic run would go on."""
    try:
        yield
    except MacftError as error:
        with contextlib.suppress(CollectiveError):
            gather(collective, host, {_FAILURE: str(error)[:MAX_TEXT]})
        refuse_together(collective, error)


def agree_on_contents(
    collective: Collective, host: str, contents: Texts, train: Split, folder: RunFolder, *, resume: bool
) -> list[str]:
    """Makes sure that all nodes have the same contents, and with ``resume`` those that the run began with.

    A collective call. A newcomer is alone: it compares with what the run has told it. Returns lines for the user.

    Args:
        host: This node's name in messages.

    Raises:
        RendezvousError: The nodes' contents differ; says which part, and on which node. Or a node can't read them. All
            ranks raise it alike.
        CheckpointError: They are not what the checkpoints were made with. All ranks raise it alike.
    """
    if isinstance(collective, ElasticCollective):
        told = {} if collective.is_member else {part: t for part, t in collective.contents.items() if part in _KEYS}
        if told and (text := difference(contents, told)):
            raise RendezvousError(
                f"topology.join: this node's contents differ from the run's: {text}; copy the run's files here"
            )
    gathered = gather(collective, host, contents)
    if failed := [f"{who} can't start: {texts[_FAILURE]}" for who, texts in gathered.items() if _FAILURE in texts]:
        refuse_together(collective, RendezvousError(failed[0]))
    if differing := disagreements(gathered):
        refuse_together(collective, RendezvousError(_explained(collective, differing, train)))
    log.info("the contents of all nodes are the same: %s", contents)
    if isinstance(collective, ElasticCollective):
        collective.contents = {**collective.contents, **contents}  # with what else a run has told
    return _compare_with_stored(collective, host, contents, folder) if resume else []


def store_contents(folder: RunFolder, contents: Texts) -> None:
    """Keeps ``contents`` in the run's folder for a resume. A run goes on without where that can't be written."""
    try:
        write_atomically(folder.contents, json.dumps({**contents, **package_versions()}, indent=2) + "\n")
    except OSError as error:
        log.warning("can't write %s: %s", folder.contents, error)


def _explained(collective: Collective, differing: Mapping[str, str], train: Split) -> str:
    lines = []
    for part, who in differing.items():
        if part == "order of the training rows" and "training rows" in differing:
            continue  # it follows from their number
        first = ""
        if part == "training rows":
            with contextlib.suppress(CollectiveError):  # a lost node is no reason to go on
                first = f" (the first that differs is {_first_row(collective, train)})"
        lines.append(f"{part} ({_KEYS.get(part, part)}): {who}{first}")
    return f"the nodes' contents differ: {'; '.join(lines)}; copy the same files to all nodes"


def _first_row(collective: Collective, train: Split) -> str:
    """Which training row is the first that is not the same on all ranks. A collective call."""

    def first(digests: list[bytes]) -> int:
        return first_different([msgpack.unpackb(blob) for blob in collective.all_gather(msgpack.packb(digests))])

    start = first(row_digests(train.rows)) * GROUP
    row = start + first(row_digests(train.rows[start : start + GROUP], size=1))
    return train.places[row].in_split if row < len(train.places) else f"row {row + 1}, which is missing here"


def _compare_with_stored(collective: Collective, host: str, contents: Texts, folder: RunFolder) -> list[str]:
    """Compares ``contents`` with those that each rank's folder holds. A collective call."""
    stored = _stored(folder)
    changed = {part: text for part in _NEVER_CHANGE if (text := _changed(part, stored, contents))}
    record = f"{folder.contents} on {host} has what the run began with"
    complaint = "; ".join([*changed.values(), record]) if changed else ""
    if told := next(filter(None, collective.all_gather(complaint.encode())), b""):
        advice = "Put back the earlier ones, or start a new run with adapter.init_from"
        text = f"resume: the contents have changed: {told.decode()}. {advice}; to continue anyway, delete that file"
        refuse_together(collective, CheckpointError(text))
    now = {**contents, **package_versions()}
    notes = [text for part in now if part not in _NEVER_CHANGE and (text := _changed(part, stored, now))]
    return [f"resumed with other contents, so not bit for bit: {'; '.join(notes)}"] if notes else []


def _changed(part: str, stored: Texts, now: Texts) -> str:
    """How a part has changed, in words; empty where it has not, or one of both does not have it."""
    if part not in stored or part not in now or stored[part] == now[part]:
        return ""
    return difference({part: now[part]}, {part: stored[part]})


def _stored(folder: RunFolder) -> Texts:
    """The contents of the run as it began; empty where it has no checkpoint, or none were stored."""
    if not any(folder.checkpoints.glob("step-*")):
        return {}
    try:
        return read_texts(json.loads(folder.contents.read_text(encoding="utf-8"))) or {}
    except (OSError, ValueError):
        return {}
