"""One run of one side, in a process of its own: reads an order as JSON, and prints figures as JSON.

``python -m macft.training_bench.worker``
"""

from __future__ import annotations

import json
import sys
from typing import Any, TypedDict

from macft.device.mlx_device import keep_within, prepare_device
from macft.model.execution import Execution
from macft.model.fetch.bundled import ensure_bundled
from macft.model.load import load_tokenizer
from macft.model.settings import ModelConfig
from macft.training_bench.random_weights import random_model
from macft.training_bench.rows import records_of
from macft.training_bench.sides import Training, mlx_lm_data, tokenized, train_macft, train_mlx_lm


class RunOrder(TypedDict):
    """``side`` is "macft" or "mlx_lm"; ``execution`` has the fields of an :class:`Execution`.

    ``budget`` and ``peak`` are bytes.
    """

    side: str
    config: dict[str, Any]
    bits: int | None
    dtype: str
    rows: str
    steps: int
    warm_up: int
    execution: dict[str, Any]
    budget: float
    peak: float


def execute(order: RunOrder) -> dict[str, float]:
    """Trains, and returns the figures of :func:`~macft.training_bench.sides.result`."""
    prepare_device()
    training = Training(order["rows"], order["steps"], order["warm_up"])
    tokenizer = load_tokenizer(ModelConfig(), ensure_bundled())
    records = records_of(training.rows, tokenizer, training.batch_size * training.steps)
    model = random_model(order["config"], bits=order["bits"], dtype=order["dtype"])
    if order["side"] == "mlx_lm":
        return train_mlx_lm(model, mlx_lm_data(records, tokenizer, training), training)
    keep_within(order["budget"], order["peak"])
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in order["execution"].items()
    }
    fields["ends"] = frozenset(fields["ends"])
    return train_macft(model, tokenized(records, tokenizer, training), training, Execution(**fields))


if __name__ == "__main__":
    figures = execute(json.loads(sys.stdin.read()))
    print(json.dumps(figures))
