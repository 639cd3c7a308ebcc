"""A run's folder: it belongs to one run, and a command that is refused changes nothing."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from harness.runs import adapter, environment, losses, start, train, train_to_end, wait_for_step
from helpers.disks import small_disk_at
from macft.cli.run_command import run_command
from macft.config.command_line import prepare
from macft.config.schema import TrainConfig
from macft.config.yaml import read, to_yaml
from macft.device.durable import write_atomically
from macft.errors import ConfigError, ModelError
from macft.launch.run_over_ssh import shipments
from macft.report.run_folder import RunFolder
from macft.run.claim import claim, claim_sweep
from macft.run.local_paths import with_paths_of_hosts, with_paths_of_terminal
from macft.run.resume import check_resume, notes_of_changes


def configured(*overrides: str) -> TrainConfig:
    config = prepare(["+recipe=smoke", *overrides]).job
    assert config is not None
    return config


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return configured()


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of each file; logs, which tell of refused commands too, left out."""
    files = [path for path in folder.rglob("*") if path.is_file() and "logs" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# One run in a folder.


def test_runs_of_one_second_get_a_folder_each(tmp_path: Path, config: TrainConfig) -> None:
    wanted = tmp_path / "runs" / "x" / "12-00-00"
    taken = [claim(wanted, config, key="hydra.run.dir", is_named=False) for _ in range(3)]
    assert [each.path.name for each in taken] == ["12-00-00", "12-00-00-2", "12-00-00-3"]
    for each in reversed(taken):
        each.__exit__()
    assert list(tmp_path.iterdir()) == []  # none of them has begun


def test_the_folder_of_another_run_is_refused(tmp_path: Path, config: TrainConfig) -> None:
    with claim(tmp_path / "x", config, key="hydra.run.dir") as taken:
        RunFolder(taken.path).begin(to_yaml(config))
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"x holds another run; continue it: python -m macft.train \+resume=/.*/x;"):
        claim(tmp_path / "x", config, key="hydra.run.dir")
    assert contents(tmp_path) == before
    for allowed in (claim(tmp_path / "x", config, key="resume", resume=True),):
        allowed.__exit__()
    with claim(tmp_path / "x", configured("report.overwrite=true"), key="hydra.run.dir"):
        assert contents(tmp_path) == before  # replaced once it begins
    assert contents(tmp_path) == before


def test_a_folder_in_use_is_refused_even_to_a_resume(tmp_path: Path, config: TrainConfig) -> None:
    with claim(tmp_path / "x", config, key="hydra.run.dir"):
        for resume in (False, True):
            with pytest.raises(ConfigError, match="a run is going on there"):
                claim(tmp_path / "x", config, key="resume", resume=resume)


def test_processes_of_one_run_share_a_folder(tmp_path: Path) -> None:
    hosts = configured("topology=hosts", "topology.hosts=[a,b]")
    with claim(tmp_path / "x", hosts, key="hydra.run.dir"), claim(tmp_path / "x", hosts, key="hydra.run.dir"):
        assert (tmp_path / "x").is_dir()


def test_a_node_joins_again_from_its_own_folder_only(tmp_path: Path) -> None:
    joining = configured("topology.join=10.0.0.1")
    with claim(tmp_path / "x", joining, key="hydra.run.dir") as taken:
        RunFolder(taken.path).begin(to_yaml(joining))
    with claim(tmp_path / "x", joining, key="hydra.run.dir"):
        pass
    with pytest.raises(ConfigError, match="holds another run"):
        claim(tmp_path / "x", configured("topology.join=10.0.0.1", "seed=7"), key="hydra.run.dir")


