"""TensorBoard events, through TensorBoard's own writer and protocol buffers: no torch, no TensorFlow."""

from __future__ import annotations

import html
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from macft.report.dotted import flat
from macft.report.events import (
    BlocksMoved,
    CheckpointSaved,
    Evaluated,
    Event,
    MetricScored,
    NodesChanged,
    Noted,
    RunEnded,
    RunStarted,
    SamplesShown,
    StepDone,
)
from macft.report.sample_table import markdown_table
from macft.report.scalars import Scalars, results

# The keys that the HPARAMS tab shows, after those of `report.hparams`. A column that is alike in all runs only hides
# the others.
_COMPARED = (
    "model.path",
    "dataset.path",
    "adapter.type",
    "adapter.rank",
    "adapter.scale",
    "adapter.dropout",
    "adapter.num_layers",
    "optimizer.name",
    "optimizer.learning_rate",
    "training.batch_size",
    "training.steps",
    "training.epochs",
    "topology.nodes",
    "seed",
)


class TensorBoard:
    """Writes scalars, texts and the HPARAMS tab's data to a new event file in ``folder``.

    ``hparams`` is the configuration as nested plain values. A run that resumes after ``first_step`` updates
    marks that with ``SessionLog.START``, and TensorBoard then drops what earlier files hold beyond that step.

    Raises:
        OSError: the folder or the file can't be written; also from every event.
    """

    def __init__(self, folder: Path, *, hparams: Mapping[str, object], first_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(folder))
        self._event = Event
        self._hparams, self._shown_first = _compared(hparams)
        self._named = Scalars()
        dataset = hparams.get("dataset")
        metric = dataset.get("metric") if isinstance(dataset, Mapping) else None
        self._metrics = [str(name) for name in (metric if isinstance(metric, list) else [metric]) if name]
        self._notes: list[str] = []
        self._step = first_step
        # TensorBoard drops the marked step too. A run that starts over leaves nothing of an earlier attempt.
        mark = first_step + 1 if first_step else 0
        log = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(session_log=log, step=mark, wall_time=time.time()))

    def handle(self, event: Event) -> None:
        """Writes the event's scalars or texts."""
        match event:
            case RunStarted():
                self._text("config", f"```yaml\n{event.config_yaml.rstrip()}\n```", self._step)
                self._add_notes([event.device, event.adapter, *event.notes])
                self._start_session(is_validated=event.valid_rows > 0)
                self._writer.flush()
            case StepDone():
                self._step = event.step
                self._scalars(self._named.of(event), event.step)
                self._writer.flush()  # a node may be killed at any time, and the next one repeats nothing
            case Evaluated() | MetricScored() | CheckpointSaved():
                self._scalars(self._named.of(event), event.step)
            case SamplesShown():
                self._text("samples", "\n".join(markdown_table(event.samples)), event.step)
            case Noted():
                self._add_notes([event.text if event.level == "info" else f"{event.level}: {event.text}"])
            case NodesChanged() | BlocksMoved():  # the curves of world size, generation, shares and blocks show it too
                self._add_notes([f"after step {event.step}: {event.line}"])
            case RunEnded():
                self._end(event)

    def close(self) -> None:
        """Flushes and closes the event file. Safe to call twice."""
        self._writer.close()

    def _end(self, event: RunEnded) -> None:
        # What was before training is the first point of a curve; kWh and CO2 are joules in other units.
        hidden = ("_before", "/steps", "/kwh", "/co2_grams")
        self._scalars({k: v for k, v in results(event).items() if not k.endswith(hidden)}, event.steps)
        # TensorBoard uses the first end it reads, so a run that can be resumed must not have one yet.
        if event.reason != "interrupted":
            self._end_session(succeeded=event.reason != "failed")
        self._writer.flush()

    def _start_session(self, *, is_validated: bool) -> None:
        from tensorboard.plugins.hparams import api_pb2, metadata, summary_v2
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

        names = [*(["valid_loss"] if is_validated else []), *self._metrics, "seconds"]  # no column without values
        experiment = api_pb2.Experiment(
            # Types without domains: a run knows only its own values, not those of the others in a sweep.
            hparam_infos=[
                # TensorBoard sorts those that differ to the front.
                api_pb2.HParamInfo(name=name, type=_data_type(value), differs=name in self._shown_first)
                for name, value in self._hparams.items()
            ],
            metric_infos=[
                api_pb2.MetricInfo(name=api_pb2.MetricName(tag=f"result/{name}"), display_name=name) for name in names
            ],
            time_created_secs=time.time(),
        )
        self._hparams_data(metadata.EXPERIMENT_TAG, HParamsPluginData(experiment=experiment))
        # No group, so that runs of the same name in two sweeps are kept apart.
        self._summary(summary_v2.hparams_pb(self._hparams, trial_id=""), self._step)

    def _end_session(self, *, succeeded: bool) -> None:
        from tensorboard.plugins.hparams import api_pb2, metadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

        status = api_pb2.STATUS_SUCCESS if succeeded else api_pb2.STATUS_FAILURE
        info = SessionEndInfo(status=status, end_time_secs=time.time())
        self._hparams_data(metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=info))

    def _hparams_data(self, tag: str, data: Any) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import metadata

        about = metadata.create_summary_metadata(data)
        value = Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)
        self._summary(Summary(value=[value]), self._step)

    def _add_notes(self, notes: list[str]) -> None:
        self._notes += notes
        self._text("notes", "\n".join(f"- {html.escape(note, quote=False)}" for note in self._notes), self._step)

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # Plain values, not tensors: all of TensorBoard's readers support these, and drop them after a resume.
        entries = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._summary(Summary(value=entries), step)

    def _text(self, name: str, text: str, step: int) -> None:
        from tensorboard.plugins.text.summary import text_pb

        self._summary(text_pb(name, text), step)

    def _summary(self, summary: Any, step: int) -> None:
        self._writer.add_event(self._event(summary=summary, step=step, wall_time=time.time()))


def _compared(config: Mapping[str, object]) -> tuple[dict[str, bool | float | str], set[str]]:
    """The hyper-parameters by dotted key, and those of them that ``report.hparams`` names, which may be groups.

    Lists are text; empty values, which the tab can't hold, are left out.
    """
    values = {key: _held(value) for key, value in flat(config).items() if value not in (None, "", [])}
    report = config.get("report")
    named = report.get("hparams") if isinstance(report, Mapping) else None
    names = [str(name) for name in named] if isinstance(named, list) else []
    first = {
        key for name in names for key in values if key == name or (key.startswith(f"{name}.") and key in _COMPARED)
    }
    return {key: value for key, value in values.items() if key in first or key in _COMPARED}, first


def _held(value: object) -> bool | float | str:
    """``value`` as the tab can hold it."""
    if isinstance(value, bool | str):
        return value
    return float(value) if isinstance(value, int | float) else str(value)


def _data_type(value: bool | float | str) -> Any:
    from tensorboard.plugins.hparams import api_pb2

    if isinstance(value, bool):
        return api_pb2.DATA_TYPE_BOOL
    return api_pb2.DATA_TYPE_STRING if isinstance(value, str) else api_pb2.DATA_TYPE_FLOAT64
