"""Folders and files may have any name: in Hydra's grammar, in YAML, in the commands to copy, in all commands."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

import macft.adapter
import macft.cluster
import macft.evaluate
import macft.fuse
import macft.generate
import macft.keys
import macft.monitor
import macft.plan
import macft.push
from harness.runs import adapter, losses, train, uneven_dataset
from helpers.names import NASTY
from macft.cli.commands import COMMANDS
from macft.cli.shell import command
from macft.config.command_line import prepare
from macft.config.overrides import override, resume_command, unescaped
from macft.config.schema import TrainConfig
from macft.config.yaml import read, to_yaml
from macft.inspection.command import main as show_data
from macft.model.fetch.local import find_local
from macft.model.settings import ModelConfig

NAMES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0/\x85\u2028\u2029"), min_size=1, max_size=30
)
"""What a file may be called, without those of Unicode's line breaks that YAML changes."""
ELSEWHERE = {
    "serve": "test_serve.py",
    "doctor": "test_doctor.py",
    "bench": "test_bench.py",
    "completion": "test_completion.py",
}
"""Commands that tests in other files give such a name, in the runs that they make anyway."""
PARSER = OverridesParser.create()
SHELLS = [shell for shell in ("bash", "zsh") if shutil.which(shell)]


def examples(test):  # type: ignore[no-untyped-def]
    """Names that have failed, beside those that hypothesis makes up."""
    for name in (
        NASTY,
        "???",
        "-dash",
        "=ls",
        "~",
        "null",
        "1e3",
        "\\",
        "a\\${b}",
        "it's\\",
        "a\nb",
        " a  b ",
        "$(id)",
    ):
        test = example(name)(test)
    return test


@examples
@given(NAMES)
def test_hydra_reads_the_value_that_was_written(name: str) -> None:
    item = PARSER.parse_override(override("+key", name))
    assert not item.is_sweep_override()
    assert Path(unescaped(item.value())) == Path(name)


@settings(max_examples=10)
@example(NASTY)
@example("a\\${b}")
@given(NAMES)
def test_a_runs_configuration_is_read_as_it_was_written(name: str) -> None:
    config = replace(TrainConfig(), model=ModelConfig(path=f"/models/{name}"))
    config.dataset.path, config.training.steps = "rows", 1
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_text(to_yaml(config), encoding="utf-8")
        assert read(file).model.path == config.model.path


@settings(max_examples=20)
@examples
@given(NAMES)
@pytest.mark.skipif(not SHELLS, reason="there is no shell here")
def test_shells_read_the_words_that_were_written(name: str) -> None:
    words = ("printf", "%s\\0", name, override("+resume", f"/Volumes/{name}"), Path(name))
    for shell in SHELLS:
        printed = subprocess.run([shell, "-c", command(*words)], capture_output=True, check=True).stdout.decode()
        path = f"./{Path(name)}" if name.startswith("-") else str(Path(name))
        assert printed.split("\0")[:-1] == [name, words[3], path]


@pytest.mark.parametrize("name", [NASTY, "a\\${b}", "null", " a  b "])
def test_a_path_is_taken_as_the_shell_completes_it(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    typed = prepare(["+recipe=smoke", f"model={folder}", f"hydra.run.dir={folder}/run"])
    assert typed.job is not None
    assert typed.output is not None
    assert typed.job.model.path == str(folder)
    assert typed.output.path == folder / "run"
    (folder / "config.yaml").write_text(to_yaml(typed.job))
    again = prepare([f"+resume={folder}"])
    assert again.resume == folder
    assert again.job == typed.job


@pytest.mark.slow
def test_every_command_takes_any_name(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / NASTY
    model = shutil.copytree(tiny_model_folder, place / "model *")
    rows = uneven_dataset(place / "rows")
    recipes, user = place / "mine", place / "user"
    (recipes / "recipe").mkdir(parents=True)
    (recipes / "recipe" / "own.yaml").write_text("# @package _global_\ntraining:\n  steps: 2\n  batch_size: 2\n")
    user.mkdir()
    monkeypatch.setenv("MACFT_CONFIG", str(user))
    more = ["dataset.metric=null", "training.metric_rows=0", "thermal=off", "adapter.num_layers=1"]
    given = [f"model={model}", f"dataset={rows}", "--config-dir", str(recipes), "+recipe=own", *more]
    done = train(*given, "hydra.run.dir=-run", cwd=place)
    assert done.status == 0, done.errors
    assert "try it: python -m macft.generate ./-run\n" in done.output
    run = place / "-run"
    for shell in SHELLS:
        line = resume_command(run).replace("python -m macft.train", "printf %s")
        resume = subprocess.run([shell, "-c", line], capture_output=True, text=True, check=True).stdout
    done = train(resume, "training.steps=3", "topology=local", cwd=tmp_path)
    assert done.status == 0, done.errors
    assert len(losses(run)) == 3
    start = [f"adapter.init_from={run / 'adapters'}", "training.steps=1", f"hydra.run.dir={place / 'second'}"]
    done = train(*given, *start, "report.console=false", cwd=tmp_path)
    assert done.status == 0, done.errors
    assert adapter(place / "second").keys() == adapter(run).keys()

    here = {"train"}

    def call(main: Callable[[Sequence[str]], object], *words: str | Path) -> None:
        here.add(main.__module__.split(".")[1].replace("inspection", "data"))
        assert not main([str(word) for word in words])

    assert find_local(str(model)) == model
    call(macft.plan.main, f"model={model}", f"dataset={rows}", "+recipe=smoke")
    call(macft.plan.main, f"+resume={run}")
    call(show_data, rows, "--model", model, "--rows", "1")
    call(macft.monitor.main, run, "--once")
    ask = ["--prompt", "hi", "--max-tokens", "2"]
    call(macft.generate.main, run, *ask)
    call(macft.generate.main, "--model", model, "--adapter-path", run / "adapters", *ask)
    call(macft.evaluate.main, run, "--json", place / "numbers")
    call(macft.evaluate.main, run, "--dataset", rows / "test.jsonl")
    call(macft.fuse.main, run, "--save-path", place / "fused *")
    call(macft.generate.main, "--model", place / "fused *", *ask)
    call(macft.adapter.main, "export", run, "--save-path", place / "peft")
    call(macft.adapter.main, "import", place / "peft", "--save-path", place / "back")
    call(macft.push.main, run, "--repo", "me/it", "--model", "org/base", "--card")
    call(macft.keys.main, "make")  # keys and clusters are in the user's folder
    call(macft.cluster.main, "list")
    assert (user / "keys").is_dir()
    assert (place / "back" / "adapters.safetensors").is_file()
    assert (place / "numbers").is_file()
    capsys.readouterr()
    assert here | set(ELSEWHERE) == set(COMMANDS)
    for file in ELSEWHERE.values():
        assert "NASTY" in (Path(__file__).parent / file).read_text()
