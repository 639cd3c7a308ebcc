"""Suggests the right key for a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import get_type_hints

from macft.report.settings import TRACKERS

# Keys of other trainers, with macft's name for them.
KNOWN_ELSEWHERE = {
    "iters": "training.steps",
    "max_steps": "training.steps",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "batch_size": "training.batch_size",
    "per_device_train_batch_size": "training.micro_batch_size",
    "grad_accumulation_steps": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.micro_batch_size",
    "learning_rate": "optimizer.learning_rate",
    "lr": "optimizer.learning_rate",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "r": "adapter.rank",
    "rank": "adapter.rank",
    "alpha": "adapter.alpha",
    "target_modules": "adapter.targets",
    "keys": "adapter.targets",
    "resume_adapter_file": "adapter.init_from",
    "fine_tune_type": "adapter.type",
    "data": "dataset.path",
    "max_seq_length": "dataset.max_seq_length",
    "steps_per_eval": "training.eval_every",
    "steps_per_report": "report.every",
    "save_steps": "training.save_every",
    "world_size": "topology.nodes",
    "epochs": "training.epochs",
    "steps": "training.steps",
}


TRACKERS_ELSEWHERE = {name: name for name in TRACKERS} | {"report_to": "wandb"}
"""Keys that would turn a tracker on, with its name."""


def schema_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a dataclass schema, including those of groups."""
    hints = get_type_hints(schema)
    for item in fields(schema):
        key = f"{prefix}{item.name}"
        yield key
        field_type = hints[item.name]
        if isinstance(field_type, type) and is_dataclass(field_type):
            yield from schema_keys(field_type, f"{key}.")


def unknown_key(key: str, schema: type) -> str:
    """The error line for a key that is not in the schema, with the most similar key that is."""
    known = list(schema_keys(schema))
    leaf = key.rsplit(".", 1)[-1]
    if leaf in KNOWN_ELSEWHERE and KNOWN_ELSEWHERE[leaf] != key:
        return f"{key}: no such key; did you mean {KNOWN_ELSEWHERE[leaf]}?"
    if leaf in TRACKERS_ELSEWHERE:
        return f"{key}: no such key; trackers are a list: 'report.trackers=[{TRACKERS_ELSEWHERE[leaf]}]'"
    if leaf in known and "." not in leaf and leaf not in {name.split(".")[0] for name in known if "." in name}:
        return f"{key}: no such key; did you mean {leaf}?"
    near = difflib.get_close_matches(key, known, 1, 0.6)
    if not near:
        by_leaf = {name.rsplit(".", 1)[-1]: name for name in known}
        near = [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, 1, 0.6)]
    hint = f"did you mean {near[0]}?" if near else "`--cfg job` prints all keys"
    return f"{key}: no such key; {hint}"
