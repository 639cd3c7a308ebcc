"""The numbers of events by name, as TensorBoard and the other trackers show them.

TensorBoard sorts groups, the part of a name before the first ``/``: loss, metric, optim, result, stage, system,
throughput, time.
"""

from __future__ import annotations

from macft.report.events import CheckpointSaved, Evaluated, Event, MetricScored, RunEnded, StepDone


class Scalars:
    """Names the values of a run's events. A value that is 0 has no name until it has been another number once."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def of(self, event: Event) -> dict[str, float]:
        """The values of an event at its step; empty for events that have none."""
        match event:
            case StepDone():
                values = _of_step(event) | _of_nodes(event)
            case Evaluated():
                return {"loss/valid": event.loss}
            case MetricScored():
                return {f"metric/{event.name}": event.value}
            case CheckpointSaved():
                values = {
                    "system/checkpoint/write_seconds": event.seconds,
                    "system/checkpoint/training_waited_seconds": event.waited,
                }
            case _:
                return {}
        self._seen |= {name for name, value in values.items() if value}
        return {name: value for name, value in values.items() if name in self._seen or name.startswith(_ALWAYS)}


_ALWAYS = ("loss/", "optim/", "system/cluster/share")


def results(event: RunEnded) -> dict[str, float]:
    """What the run has come to: its results, seconds, steps and energy."""
    values = {**event.final, "seconds": event.seconds, "steps": float(event.steps)}
    if event.energy is not None:
        values |= {"joules": event.energy.joules, "kwh": event.energy.kwh, "co2_grams": event.energy.co2_grams}
    return {f"result/{name}": value for name, value in values.items()}


def _parts_of(event: StepDone) -> dict[str, float]:
    """The parts of a step's time that tell something: a node that is alone waits for nobody."""
    is_alone = len(event.nodes) == 1
    return {name: part for name, part in event.parts.items() if not (is_alone and name.startswith("all_reduce"))}


def _of_step(event: StepDone) -> dict[str, float]:
    """Loss, learning rate, gradient norm, speed (tokens/s), time and its parts (s), memory (GB)."""
    seconds = max(event.seconds, 1e-9)
    values = {
        "loss/train": event.loss,
        "optim/learning_rate": event.learning_rate,
        "optim/grad_norm": event.grad_norm,
        "optim/epoch": event.epoch,
        "throughput/tokens_per_second": event.tokens / seconds,
        "throughput/target_tokens_per_second": event.target_tokens / seconds,
        "time/step": event.seconds,
        "system/network/bytes_sent": event.bytes_sent,
        "system/network/codec_residual_norm": event.residual_norm,
        "system/memory/peak_gb": event.peak_memory / 1e9,
        "system/memory/active_gb": event.active_memory / 1e9,
        **{f"time/{name}": part for name, part in _parts_of(event).items()},
    }
    if len(event.nodes) > 1:
        values["throughput/tokens_per_second_of_this_node"] = event.node_tokens / seconds
    return values


def _of_nodes(event: StepDone) -> dict[str, float]:
    """Of each node, temperature (C), power (W), duty, share, and where its stage's time went (s).

    The hottest state; power of all. Unknown is left out.
    """
    values: dict[str, float] = {}
    if len(event.nodes) > 1 or event.generation:
        values |= {
            "system/cluster/world_size": float(len(event.nodes)),
            "system/cluster/generation": float(event.generation),
        }
        values |= {f"system/cluster/share_rank{rank}": share for rank, share in enumerate(event.shares)}
    for rank, node in enumerate(event.nodes):
        if node.temperature is not None:
            values[f"system/thermal/temperature_rank{rank}"] = node.temperature
        if node.watts is not None:
            values[f"system/power/watts_rank{rank}"] = node.watts
        if node.temperature is not None or node.state is not None or node.reason:
            values[f"system/thermal/duty_rank{rank}"] = 0.0 if node.paused else node.duty
        if node.wait_seconds is not None:
            disk, wait = node.disk_seconds or 0.0, node.wait_seconds
            parts = {"compute": max(node.busy_seconds - wait - disk, 0.0), "wait": wait, "disk": disk}
            parts["wire"] = node.wire_seconds or 0.0
            values |= {f"stage/{name}_rank{rank}": seconds for name, seconds in parts.items()}
    if states := [node.state for node in event.nodes if node.state is not None]:
        values["system/thermal/state"] = float(max(states))
    if watts := [node.watts for node in event.nodes if node.watts is not None]:
        values["system/power/watts"] = sum(watts)
    return values
