"""TensorBoard events, written with TensorBoard's own protocol buffers: neither torch nor TensorFlow is needed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from macft.report.events import (
    Evaluated,
    MetricScored,
    Noted,
    RunEnded,
    RunStarted,
    SamplesShown,
    SilentReporter,
    StepDone,
)

_STATUS = {"finished": "STATUS_SUCCESS", "early_stopped": "STATUS_SUCCESS", "interrupted": "STATUS_UNKNOWN"}


class TensorBoard(SilentReporter):
    """Writes scalars, texts and the HPARAMS tab's data to a new event file in ``folder``.

    ``hparams`` is the configuration as nested dicts. A resumed run marks the step it resumes from, and TensorBoard
    drops what earlier event files hold beyond it.
    """

    def __init__(self, folder: Path, *, hparams: Mapping[str, Any], first_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(folder))
        self._event = Event
        self._hparams = _flatten(hparams)
        self._notes: list[str] = []
        self._peak_memory = 0
        # Everything from this step on in older files is history that did not happen.
        mark = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(session_log=mark, step=first_step + 1, wall_time=time.time()))

    def run_started(self, event: RunStarted) -> None:
        """The configuration as text, the hyper-parameters for the HPARAMS tab."""
        from tensorboard.plugins.hparams import api_pb2, summary_v2

        self._text("config", f"```yaml\n{event.config_yaml}\n```", 0)
        self._notes = [event.device, event.adapter, *event.notes]
        self._text("notes", "\n".join(f"- {note}" for note in self._notes), event.first_step)
        # Without a name for every metric the tab stays empty; these are the ones a run can end with.
        names = ["final/valid_loss", "final/valid_loss_before", "final/seconds", "final/steps"]
        names += [f"final/{self._hparams['dataset.metric']}"] if self._hparams.get("dataset.metric") else []
        metrics = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=name)) for name in names]
        experiment = summary_v2.hparams_config_pb(
            hparams=[summary_v2.HParam(name) for name in self._hparams],
            metrics=[summary_v2.Metric(info.name.tag) for info in metrics],
        )
        self._summary(experiment, 0)
        self._summary(summary_v2.hparams_pb(self._hparams, trial_id=event.run_folder.name), 0)

    def step_done(self, event: StepDone) -> None:
        """Loss, learning rate, gradient norm, speed, the parts of the step's time, memory."""
        seconds = max(event.seconds, 1e-9)
        values = {
            "loss/train": event.loss,
            "optimizer/learning_rate": event.learning_rate,
            "optimizer/gradient_norm": event.grad_norm,
            "tokens_per_second/cluster": event.tokens / seconds,
            "tokens_per_second/node": event.node_tokens / seconds,
            "tokens_per_second/targets": event.target_tokens / seconds,
            "time/step": event.seconds,
            "memory/peak_gb": event.peak_memory / 1e9,
            "memory/active_gb": event.active_memory / 1e9,
            "epoch": event.epoch,
        }
        values |= {f"time/{name}": part for name, part in event.parts.items()}
        for name, value in values.items():
            self._scalar(name, value, event.step)

    def evaluated(self, event: Evaluated) -> None:
        """The validation loss."""
        self._scalar("loss/valid", event.loss, event.step)

    def metric_scored(self, event: MetricScored) -> None:
        """The metric, at the step it was taken."""
        self._scalar(f"metric/{event.name}", event.value, event.step)

    def samples_shown(self, event: SamplesShown) -> None:
        """A table of answers."""
        rows = ["| question | expected | before | after |", "| --- | --- | --- | --- |"]
        for sample in event.samples:
            cells = [
                sample.prompt,
                sample.expected,
                _marked(sample.before, sample.before_correct),
                _marked(sample.after, sample.after_correct),
            ]
            rows.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
        self._text("samples", "\n".join(rows), event.step)

    def noted(self, event: Noted) -> None:
        """Added to the notes."""
        self._notes.append(event.text)
        self._text("notes", "\n".join(f"- {note}" for note in self._notes), 0)

    def run_ended(self, event: RunEnded) -> None:
        """The results, and the end of the session for the HPARAMS tab."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import metadata, plugin_data_pb2

        results = {**event.final, "seconds": event.seconds, "steps": float(event.steps)}
        for name, value in results.items():
            self._scalar(f"final/{name}", value, event.steps)
        from tensorboard.plugins.hparams.api_pb2 import Status

        info = plugin_data_pb2.SessionEndInfo(
            status=Status.Value(_STATUS.get(event.reason, "STATUS_FAILURE")), end_time_secs=time.time()
        )
        data = plugin_data_pb2.HParamsPluginData(session_end_info=info, version=metadata.PLUGIN_DATA_VERSION)
        value = Summary.Value(
            tag=metadata.SESSION_END_INFO_TAG, metadata=metadata.create_summary_metadata(data)
        )
        self._summary(Summary(value=[value]), event.steps)
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()

    def _scalar(self, name: str, value: float, step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.scalar.metadata import create_summary_metadata
        from tensorboard.util.tensor_util import make_tensor_proto

        import numpy as np

        entry = Summary.Value(
            tag=name,
            tensor=make_tensor_proto(np.float32(value)),
            metadata=create_summary_metadata(display_name="", description=""),
        )
        self._summary(Summary(value=[entry]), step)

    def _text(self, name: str, text: str, step: int) -> None:
        from tensorboard.plugins.text.summary import text_pb

        self._summary(text_pb(name, text), step)

    def _summary(self, summary: Any, step: int) -> None:
        self._writer.add_event(self._event(summary=summary, step=step, wall_time=time.time()))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, bool | float | str]:
    """Scalars by dotted key; lists as text, empty values left out: the HPARAMS tab takes nothing else."""
    flat: dict[str, bool | float | str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, bool | str):
            flat[f"{prefix}{key}"] = value
        elif isinstance(value, int | float):
            flat[f"{prefix}{key}"] = float(value)
        elif value:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _marked(answer: str | None, correct: bool | None) -> str:
    mark = {True: "✓ ", False: "✗ ", None: ""}[correct]
    return mark + (answer or "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")
