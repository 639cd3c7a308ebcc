"""Whole runs whose checkpoints meet a full disk, a folder that can't be written, damage, and another node's disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.runs import adapter, events, on_hosts, same_bits, start, train
from helpers.disks import small_disk_at
from macft.checkpoint.store import CheckpointStore

pytestmark = pytest.mark.slow

KEEPS_ALL = "training.keep_last=9"


@pytest.fixture(scope="module")
def basics(tiny_task: list[str]) -> list[str]:
    """Overrides for six short steps of a tiny model that save after every second one."""
    return [
        *tiny_task,
        "training.batch_size=4",
        "training.steps=6",
        "training.eval_every=2",
        "training.eval_rows=2",
        "training.save_every=2",
        "optimizer.learning_rate=1e-3",
    ]


@pytest.fixture(scope="module")
def on_two_disks(tmp_path_factory: pytest.TempPathFactory, basics: list[str]) -> Path:
    """A finished run of two hosts, each with a folder of its own: 0 and 1."""
    folder = tmp_path_factory.mktemp("two-disks")
    run_on_hosts(folder, *basics, KEEPS_ALL)
    return folder


def run_on_hosts(folder: Path, *overrides: str, resume: bool = False) -> None:
    """A run of two hosts, each with a folder of its own, to the end."""
    own = on_hosts(folder)
    if resume:
        own = [[*words[:-1], words[-1].replace("hydra.run.dir=", "+resume=")] for words in own]
    processes = [start(*overrides, *words, cwd=folder) for words in own]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def notes(folder: Path) -> list[str]:
    return list(events(folder, "run_started")[-1]["notes"])


def test_two_nodes_hold_the_same_checkpoints(on_two_disks: Path) -> None:
    first, second = (CheckpointStore(on_two_disks / str(rank) / "checkpoints", keep_last=9) for rank in (0, 1))
    assert first.steps() == second.steps() == [6, 4, 2]
    for step in first.steps():
        left, right = first.load(step).files, second.load(step).files
        assert left["adapters.safetensors"] == right["adapters.safetensors"]
        assert left["optimizer.safetensors"] == right["optimizer.safetensors"]
    saved = events(on_two_disks / "0", "checkpoint_saved")
    assert [event["step"] for event in saved] == [2, 4, 6]
    assert all(0 < event["waited"] <= event["seconds"] for event in saved)


def test_a_damaged_checkpoint_is_taken_from_the_other_node(on_two_disks: Path, tmp_path: Path) -> None:
    for rank in ("0", "1"):
        shutil.copytree(on_two_disks / rank, tmp_path / rank)
    flip_a_byte(tmp_path / "0" / "checkpoints" / "step-00000006" / "optimizer.safetensors")
    shutil.rmtree(tmp_path / "1" / "checkpoints" / "step-00000004")
    run_on_hosts(tmp_path, resume=True)
    told = notes(tmp_path / "0")
    assert any("step-00000006: optimizer.safetensors is damaged" in note and "skipped" in note for note in told)
    assert "the newest checkpoint that can be used, of step 6, is on node 1's disk" in told
    assert same_bits(adapter(tmp_path / "0"), adapter(on_two_disks / "0"))


def test_an_older_checkpoint_is_taken_and_ends_with_the_same_bits(on_two_disks: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(on_two_disks / "0", run)
    flip_a_byte(run / "checkpoints" / "step-00000006" / "adapters.safetensors")
    cut = run / "checkpoints" / "step-00000004" / "optimizer.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    done = train(f"+resume={run}", "topology=single", "topology.hosts=[]", cwd=tmp_path)
    assert done.status == 0, done.errors
    assert "resumed after step 2" in done.output
    skipped = [note for note in notes(run) if "skipped" in note]
    assert len(skipped) == 2
    assert "step-00000006: adapters.safetensors is damaged: its SHA-256" in skipped[0]
    assert "step-00000004: optimizer.safetensors is damaged: its size" in skipped[1]
    assert CheckpointStore(run / "checkpoints", keep_last=9).load(6).progress.step == 6


def test_a_folder_that_cannot_be_written_costs_checkpoints_and_not_the_run(tmp_path: Path, basics: list[str]) -> None:
    (tmp_path / "checkpoints").write_text("a file stands where the folder should be")
    done = train(*basics, f"hydra.run.dir={tmp_path}", cwd=tmp_path)
    assert done.status == 0, done.errors
    assert done.output.count("can't be written: File exists; training goes on") == 3
    assert "warning: 3 of 3 checkpoints were not saved, there is none on disk to resume from" in done.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["reason"] == "finished"
    assert summary["warnings"][0].startswith("3 of 3 checkpoints were not saved")
    assert adapter(tmp_path)
    assert "Traceback" not in done.errors


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that has room for one checkpoint of the tiny run, and not for two."""
    with small_disk_at(tmp_path / "run" / "checkpoints", 300) as folder:
        yield folder


def test_a_full_disk_costs_checkpoints_and_not_the_run(small_disk: Path, basics: list[str]) -> None:
    run = small_disk.parent
    done = train(*basics, f"hydra.run.dir={run}", cwd=run)
    assert done.status == 0, done.errors
    assert [event["step"] for event in events(run, "checkpoint_saved")] == [2]
    assert "checkpoints/step-00000004 can't be written: No space left on device; training goes on" in done.output
    assert "warning: 2 of 3 checkpoints were not saved, the newest one on disk is of step 2" in done.output
    assert [path.name for path in small_disk.iterdir()] == ["step-00000002"]
    assert CheckpointStore(small_disk, keep_last=2).load(2).progress.step == 2
