"""TensorBoard events, through TensorBoard's own writer and protocol buffers: no torch, no TensorFlow."""

from __future__ import annotations

import html
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from macft.report.events import (
    CheckpointSaved,
    Evaluated,
    MetricScored,
    NodesChanged,
    Noted,
    RunEnded,
    RunStarted,
    SamplesShown,
    SilentReporter,
    StepDone,
    change_line,
)

# What the HPARAMS tab compares runs by; the rest changes how a run is carried out, not what it learns.
_COMPARED = ("model.", "dataset.", "adapter.", "optimizer.", "training.", "topology.nodes", "seed")


class TensorBoard(SilentReporter):
    """Writes scalars, texts and the HPARAMS tab's data to a new event file in ``folder``.

    ``hparams`` is the configuration as nested plain values. A run that resumes after ``first_step`` updates
    marks that with ``SessionLog.START``, upon which TensorBoard drops what earlier files hold beyond it.

    Raises:
        OSError: the folder or the file can't be written; also from every event.
    """

    def __init__(self, folder: Path, *, hparams: Mapping[str, Any], first_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(folder))
        self._event = Event
        self._hparams = _compared(hparams)
        self._notes: list[str] = []
        self._step = first_step
        # TensorBoard drops the marked step too. A run that begins anew leaves nothing of an earlier attempt.
        mark = first_step + 1 if first_step else 0
        log = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(session_log=log, step=mark, wall_time=time.time()))

    def run_started(self, event: RunStarted) -> None:
        """The configuration and the notes as text, the hyper-parameters for the HPARAMS tab."""
        self._text("config", f"```yaml\n{event.config_yaml.rstrip()}\n```", self._step)
        self._notes = [event.device, event.adapter, *event.notes]
        self._write_notes()
        self._start_session()
        self._writer.flush()

    def step_done(self, event: StepDone) -> None:
        """Loss, learning rate, gradient norm, speed (tokens/s), time and its parts (s), memory (GB)."""
        self._step = event.step
        seconds = max(event.seconds, 1e-9)
        values = {
            "loss/train": event.loss,
            "optim/learning_rate": event.learning_rate,
            "optim/grad_norm": event.grad_norm,
            "throughput/tokens_per_second_cluster": event.tokens / seconds,
            "throughput/tokens_per_second_node": event.node_tokens / seconds,
            "throughput/target_tokens_per_second": event.target_tokens / seconds,
            "time/step": event.seconds,
            "collective/bytes_sent": event.bytes_sent,
            "collective/residual_norm": event.residual_norm,
            "memory/peak_gb": event.peak_memory / 1e9,
            "memory/active_gb": event.active_memory / 1e9,
            "epoch": event.epoch,
        }
        values |= {f"time/{name}": part for name, part in event.parts.items()}
        self._scalars(values | _of_nodes(event), event.step)
        self._writer.flush()  # a node may be killed at any time, and the next one tells only what isn't told yet

    def evaluated(self, event: Evaluated) -> None:
        """The validation loss."""
        self._scalars({"loss/valid": event.loss}, event.step)

    def metric_scored(self, event: MetricScored) -> None:
        """The metric, at the step it was taken."""
        self._scalars({f"metric/{event.name}": event.value}, event.step)

    def samples_shown(self, event: SamplesShown) -> None:
        """A table of answers."""
        rows = ["| question | expected | before | after |", "| --- | --- | --- | --- |"]
        for sample in event.samples:
            cells = [
                _cell(sample.prompt),
                _cell(sample.expected),
                _answer_cell(sample.before, sample.before_correct),
                _answer_cell(sample.after, sample.after_correct),
            ]
            rows.append(f"| {' | '.join(cells)} |")
        self._text("samples", "\n".join(rows), event.step)

    def checkpoint_saved(self, event: CheckpointSaved) -> None:
        """How long it took to write, and how long training stood still for it (s)."""
        self._scalars({"checkpoint/seconds": event.seconds, "checkpoint/waited": event.waited}, event.step)

    def noted(self, event: Noted) -> None:
        """Added to the notes."""
        self._notes.append(event.text if event.level == "info" else f"{event.level}: {event.text}")
        self._write_notes()

    def nodes_changed(self, event: NodesChanged) -> None:
        """Added to the notes; the curves of world size, generation and shares show it too."""
        self._notes.append(f"after step {event.step}: {change_line(event)}")
        self._write_notes()

    def run_ended(self, event: RunEnded) -> None:
        """The results, and the end of the session for the HPARAMS tab."""
        results = {**event.final, "seconds": event.seconds, "steps": float(event.steps)}
        if event.energy is not None:
            results |= {"joules": event.energy.joules, "kwh": event.energy.kwh, "co2_grams": event.energy.co2_grams}
        self._scalars({f"final/{name}": value for name, value in results.items()}, event.steps)
        # TensorBoard goes by the first end it finds, so a run that can go on must not have one yet.
        if event.reason != "interrupted":
            self._end_session(succeeded=event.reason != "failed")
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the event file. Safe to call twice."""
        self._writer.close()

    def _start_session(self) -> None:
        from tensorboard.plugins.hparams import api_pb2, metadata, summary_v2
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

        results = ["valid_loss_before", "valid_loss"]
        if isinstance(metric := self._hparams.get("dataset.metric"), str):
            results += [f"{metric}_before", metric]
        experiment = api_pb2.Experiment(
            # Types without domains: a run knows its own values only, not those of the others in a sweep.
            hparam_infos=[
                api_pb2.HParamInfo(name=name, type=_data_type(value)) for name, value in self._hparams.items()
            ],
            metric_infos=[
                api_pb2.MetricInfo(name=api_pb2.MetricName(tag=f"final/{name}"), display_name=name)
                for name in [*results, "seconds", "steps"]
            ],
            time_created_secs=time.time(),
        )
        self._hparams_data(metadata.EXPERIMENT_TAG, HParamsPluginData(experiment=experiment))
        # No group: each run stands for itself, also where two sweeps both have a run 0.
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

    def _write_notes(self) -> None:
        self._text("notes", "\n".join(f"- {html.escape(note, quote=False)}" for note in self._notes), self._step)

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # Plain values, not tensors: every reader of TensorBoard's takes these, and drops them upon a resume.
        entries = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._summary(Summary(value=entries), step)

    def _text(self, name: str, text: str, step: int) -> None:
        from tensorboard.plugins.text.summary import text_pb

        self._summary(text_pb(name, text), step)

    def _summary(self, summary: Any, step: int) -> None:
        self._writer.add_event(self._event(summary=summary, step=step, wall_time=time.time()))


def _of_nodes(event: StepDone) -> dict[str, float]:
    """Temperature (C), power (W), duty and share of each node; the hottest state; power of all. Unknown is left out."""
    values: dict[str, float] = {}
    if len(event.nodes) > 1 or event.generation:
        values |= {"cluster/world_size": float(len(event.nodes)), "cluster/generation": float(event.generation)}
        values |= {f"plan/share_rank{rank}": share for rank, share in enumerate(event.shares)}
    for rank, node in enumerate(event.nodes):
        if node.temperature is not None:
            values[f"thermal/temperature_rank{rank}"] = node.temperature
        if node.watts is not None:
            values[f"power/watts_rank{rank}"] = node.watts
        if node.temperature is not None or node.state is not None or node.reason:
            values[f"thermal/duty_rank{rank}"] = 0.0 if node.paused else node.duty
    if states := [node.state for node in event.nodes if node.state is not None]:
        values["thermal/state"] = float(max(states))
    if watts := [node.watts for node in event.nodes if node.watts is not None]:
        values["power/watts"] = sum(watts)
    return values


def _compared(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | float | str]:
    """What runs are compared by, by dotted key; lists as text, empty values left out as the tab has none."""
    flat: dict[str, bool | float | str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _compared(value, f"{name}.")
        elif value in (None, "", []) or not name.startswith(_COMPARED):
            continue
        elif isinstance(value, bool | str):
            flat[name] = value
        elif isinstance(value, int | float):
            flat[name] = float(value)
        else:
            flat[name] = str(value)
    return flat


def _data_type(value: bool | float | str) -> Any:
    from tensorboard.plugins.hparams import api_pb2

    if isinstance(value, bool):
        return api_pb2.DATA_TYPE_BOOL
    return api_pb2.DATA_TYPE_STRING if isinstance(value, str) else api_pb2.DATA_TYPE_FLOAT64


def _answer_cell(answer: str | None, correct: bool | None) -> str:
    mark = {True: "✓ ", False: "✗ ", None: ""}[correct]
    return mark + _cell(answer or "")


def _cell(text: str) -> str:
    return html.escape(text.strip(), quote=False).replace("|", "&#124;").replace("\n", "<br>")