def test_a_folder_without_a_run_may_hold_anything_else(tmp_path: Path, config: TrainConfig) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with claim(tmp_path, config, key="hydra.run.dir") as taken:
        (taken.path / "logs").mkdir()
        (taken.path / "logs" / "macft-rank-0.log").write_text("refused")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_sweep_does_not_write_over_another(tmp_path: Path, config: TrainConfig) -> None:
    first, second = (claim_sweep(tmp_path / "12-00", config, key="hydra.sweep.dir", is_named=False) for _ in range(2))
    assert (first.name, second.name) == ("12-00", "12-00-2")
    (first / "multirun.yaml").touch()
    with pytest.raises(ConfigError, match=r"hydra\.sweep\.dir: .*12-00 holds another sweep"):
        claim_sweep(first, config, key="hydra.sweep.dir", is_named=True)


def test_a_process_that_ends_at_once_leaves_no_folder_of_a_run_that_had_not_begun(
    tmp_path: Path, config: TrainConfig
) -> None:
    taken = claim(tmp_path / "runs" / "x", config, key="hydra.run.dir")
    (taken.path / "logs").mkdir()
    assert taken.abandon() == "interrupted; no checkpoint had been saved"
    assert list(tmp_path.iterdir()) == []


# Folders that can't be written.


