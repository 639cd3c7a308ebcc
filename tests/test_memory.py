"""How much memory a process may take: the machine's, its container's, its own limit; and a run within such a limit."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from harness.families import build
from harness.memory_limits import MemoryLimit
from harness.runs import environment, events, write_jsonl
from harness.tiny_model import TINY_CONFIG
from macft.device.kind import METAL, Device
from macft.device.memory import cgroup_limit, usable_bytes
from macft.model.adapters.settings import AdapterConfig
from macft.model.execution import resolve
from macft.model.settings import ModelConfig
from macft.model.shape import shape_of
from macft.planner.memory_planner import MemoryPlanner
from macft.planner.streamed_memory import streamed_parts
from macft.planner.whole_model import WholeModelPlanner
from macft.planner.workload import unlike_rows

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits of processes are read on Linux")


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{content}\n")


@pytest.mark.parametrize(
    ("membership", "limit"),
    [
        ("0::/user/session", 4e9),  # its own group has less than the one above
        ("0::/user", 6e9),
        ("0::/free", math.inf),
        ("0::/eager", 3e9),  # memory.high: slowed down above
        ("0::/of/the/host", math.inf),  # a container sees paths of the host: the mounted root is its group
        ("5:cpu:/user/session\n4:memory:/job/step\n0::/", 2e9),  # version 1, the limit of the group above
        ("4:cpu,memory:/job", 2e9),
        ("", math.inf),
    ],
)
def test_the_least_limit_of_all_groups_above_holds(tmp_path: Path, membership: str, limit: float) -> None:
    group(tmp_path / "user", memory_max="6000000000")
    group(tmp_path / "user/session", memory_max="4000000000")
    group(tmp_path / "free", memory_max="max", memory_high="max")
    group(tmp_path / "eager", memory_max="5000000000", memory_high="3000000000")
    group(tmp_path / "memory", memory_limit_in_bytes="9223372036854771712")
    group(tmp_path / "memory/job", memory_limit_in_bytes="2000000000")
    group(tmp_path / "memory/job/step", memory_limit_in_bytes="9223372036854771712")
    (tmp_path / "membership").write_text(membership)
    assert cgroup_limit(tmp_path, tmp_path / "membership") == pytest.approx(limit)


def test_a_container_has_the_limit_of_the_root_that_it_sees(tmp_path: Path) -> None:
    group(tmp_path, memory_max="1000000000")
    for text in ("0::/", "0::/docker/abc"):
        (tmp_path / "membership").write_text(text)
        assert cgroup_limit(tmp_path, tmp_path / "membership") == 1e9
    assert math.isinf(cgroup_limit(tmp_path, tmp_path / "none"))


@LINUX
def test_what_a_process_holds_already_is_not_there_for_its_run() -> None:
    total = float(psutil.virtual_memory().total)
    held = psutil.Process().memory_info().rss
    assert total - 2 * held - 1e8 < usable_bytes() < total
    assert 0 < usable_bytes(1e-9) <= 1  # a share that is used up already


@LINUX
def test_a_limit_of_the_process_is_not_divided() -> None:
    script = "from macft.device.memory import usable_bytes; print(usable_bytes(0.5), usable_bytes())"
    for option in ("-d", "-v"):
        done = subprocess.run(
            ["sh", "-c", f'ulimit {option} 2500000 && exec "$@"', "sh", sys.executable, "-c", script],
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        half, whole = map(float, done.stdout.split())
        assert half == whole
        assert 0.5e9 < whole < 2.4e9


def test_a_refusal_of_a_stream_names_rows_that_fit() -> None:
    shape = shape_of({**TINY_CONFIG, "hidden_size": 512, "num_hidden_layers": 16}, "config.json")
    execution = resolve(ModelConfig(), shape.checkpoint, METAL, packing="false", compile="false")

    def whole_model(rows: int, length: int, budget: float) -> WholeModelPlanner:
        planner = MemoryPlanner(shape, execution, AdapterConfig(), "adamw", [unlike_rows(rows, length, 64)], 0)
        return WholeModelPlanner(planner, budget, "stream", "auto", auto=True)

    def least(rows: int, length: int) -> float:
        tried = whole_model(rows, length, 1e12)
        return tried.parts(execution.with_batch(1, execution.recompute).streamed(())).peak

    budget = 1.01 * least(4, 512)
    assert whole_model(16, 512, budget).choice()[1] is not None
    refusal = str(whole_model(16, 512, budget).choice()[1])
    assert "; 4 rows for each node in a step (training.batch_size) would fit" in refusal
    assert whole_model(4, 512, budget).choice()[1] is None  # what it says is so
    budget = 1.01 * least(1, 129)
    shorter = re.search(r"would fit \(dataset.max_seq_length=(\d+)\)", str(whole_model(16, 512, budget).choice()[1]))
    assert shorter is not None
    assert whole_model(1, int(shorter[1]), budget).choice()[1] is None
    assert str(whole_model(16, 512, 1e6).choice()[1]).endswith(
        "; a machine with more memory or a smaller model is needed"
    )


def test_blocks_that_are_read_one_by_one_need_no_room_for_the_whole_file() -> None:
    """A file in 16 bits, held in float32 on a CPU."""
    shape = shape_of({**TINY_CONFIG, "num_hidden_layers": 64, "torch_dtype": "bfloat16"}, "config.json")
    execution = resolve(ModelConfig(), shape.checkpoint, Device("cpu", openblas=True), packing="false", compile="false")
    planner = MemoryPlanner(shape, execution, AdapterConfig(num_layers=1), "adamw", [unlike_rows(1, 8, 4)], 0)
    streamed = streamed_parts(planner, execution.streamed(()))
    assert planner.parts().other_peak >= shape.weight_bytes(shape.checkpoint) + shape.weight_bytes(
        execution.weight_format
    )
    assert streamed.peak < sum(shape.block_bytes(shape.checkpoint))


@LINUX
@pytest.mark.slow
def test_a_run_streams_within_a_limit_that_its_weights_exceed(tmp_path: Path) -> None:
    """Nobody tells it of the limit, above which it would be killed."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 8}
    model = build("llama", tmp_path / "model", tie_word_embeddings=True, head_dim=64, **sizes)
    weights = (model / "model.safetensors").stat().st_size
    rows = [{"text": f"number {n} is followed by number {n + 1}"} for n in range(4)]
    for split in ("train", "valid"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    words = [f"model={model}", f"dataset={tmp_path / 'data'}", "training.batch_size=2", "training.steps=1"]
    words += ["optimizer.warmup_steps=0", "training.eval_every=0", "report.tensorboard=false", "thermal=off"]
    words += ["adapter.num_layers=8", "report.samples=0"]
    with MemoryLimit(300_000_000) as limit:
        if limit.kind == "ulimit -d":  # counts much that is never touched
            pytest.skip("control groups can't be made here")
        assert weights > limit.size, weights
        done = subprocess.run(
            [*limit.prefix, sys.executable, "-m", "macft.train", *words, f"hydra.run.dir={tmp_path / 'run'}"],
            env=environment(),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, (limit.kind, limit.kills, done.stderr)
    (begun,) = events(tmp_path / "run", "run_started")
    assert "blocks stay in memory, the others are read from disk" in begun["layout"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["peak_memory_bytes"] < weights
