"""TensorBoard events, through TensorBoard's own writer and protocol buffers: no torch, no TensorFlow."""

from __future__ import annotations

import html
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from macft.report.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    MetricScored,
    NodesChanged,
    Noted,
    RunEnded,
    RunStarted,
    Sample,
    SamplesShown,
    StepDone,
)

# The keys that the HPARAMS tab shows; the others change how a run is computed, not what it learns.
_COMPARED = ("model.", "dataset.", "adapter.", "optimizer.", "training.", "topology.nodes", "seed")


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
        self._hparams = _compared(hparams)
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
                self._start_session()
                self._writer.flush()
            case StepDone():
                self._step = event.step
                self._scalars(_of_step(event) | _of_nodes(event), event.step)
                self._writer.flush()  # a node may be killed at any time, and the next one repeats nothing
            case Evaluated():
                self._scalars({"loss/valid": event.loss}, event.step)
            case MetricScored():
                self._scalars({f"metric/{event.name}": event.value}, event.step)
            case SamplesShown():
                self._text("samples", _table(event.samples), event.step)
            case CheckpointSaved():
                self._scalars({"checkpoint/seconds": event.seconds, "checkpoint/waited": event.waited}, event.step)
            case Noted():
                self._add_notes([event.text if event.level == "info" else f"{event.level}: {event.text}"])
            case NodesChanged():  # the curves of world size, generation and shares show it too
                self._add_notes([f"after step {event.step}: {event.line}"])
            case RunEnded():
                self._end(event)

    def close(self) -> None:
        """Flushes and closes the event file. Safe to call twice."""
        self._writer.close()

    def _end(self, event: RunEnded) -> None:
        results = {**event.final, "seconds": event.seconds, "steps": float(event.steps)}
        if event.energy is not None:
            results |= {"joules": event.energy.joules, "kwh": event.energy.kwh, "co2_grams": event.energy.co2_grams}
        self._scalars({f"final/{name}": value for name, value in results.items()}, event.steps)
        # TensorBoard uses the first end it reads, so a run that can be resumed must not have one yet.
        if event.reason != "interrupted":
            self._end_session(succeeded=event.reason != "failed")
        self._writer.flush()

    def _start_session(self) -> None:
        from tensorboard.plugins.hparams import api_pb2, metadata, summary_v2
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

        results = ["valid_loss_before", "valid_loss"]
        if isinstance(metric := self._hparams.get("dataset.metric"), str):
            results += [f"{metric}_before", metric]
        experiment = api_pb2.Experiment(
            # Types without domains: a run knows only its own values, not those of the others in a sweep.
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


def _of_step(event: StepDone) -> dict[str, float]:
    """Loss, learning rate, gradient norm, speed (tokens/s), time and its parts (s), memory (GB)."""
    seconds = max(event.seconds, 1e-9)
    return {
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
        **{f"time/{name}": part for name, part in event.parts.items()},
    }


def _of_nodes(event: StepDone) -> dict[str, float]:
    """Of each node, temperature (C), power (W), duty, share, and where its stage's time went (s).

    The hottest state; power of all. Unknown is left out.
    """
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
        if node.wait_seconds is not None:
            disk, wait = node.disk_seconds or 0.0, node.wait_seconds
            parts = {"compute": max(node.busy_seconds - wait - disk, 0.0), "wait": wait, "disk": disk}
            parts["wire"] = node.wire_seconds or 0.0
            values |= {f"stage/{name}_rank{rank}": seconds for name, seconds in parts.items()}
    if states := [node.state for node in event.nodes if node.state is not None]:
        values["thermal/state"] = float(max(states))
    if watts := [node.watts for node in event.nodes if node.watts is not None]:
        values["power/watts"] = sum(watts)
    return values


def _compared(config: Mapping[str, object], prefix: str = "") -> dict[str, bool | float | str]:
    """The hyper-parameters by dotted key; lists as text, and no empty values, which the tab can't hold."""
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


def _table(samples: Sequence[Sample]) -> str:
    """Answers side by side, as a Markdown table."""
    rows = ["| question | expected | before | after |", "| --- | --- | --- | --- |"]
    for sample in samples:
        cells = [
            _cell(sample.prompt),
            _cell(sample.expected),
            _answer_cell(sample.before, sample.before_correct),
            _answer_cell(sample.after, sample.after_correct),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _answer_cell(answer: str | None, correct: bool | None) -> str:
    mark = {True: "✓ ", False: "✗ ", None: ""}[correct]
    return mark + _cell(answer or "")


def _cell(text: str) -> str:
    return html.escape(text.strip(), quote=False).replace("|", "&#124;").replace("\n", "<br>")