def test_a_file_where_the_folder_should_be_is_one_line(tmp_path: Path, config: TrainConfig) -> None:
    (tmp_path / "file").touch()
    for wanted in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(ConfigError, match=r"^hydra\.run\.dir: /.*/file is a file; give a folder$"):
            claim(wanted, config, key="hydra.run.dir")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, for which there must be the right to mount one."""
    with small_disk_at(tmp_path / "disk", 64) as folder:
        yield folder


def test_a_full_disk_and_one_that_is_read_only_are_one_line(mounted: Path, config: TrainConfig) -> None:
    full = mounted / "full"
    with pytest.raises(OSError, match="No space"):
        full.write_bytes(bytes(1 << 20))
    with pytest.raises(ConfigError, match=r"^hydra\.run\.dir: .* can't be written \(No space left on device\)"):
        claim(mounted / "runs" / "x", config, key="hydra.run.dir")
    assert [path.name for path in mounted.iterdir()] == ["full"]
    full.unlink()
    RunFolder(mounted / "run").begin(to_yaml(config))
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    with pytest.raises(ConfigError, match=r"^hydra\.run\.dir: .* can't be made \(Read-only file system\)"):
        claim(mounted / "runs" / "x", config, key="hydra.run.dir", is_named=False)
    with pytest.raises(ConfigError, match=r"^resume: .* can't be written \(Read-only file system\)"):
        claim(mounted / "run", config, key="resume", resume=True)


def test_a_file_is_replaced_whole_or_not_at_all(mounted: Path) -> None:
    path = mounted / "config.yaml"
    write_atomically(path, "the old one")
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "x" * (1 << 20))
    assert path.read_text() == "the old one"
    assert [each.name for each in mounted.iterdir()] == ["config.yaml"]


# Going on.


def test_a_damaged_configuration_is_one_line(tmp_path: Path, config: TrainConfig) -> None:
    file = tmp_path / "config.yaml"
    whole = to_yaml(config).encode()
    cuts = [whole[: len(whole) * part // 8] for part in range(8)]
    for content in (*cuts, b"- a\n", b"a: [\xff"):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=r"^resume: /.*/config\.yaml is damaged: [^\n]*$"):
            prepare([f"+resume={tmp_path}"])
        with pytest.raises(ConfigError, match=r"config\.yaml is damaged"):
            read(file)


def test_settings_that_the_checkpoints_do_not_fit_are_refused(tmp_path: Path, config: TrainConfig) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(to_yaml(config))
    other = configured("adapter.rank=16", "optimizer=sgd", "optimizer.learning_rate=1e-5")
    check_resume(folder, other)  # there is no checkpoint yet
    (folder.checkpoints / "step-00000002").mkdir(parents=True)
    check_resume(folder, configured("training.steps=99", "seed=3"))
    with pytest.raises(ConfigError) as refused:
        check_resume(folder, other)
    rank, optimizer = str(refused.value).splitlines()
    assert rank.startswith("adapter.rank: 16 doesn't fit the run's checkpoints, which were made with 8;")
    assert optimizer.startswith("optimizer.name: sgd doesn't fit")


def test_changes_are_told(config: TrainConfig) -> None:
    assert notes_of_changes(config, configured("report.every=3", "training.keep_last=9"), 4) == []
    assert notes_of_changes(config, configured("optimizer.learning_rate=1e-5"), 4) == [
        f"changed after step 4: optimizer.learning_rate from {config.optimizer.learning_rate} to 1e-05"
    ]
    assert "another order" in notes_of_changes(config, configured("seed=5"), 4)[1]


@pytest.fixture(scope="module")
def basics(tiny_task: list[str]) -> list[str]:
    steps = ["training.batch_size=4", "training.steps=2", "training.eval_every=0", "training.save_every=1"]
    return [*tiny_task, *steps, "report.tensorboard=false", "thermal=off"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, basics: list[str]) -> Path:
    return train_to_end(*basics, folder=tmp_path_factory.mktemp("finished") / "run", cwd=tmp_path_factory.mktemp("x"))


REFUSED = [
    ("model=/nowhere", "model.path: folder '/nowhere' doesn't exist"),
    ("dataset.path=/nowhere", "dataset.path: /nowhere does not exist"),
    ("training.steps=1", "training.steps: 1 is less than the 2 steps already made"),
    ("adapter.rank=16", "adapter.rank: 16 doesn't fit the run's checkpoints"),
]


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["single", "local"])
def test_a_refused_command_changes_nothing(tmp_path: Path, basics: list[str], finished: Path, topology: str) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    before = contents(run)
    for override, words in REFUSED[2:] if topology == "local" else REFUSED:
        done = train(f"+resume={run}", override, f"topology={topology}", cwd=tmp_path)
        assert done.status in (1, 2)
        assert all(line.startswith("· ") for line in done.output.splitlines())  # what was being done until then
        assert done.errors.startswith(f"error: {words}")
        assert len(done.errors.splitlines()) == 1
        assert contents(run) == before
    done = train(*basics, "dataset.path=/nowhere", f"topology={topology}", cwd=tmp_path)
    assert done.status == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    done = train(f"+resume={run}", "training.steps=3", "seed=1", f"topology={topology}", cwd=tmp_path)
    assert done.status == 0, done.errors
    assert "· changed after step 2: seed from 0 to 1, training.steps from 2 to 3" in done.output
    assert read(run / "config.yaml").seed == 1


@pytest.mark.slow
def test_four_runs_at_once_and_a_named_one_twice(tmp_path: Path, basics: list[str]) -> None:
    processes = [start(*basics, f"seed={seed}", cwd=tmp_path) for seed in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    runs = sorted((tmp_path / "runs" / "run").iterdir())
    assert sorted(read(run / "config.yaml").seed for run in runs) == [0, 1, 2]
    assert all(adapter(run) for run in runs)
    named = [*basics, f"hydra.run.dir={runs[0]}"]
    done = train(*named, cwd=tmp_path)
    assert done.status == 2
    assert "holds another run" in done.errors
    done = train(*named, "report.overwrite=true", "training.steps=1", cwd=tmp_path)
    assert done.status == 0, done.errors
    assert len(losses(runs[0])) == 1
    assert [path.name for path in (runs[0] / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.slow
def test_checkpoints_that_cannot_be_read_are_kept(tmp_path: Path, finished: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    for file in run.glob("checkpoints/*/adapters.safetensors"):
        file.write_bytes(b"")
    before = contents(run)
    for topology in ("single", "local"):
        done = train(f"+resume={run}", f"topology={topology}", cwd=tmp_path)
        assert done.status == 1
        assert re_unreadable(done.errors, run), done.errors
        assert contents(run) == before


def re_unreadable(errors: str, run: Path) -> bool:
    line = f"error: resume: none of the 2 checkpoints in {run}/checkpoints can be used (checkpoint"
    return errors.startswith(line) and errors.endswith(f"remove them: rm -r {run}/checkpoints\n")


@pytest.mark.slow
def test_an_interrupted_run_tells_only_of_checkpoints_there_are(tmp_path: Path, basics: list[str]) -> None:
    run = tmp_path / "run"
    longer = [*basics, "training.steps=100000", "training.save_every=0", f"hydra.run.dir={run}"]
    process = start(*longer, cwd=tmp_path)
    wait_for_step(process, run)
    process.send_signal(signal.SIGSTOP)  # so that both signals are there before the step ends
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted; no checkpoint had been saved"


# What the terminal and the machine may lack.


@pytest.mark.slow
def test_a_terminal_without_unicode_shows_the_run(
    tmp_path: Path, basics: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = train(*basics, "training.steps=1", f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.status == 0, done.errors
    assert "\\xb7 memory" in done.output
    assert "step 1/1" in done.output
    assert "stops reporting" not in done.errors


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the latter with LC_ALL=C
def test_letters_that_the_terminal_lacks_are_numbers(monkeypatch: pytest.MonkeyPatch, errors: str) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii", errors=errors))
    assert run_command(lambda _: print("· memory"), []) == 0
    assert shown.getvalue() == b"\\xb7 memory\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/data"),
            "error: /data can't be used: Permission denied; change",
        ),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "x" * 999),
            f"error: {'x' * 200}... can't be used: File name too",
        ),
    ],
)
def test_a_path_that_cannot_be_used_is_one_line(capsys: pytest.CaptureFixture[str], error: OSError, line: str) -> None:
    def main(_: Sequence[str]) -> None:
        raise error

    assert run_command(main, []) == 1
    told = capsys.readouterr().err
    assert told.startswith(line)
    assert told.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root may read all files")
def test_a_dataset_that_may_not_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir(mode=0)
    without = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    command = [*without, sys.executable, "-m", "macft.data", "rows"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: rows/train.jsonl can't be used: Permission denied")
    assert done.stderr.count("\n") == 1


def test_a_folder_that_was_removed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run_command(lambda _: 0, []) == 2
    assert capsys.readouterr().err == "error: the current folder no longer exists; go to another one with cd\n"


def test_a_command_may_have_no_standard_streams(tmp_path: Path) -> None:
    """A file that is opened would get the number of standard output, and the command's lines."""
    script = (
        "from pathlib import Path; from macft.cli.run_command import run_command\n"
        "def main(_):\n    with Path('rows').open('w') as rows:\n        print('a line', flush=True)\n"
        "        rows.write('rows')\n"
        "raise SystemExit(run_command(main, []))"
    )
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&-', "sh", sys.executable, "-c", script],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "rows").read_text() == "rows"


