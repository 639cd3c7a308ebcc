"""``runs/latest``: the link to the run that began last."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from macft import monitor
from macft.completion.candidates import candidates
from macft.config.command_line import prepare
from macft.config.schema import TrainConfig
from macft.config.yaml import to_yaml
from macft.errors import ConfigError
from macft.report.run_folder import RunFolder
from macft.run.claim import claim
from macft.run.tuned_model import find_run


@pytest.fixture
def config_yaml() -> str:
    return to_yaml(configured())


def configured(*overrides: str) -> TrainConfig:
    config = prepare(["+recipe=smoke", *overrides]).job
    assert config is not None
    return config


def begun(folder: Path, config: str) -> Path:
    RunFolder(folder).begin(config)
    return folder


def test_the_link_leads_to_the_run_that_began_last(tmp_path: Path, config_yaml: str) -> None:
    link = tmp_path / "runs" / "latest"
    for folder in (tmp_path / "runs" / "a" / "1", tmp_path / "runs" / "b" / "2", tmp_path / "runs" / "flat"):
        begun(folder, config_yaml)
        assert link.resolve() == folder
    assert link.readlink() == Path("flat")  # the whole folder can be moved
    assert [path.name for path in link.parent.iterdir() if path.name.startswith(".")] == []


def test_runs_elsewhere_make_no_link(tmp_path: Path, config_yaml: str) -> None:
    for folder in (tmp_path / "x", tmp_path / "multirun" / "a" / "0", tmp_path / "runs" / "a" / "b" / "c"):
        begun(folder, config_yaml)
    assert not list(tmp_path.rglob("latest"))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_link_is_left_alone(tmp_path: Path, config_yaml: str, kind: str) -> None:
    mine = tmp_path / "runs" / "latest"
    mine.parent.mkdir()
    mine.mkdir() if kind == "folder" else mine.write_text("mine")
    begun(tmp_path / "runs" / "a" / "1", config_yaml)
    assert not mine.is_symlink()


def test_a_link_to_a_run_that_was_removed_is_replaced(tmp_path: Path, config_yaml: str) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "latest").symlink_to("a/gone")
    begun(runs / "a" / "1", config_yaml)
    assert (runs / "latest").resolve() == runs / "a" / "1"


def test_runs_that_begin_at_once_leave_one_link_that_is_always_whole(tmp_path: Path, config_yaml: str) -> None:
    link = begun(tmp_path / "runs" / "a" / "0", config_yaml).parents[1] / "latest"
    folders = [tmp_path / "runs" / "a" / str(number) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(begun, folder, config_yaml) for folder in folders]
        while not all(each.done() for each in done):
            assert (link / "config.yaml").is_file()
        assert [each.result() for each in done] == folders
    assert link.resolve() in folders
    assert sorted(path.name for path in link.parent.iterdir()) == ["a", "latest"]


def test_commands_take_the_link(
    tmp_path: Path, config_yaml: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun(tmp_path / "runs" / "a" / "1", config_yaml)
    (run / "metrics.jsonl").write_text('{"type": "evaluated", "step": 0, "loss": 1.5}\n')
    monkeypatch.chdir(tmp_path)
    assert find_run(Path("runs/latest")).path == run
    command = prepare(["+resume=runs/latest"])
    assert command.resume == run
    assert command.output is not None
    assert command.output.path == run
    assert ("runs/latest", "the newest run") in candidates("macft generate runs/la")
    monitor.main(["runs/latest", "--once"])
    assert "no step yet" in capsys.readouterr().out


@pytest.mark.parametrize("wanted", ["runs/latest", "runs/latest/2026-01-01_00-00-00"])
def test_a_new_run_never_goes_through_the_link(
    tmp_path: Path, config_yaml: str, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    run = begun(tmp_path / "runs" / "a" / "1", config_yaml)
    monkeypatch.chdir(tmp_path)
    before = sorted(run.rglob("*"))
    for overrides in ([], ["report.overwrite=true"]):
        with pytest.raises(ConfigError, match="leads through runs/latest, which is the newest run; give another"):
            claim(Path(wanted), configured(*overrides), key="hydra.run.dir")
    assert sorted(run.rglob("*")) == before


def test_a_run_that_is_replaced_keeps_its_link(tmp_path: Path, config_yaml: str) -> None:
    run = RunFolder(begun(tmp_path / "runs" / "flat", config_yaml))
    run.clear()
    assert (tmp_path / "runs" / "latest").resolve() == run.path
    assert not run.config.exists()
