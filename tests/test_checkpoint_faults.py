"""Checkpoints under fire: killed in the middle, two writers in one folder, limits of the disk, a disk that is slow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from macft.checkpoint.saver import CheckpointSaver
from macft.checkpoint.snapshot import Snapshot
from macft.checkpoint.store import CheckpointStore

# In a process of its own, which forks savers: the tests' process has threads that a fork would not take along.
SAVERS = """
import hashlib, json, os, random, resource, signal, sys, time
from pathlib import Path
from macft.checkpoint.saver import CheckpointSaver
from macft.checkpoint.snapshot import Snapshot
from macft.checkpoint.store import CheckpointStore

folder = Path(sys.argv[2])
store = CheckpointStore(folder, keep_last=2)

def snapshot(step):
    bits = hashlib.sha256(str(step).encode()).digest() * 8192
    return Snapshot({"adapters.safetensors": bits, "optimizer.safetensors": bits[::-1],
                     "progress.json": json.dumps({"step": step}).encode()})

def forked(work):
    process = os.fork()
    if process == 0:
        work()
        os._exit(0)
    return process

def killed():
    moments = random.Random(7)
    newest = leftovers = 0
    for _ in range(15):
        process = forked(lambda: [store.save(snapshot(step)) for step in range(newest + 1, 10**6)])
        while max(store.steps(), default=0) <= newest:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        found, passed_over = store.newest_valid()
        assert passed_over == [], passed_over
        assert found.files == snapshot(found.progress.step).files
        assert found.progress.step > newest
        newest = found.progress.step
        leftovers += len(list(folder.glob(".partial-*")))
    store.save(snapshot(newest + 1))
    return {"leftovers": leftovers, "entries": sorted(path.name for path in folder.iterdir()), "newest": newest}

def two():
    def work():
        for step in range(1, 41):
            store.save(snapshot(step))
    processes = [forked(work) for _ in range(2)]
    return {"statuses": [os.waitpid(process, 0)[1] for process in processes],
            "entries": sorted(path.name for path in folder.iterdir()), "passed_over": store.newest_valid()[1]}

def limited():
    saver = CheckpointSaver(store)
    told = []
    for step, limit in ((1, -1), (2, 100_000), (3, 100_000), (4, -1)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
        saver.begin(snapshot(step), since=time.perf_counter())
        saver.wait()
        told += [save.error for save in saver.news()]
    return {"told": told, "trouble": saver.trouble, "entries": sorted(path.name for path in folder.iterdir())}

print(json.dumps(globals()[sys.argv[1]]()))
"""


def savers(work: str, folder: Path) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", SAVERS, work, str(folder)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def snapshot(step: int) -> Snapshot:
    progress = json.dumps({"step": step}).encode()
    return Snapshot({"adapters.safetensors": b"a", "optimizer.safetensors": b"o", "progress.json": progress})


def test_kill_9_at_any_instant_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    found = savers("killed", tmp_path)
    newest = int(str(found["newest"]))
    assert int(str(found["leftovers"])) > 0  # some were hit while they wrote
    assert found["entries"] == [f"step-{newest:08d}", f"step-{newest + 1:08d}"]


def test_two_processes_may_save_into_one_folder(tmp_path: Path) -> None:
    found = savers("two", tmp_path)
    assert found["statuses"] == [0, 0]
    assert found["entries"] == ["step-00000039", "step-00000040"]
    assert found["passed_over"] == []


def test_a_limit_of_the_disk_is_told_and_the_next_save_works_again(tmp_path: Path) -> None:
    found = savers("limited", tmp_path)
    told = found["told"]
    assert isinstance(told, list)
    assert [bool(error) for error in told] == [False, True, True, False]
    assert told[1].endswith("step-00000002 can't be written: File too large")
    assert str(found["trouble"]).startswith("2 of 4 checkpoints were not saved, the newest one on disk is of step 4")
    assert found["entries"] == ["step-00000001", "step-00000004"]


class HeldStore(CheckpointStore):
    """A disk that writes when it is let."""

    def __init__(self, folder: Path):
        super().__init__(folder, keep_last=9)
        self.may_write = threading.Event()

    def save(self, snapshot: Snapshot) -> Path:
        assert self.may_write.wait(60)
        return super().save(snapshot)


def test_only_the_next_save_waits_for_a_slow_disk(tmp_path: Path) -> None:
    store = HeldStore(tmp_path)
    saver = CheckpointSaver(store)
    saver.begin(snapshot(1), since=time.perf_counter())
    assert saver.news() == []
    assert store.steps() == []  # and yet training goes on
    second = threading.Thread(target=saver.begin, args=(snapshot(2),), kwargs={"since": time.perf_counter()})
    second.start()
    second.join(0.2)
    assert second.is_alive()
    store.may_write.set()
    second.join(60)
    saver.close()
    assert store.steps() == [2, 1]
    saver.wait()
    first, last = saver.news()
    assert (first.step, last.step) == (1, 2)
    assert last.waited > 0.1
    assert saver.trouble == ""


def test_what_nobody_expected_is_not_lost_in_the_thread(tmp_path: Path) -> None:
    saver = CheckpointSaver(CheckpointStore(tmp_path, keep_last=1))
    saver.begin(Snapshot({"progress.json": b"[]"}), since=time.perf_counter())
    with pytest.raises(ValueError, match="not the progress"):
        saver.wait()
    saver.close()


def test_a_manifest_that_hides_a_file_or_points_elsewhere_is_no_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=9)
    for step in (1, 2, 3):
        store.save(snapshot(step))
    for step, change in ((3, {"optimizer.safetensors": None}), (2, {"../step-00000001/progress.json": {}})):
        path = store.path(step) / "manifest.json"
        manifest = {**json.loads(path.read_text()), **change}
        path.write_text(json.dumps({name: entry for name, entry in manifest.items() if entry is not None}))
    found, passed_over = store.newest_valid()
    assert found is not None
    assert found.progress.step == 1
    assert all("manifest.json doesn't list the files of a checkpoint" in line for line in passed_over)


def test_a_save_under_way_elsewhere_is_left_alone_and_an_old_one_is_not(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    under_way = tmp_path / ".partial-00000001-1@another-host"
    under_way.mkdir()
    store.save(snapshot(2))
    assert under_way.is_dir()
    shutil.rmtree(under_way)
    under_way.mkdir()
    os.utime(under_way, (0, 0))
    store.save(snapshot(3))
    assert not under_way.exists()