def test_mlx_lm_is_imported_where_few_files_may_be_open() -> None:
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 2048)); import macft, mlx_lm.utils; "
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    # Root may raise the limit; without this right it is as for any user.
    without = ["setpriv", "--bounding-set=-sys_resource"] if os.geteuid() == 0 and shutil.which("setpriv") else []
    done = subprocess.run([*without, sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "(2048, 2048)\n", done.stderr


@pytest.mark.slow
def test_a_configuration_of_the_users_own(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    groups = "model: smollm2-135m,dataset: sql,adapter: lora,optimizer: adamw,training: default,topology: single"
    more = ",collective: ring,report: default,thermal: balanced,recipe: smoke,_self_,override hydra/job_logging: stdout"
    lines = ["macft_schema", *(groups + more).split(",")]
    (own / "train.yaml").write_text("defaults:\n" + "".join(f"  - {line}\n" for line in lines) + "seed: 11\n")
    done = train("--config-path", "own", "training.steps=7", "--cfg", "job", cwd=tmp_path)
    assert done.status == 0, done.errors
    assert "seed: 11" in done.output
    assert "steps: 7" in done.output
    wrong = train("training.steps=7", "--config-path", "own", "training.stepz=7", cwd=tmp_path)
    assert wrong.errors == "error: training.stepz: no such key; did you mean training.steps?\n"
    assert list(tmp_path.iterdir()) == [own]


# Paths that begin in the working folder.


@pytest.mark.slow
def test_a_run_goes_on_and_is_evaluated_from_another_folder(tmp_path: Path, tiny_model_folder: Path) -> None:
    """Model, dataset and first adapter are typed as relative paths; every later command is typed elsewhere."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (project / "models").mkdir(parents=True)
    elsewhere.mkdir()
    (project / "models" / "tiny").symlink_to(tiny_model_folder)
    rows = "".join(
        json.dumps({"prompt": f"what is {number}", "completion": f"number {number}"}) + "\n" for number in range(12)
    )
    for split in ("train", "valid", "test"):
        (project / "rows").mkdir(exist_ok=True)
        (project / "rows" / f"{split}.jsonl").write_text(rows)
    typed = ("+recipe=smoke", "model=./models/tiny", "dataset=rows", "training.batch_size=2", "thermal=off", "name=x")
    done = train(*typed, "training.steps=2", cwd=project)
    assert done.status == 0, done.errors
    run = (project / "runs" / "latest").resolve()
    assert read(run / "config.yaml").dataset.path == str(project / "rows")
    assert read(run / "config.yaml").model.path == str(project / "models" / "tiny")

    assert json.loads((run / "adapters" / "adapter_config.json").read_text())["model"] == str(
        project / "models" / "tiny"
    )

    latest = project / "runs" / "latest"
    resumed = train(f"+resume={latest}", "training.steps=3", cwd=elsewhere)
    assert resumed.status == 0, resumed.errors
    assert len(losses(run)) == 3
    changed = next(line for line in resumed.output.splitlines() if "changed after step 2" in line)
    assert "path" not in changed
    again = train("+resume=runs/latest", "dataset.path=rows", "training.steps=4", cwd=project)
    assert "path" not in next(line for line in again.output.splitlines() if "changed after step 3" in line)
    for command in (["generate", "--prompt", "what is 3", "--max-tokens", "4"], ["evaluate", "--rows", "2"]):
        done = subprocess.run(
            [sys.executable, "-m", f"macft.{command[0]}", str(latest), *command[1:]],
            cwd=elsewhere, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_a_run_over_ssh_goes_on_from_another_folder(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine keeps absolute paths, and what they were typed as, which the hosts find model and rows by."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    (here / "rows").mkdir(parents=True)
    (here / "own.py").touch()
    (here / "model").symlink_to(tiny_model_folder)
    elsewhere.mkdir()
    hosts = ["topology=ssh", "topology.hosts=[a,b]", "topology.ship=[data,model]"]
    paths = ["dataset.path=rows", "model=custom", "model.path=model", "adapter.init_from=~/adapter"]
    typed = configured(*hosts, *paths, "dataset.metric=own.metric")
    monkeypatch.chdir(here)
    kept = with_paths_of_terminal(typed)
    (tmp_path / "config.yaml").write_text(to_yaml(kept))
    monkeypatch.chdir(elsewhere)
    kept = read(tmp_path / "config.yaml")
    assert (kept.dataset.path, kept.model.path) == (str(here / "rows"), str(here / "model"))
    assert (kept.dataset.metric_folder, kept.adapter.init_from) == (str(here), "~/adapter")
    sent = with_paths_of_hosts(with_paths_of_terminal(kept))
    assert sent == replace(typed, dataset=replace(typed.dataset, metric_folder="."))
    assert [each.destination for each in shipments(kept)] == ["macft/rows", "macft/model"]
    (here / "rows").rmdir()
    (here / "model").unlink()
    assert shipments(kept, resume=True) == []
    with pytest.raises(ConfigError, match=f"data can't be sent, for '{here / 'rows'}' is not on this machine"):
        shipments(kept)
    kept.topology.ship = ["model"]
    with pytest.raises(ModelError):
        shipments(kept)
