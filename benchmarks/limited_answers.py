"""A node that answers, for memory_limits.py: by itself, as the leader of a cluster, or with mlx-lm's pipeline.

Its first line of standard input is JSON; the last line of its output is JSON: the tokens, and the seconds for the
prompt and for the tokens after the first one.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import macft  # noqa: F401  (OpenBLAS, also for mlx-lm)


def main() -> None:
    task = json.loads(sys.stdin.readline())
    print(json.dumps({"alone": alone, "lead": lead, "mlx-lm": mlx_lm_pipeline}[task["way"]](task)))


def alone(task: dict[str, Any]) -> dict[str, Any]:
    """All blocks in memory, or some read from disk when they are needed."""
    from mlx_lm.generate import generate_step

    # isort: split
    import mlx.core as mx

    from macft.model.backends.choose import make_backend
    from macft.run.tuned_model import TunedModel

    loaded = TunedModel.find(None, base_model=task["model"], placement=task["placement"]).load()
    with make_backend(loaded.execution.padded()).installed(loaded.model):
        steps = generate_step(mx.array(task["prompt"]), loaded.model, max_tokens=task["tokens"])
        return measured(int(token) for token, _ in steps)


def lead(task: dict[str, Any]) -> dict[str, Any]:
    """Rank 0 of a cluster; the others are started by who started this process, with the same requests."""
    from macft.device.mlx_device import prepare_device
    from macft.generation.tasks import Options
    from macft.launch.generation.worker import WorkerRequest, elastic_ring
    from macft.model.settings import ModelConfig
    from macft.rendezvous.keystore import run_keyring
    from macft.rendezvous.server import RendezvousServer
    from macft.run.generation.leader import GenerationLeader, dismiss
    from macft.run.generation.rank import DistributedModel, GenerationRank

    request = WorkerRequest(**task["request"])
    with ExitStack() as stack:
        server = RendezvousServer(
            request.server,
            world_size=request.world_size,
            run_id=request.run_id,
            must_match=task["must_match"],
            timeout=request.timeout,
            keyring=run_keyring(bytes.fromhex(request.secret)),
        )
        stack.callback(server.close)
        server.start()
        rank = GenerationRank(elastic_ring(request, stack), name=request.name)
        prepare_device()
        wanted = DistributedModel.of(ModelConfig(path=task["model"]), None, "0.95")
        lines: list[str] = []
        answers = GenerationLeader(rank, wanted, together=1, tell=lines.append)
        number = answers.pipeline.begin(task["prompt"], Options(), most_tokens=task["tokens"], stop_tokens=())

        def tokens() -> Iterable[int]:
            while not answers.pipeline.is_idle:
                for new in answers.advance():
                    assert new.answer == number
                    assert new.outcome.token is not None
                    yield new.outcome.token

        found = measured(tokens())
        answers.close()
        dismiss(rank)
    return {**found, "layout": lines[0]}


def mlx_lm_pipeline(task: dict[str, Any]) -> dict[str, Any]:
    """A rank of mlx-lm's own: its loading, then its generation, in float32, which alone is fast on a CPU."""
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import sharded_load

    # isort: split
    import mlx.core as mx

    group = mx.wanted.init(backend="ring", strict=True)
    model, _ = sharded_load(task["model"], pipeline_group=group)
    to_float32(model)
    steps = generate_step(mx.array(task["prompt"]), model, max_tokens=task["tokens"])
    found = measured(int(token) for token, _ in steps)
    # A rank that ends first would take the connection from the others.
    mx.eval(mx.wanted.all_sum(mx.array(1.0), stream=mx.cpu))
    return found


def to_float32(tree: Any) -> None:
    """Casts the arrays in ``tree`` one by one, so that there are never two copies of all."""
    import mlx.core as mx

    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        if isinstance(value, mx.array):
            tree[key] = value.astype(mx.float32)
            mx.eval(tree[key])
        elif isinstance(value, dict | list):
            to_float32(value)


def measured(tokens: Iterable[int]) -> dict[str, Any]:
    """The tokens, and when they came."""
    started, times, found = time.perf_counter(), [], []
    for token in tokens:
        times.append(time.perf_counter() - started)
        found.append(token)
    return {"tokens": found, "prompt_seconds": times[0], "seconds": times[-1] - times[0]}


if __name__ == "__main__":
    main()
