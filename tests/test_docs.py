"""The documentation is true: its commands work, its links lead somewhere, its messages exist, its tables are new."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import macft
from harness.runs import environment, uneven_dataset
from harness.tiny_model import TINY_CONFIG, make_tiny_model
from helpers.docs import NOT_RUN, PAGES, ROOT, Command, blocks, commands
from macft import errors
from macft.config.command_line import prepare
from macft.config.reference import keys, reference
from macft.config.schema import TrainConfig
from macft.config.yaml import to_yaml
from macft.report.events import Noted
from macft.report.run_folder import RunFolder
from macft.report.sinks.metrics_file import MetricsFile
from macft.topology.settings import TopologyConfig
from macft.topology.topology_file import save_topology, to_hostfile

HOW = ROOT / "docs/how-it-works.md"
COMMANDS = list({(command.text, command.says): command for page in PAGES for command in commands(page)}.values())
RUN_FOLDER = re.compile(r"runs/[\w-]+/\d[\d_-]+\d")
SHELL = ("mkdir ", "cp ")
DESK = TopologyConfig(kind="ssh", hosts=[f"10.0.0.{n}" for n in (1, 2, 3)], ssh=[f"me@10.0.0.{n}" for n in (1, 2, 3)])
IN_PLACE = ("keys", "cluster", "doctor", "plan", "monitor", "data")
"""Commands that are quick and need no second machine: they are run as written."""
BRIEFLY = {"monitor": ["--once"], "plan": ["dataset=./rows", "topology.batch=auto"]}
"""Added to these, so that the monitor ends and the plan reads few rows, which are long."""


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, bundled_model: Path) -> Iterator[Path]:
    """A folder with what the documentation's paths name: a model, rows, runs' folders, a cluster."""
    folder = tmp_path_factory.mktemp("reader")
    rows = uneven_dataset(folder / "rows")
    # As many blocks as the recipes adapt.
    model = make_tiny_model(folder / "tiny", bundled_model, {**TINY_CONFIG, "num_hidden_layers": 16})
    for name in ("path/to/folder", "model"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(rows, folder / name)
        for item in model.iterdir():
            (folder / name / item.name).symlink_to(item)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    config = TrainConfig()
    config.dataset.path, config.training.steps = str(rows), 2
    for name in {name for page in PAGES for name in RUN_FOLDER.findall(page.read_text())}:
        RunFolder(folder / name).begin(to_yaml(config))
        with contextlib.closing(MetricsFile(folder / name / "metrics.jsonl", first_step=0)) as told:
            told.handle(Noted("the run has begun"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MACFT_CONFIG", str(folder / "config"))
        patch.setenv("MACFT_KEYS", str(folder / "keys"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        (folder / "hosts.json").write_text(to_hostfile(DESK))
        yield folder


def typed(words: list[str]) -> tuple[int, str]:
    """``python -m MODULE ARGUMENTS`` in this process; returns status and output, errors included."""
    output = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        patch.setattr(sys, "argv", words[2:])
        for name in (words[2], f"{words[2]}.__main__"):  # imported before by another test, which runpy warns of
            if name in sys.modules and not hasattr(sys.modules[name], "__path__"):
                patch.delitem(sys.modules, name)
        try:
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return int(end.code or 0), output.getvalue()
    return 0, output.getvalue()


def objection(command: Command) -> str:
    """Why a command can't be right; nothing if it is."""
    words = command.words
    save_topology("desk", DESK)  # some commands remove it
    if words[:2] != ["python", "-m"] or not words[2].startswith("macft."):
        if not command.text.startswith(SHELL):
            return "neither macft nor mkdir or cp: say above the block why it is not run"
        done = subprocess.run(command.text, shell=True, capture_output=True, text=True, check=False)
        return done.stderr if done.returncode else ""
    room, arguments = words[2].removeprefix("macft."), words[3:]
    if room == "train":
        return _train(arguments)
    if arguments[:1] == ["join"] or (arguments[:1] == ["init"] and "--hostfile" not in arguments):
        return "needs other machines: say above the block why it is not run"
    if room in IN_PLACE:
        status, output = typed([*words, *BRIEFLY.get(room, [])])
        return output if status else ""
    return _by_its_help(words)


def _train(arguments: list[str]) -> str:
    if {"--help", "--cfg"} & set(arguments):
        done = subprocess.run(
            [sys.executable, "-m", "macft.train", *arguments],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        return "" if done.returncode == 0 and done.stdout else done.stderr
    try:
        prepare(arguments)
    except errors.ConfigError as error:
        return str(error)
    return ""


def _by_its_help(words: list[str]) -> str:
    """Options must stand in the command's own help, and overrides must compose."""
    status, told = typed([*words[:3], "--help"])
    if status:
        return told
    unknown = [word for word in words[3:] if word.startswith("-") and word.split("=")[0] not in told]
    overrides = [word for word in words[3:] if re.match(r"\+?[a-z_.]+=", word)]
    return f"no option {unknown[0]}" if unknown else _train(overrides)


@pytest.mark.slow
def test_every_command_works_or_says_why_it_is_not_run(sandbox: Path) -> None:
    assert (sandbox / "hosts.json").is_file()
    wrong = [
        f"{command.where}: {command.text}: {why}"
        for command in COMMANDS
        if not command.not_run and (why := objection(command)) != command.says.removeprefix("error: ")
    ]
    assert not wrong, "\n".join(wrong)
    assert len(COMMANDS) > 40


def test_a_wrong_command_would_be_found(sandbox: Path) -> None:
    assert sandbox.is_dir()
    for text, found in (
        ("python -m macft.train +recipe=llama-lora training.stepps=3", "training.steps"),
        ("python -m macft.train +recipe=lama-lora", "llama-lora"),
        ("python -m macft.cluster list nowhere", "no cluster 'nowhere'"),
        ("python -m macft.bench --sices 4K", "--sices"),
        ("python -m macft.bench topology=locl", "local"),
        ("python -m macft.monitor runs/none", "runs/none"),
        ("cp nothing.yaml here.yaml", "nothing.yaml"),
        ("rsync a b", "not run"),
    ):
        assert found in objection(Command("here", text, ""))


SHELLS = {"bash": ["bash", "--norc"], "zsh": ["zsh", "-f"]}
PRINT_WORDS = r"""
    PATH=/nowhere
    command_not_found_handle() { printf "%s\0" "$@"; }
    command_not_found_handler() { printf "%s\0" "$@"; }
    source() { printf "%s\0" source "$@"; }
"""
"""Every command is unknown, and the shell's own hook for that (bash: handle, zsh: handler) prints its words."""


def shell_words(shell: list[str], text: str, folder: Path) -> list[str]:
    """The words of all commands in ``text``, as ``shell`` reads them. No command is run."""
    path = shutil.which(shell[0])
    assert path is not None, shell
    done = subprocess.run(
        [path, *shell[1:], "-c", PRINT_WORDS + text],
        cwd=folder,
        env={"HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr, f"{shell[0]}: {text}: {done.stderr}"
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("name", SHELLS)
def test_shells_read_the_commands_as_written(name: str, tmp_path: Path) -> None:
    """No pattern or brace changes a word: each is what it is with all expansions turned off."""
    if shutil.which(name) is None and "CI" not in os.environ:
        pytest.skip(f"{name} is not installed")
    for command in COMMANDS:
        literal = shell_words(["bash", "--norc", "-f", "+B"], command.text, tmp_path)
        assert shell_words(SHELLS[name], command.text, tmp_path) == literal, command.where


@pytest.mark.parametrize("name", SHELLS)
def test_a_command_that_a_shell_changes_would_be_found(name: str, tmp_path: Path) -> None:
    if shutil.which(name) is None and "CI" not in os.environ:
        pytest.skip(f"{name} is not installed")
    braces = "macft train dataset.columns={prompt:question,completion:answer}"
    assert len(shell_words(SHELLS[name], braces, tmp_path)) == 4
    assert shell_words(SHELLS[name], r"a $'b\nc' 'd=[0,1]' && e", tmp_path) == ["a", "b\nc", "d=[0,1]", "e"]
    if name == "zsh":
        with pytest.raises(AssertionError, match="no matches found"):
            shell_words(SHELLS[name], "macft train topology.hosts=[a,b]", tmp_path)


def test_commands_have_no_comments_for_an_interactive_zsh_passes_them_to_the_command() -> None:
    assert not [command.where for command in COMMANDS if "#" in shlex.split(command.text)]


def test_overrides_in_running_text_are_quoted_for_the_shell() -> None:
    for page in PAGES:
        if page.name == "config-reference.md":  # values of keys, without a command
            continue
        text = re.sub(r"^```\w*\n.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        bare = [span for span in re.findall(r"`([^`\n]+)`", text) if re.search(r"(?:^|\s)[\w.]+=[\[{]", span)]
        assert not bare, f"{page.name}: {bare}"


def test_overrides_in_messages_and_help_are_quoted_for_the_shell() -> None:
    """Single words are quoted where they are put together; comments stand in topology files."""
    texts = [line for line in _literals().splitlines() if " " in line and not line.startswith("#")]
    bare = [text for text in texts if re.search(r"(?:^|[\s(])\+?[a-z_]+(?:\.[a-z_]+)+=[\[{]", text)]
    assert not bare


def test_files_named_in_the_documentation_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"`((?:\w+/)+\w+\.(?:py|yaml))`", page.read_text()):
            if not name.startswith(("my-configs/", "topology/")):
                assert (ROOT / name).exists() or (ROOT / "src/macft" / name).exists(), f"{page.name}: {name}"


@pytest.mark.slow
def test_the_small_benchmark_prints_its_table(sandbox: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "macft.bench", "--sizes", "4K", "--turns", "1"],
        cwd=sandbox,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "algbw" in done.stdout


def test_reasons_stand_right_above_a_block() -> None:
    for page in PAGES:
        marked = sum(bool(block.not_run) for block in blocks(page))
        for name in [name for block in blocks(page) for name in re.findall(r"tests/\w+\.py", block.not_run)]:
            assert (ROOT / name).is_file(), name
        assert marked == page.read_text().count("<!-- not run"), f"{page}: a reason belongs to no block"
    assert NOT_RUN.fullmatch("<!-- not run:  -->") is None


def test_modules_named_in_running_text_exist() -> None:
    for page in PAGES:
        text = page.read_text()
        scripts = [f"macft.{name}" for name in re.findall(r"`macft (\w+)", text)]
        for name in [*re.findall(r"python -m (macft[\w.]*\w)", text), *scripts]:
            assert importlib.util.find_spec(name) is not None, f"{page}: {name}"


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in _anchors(path), target


def test_the_map_has_all_pages_and_the_readme_has_the_map() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)", (ROOT / "docs/index.md").read_text()))
    assert linked == {page.name for page in PAGES[1:]} - {"index.md"}
    readme = PAGES[0].read_text()
    assert "](docs/index.md)" in readme
    assert len(readme.splitlines()) <= 150, "the rest belongs in docs/"


def test_the_config_reference_is_new_and_whole() -> None:
    page = reference()
    assert (ROOT / "docs/config-reference.md").read_text() == page, (
        "run: python -m macft.config.reference > docs/config-reference.md"
    )
    bare = [key.name for key in keys(TrainConfig) if not key.meaning]
    assert not bare, f"no comment above {bare}"
    for row in (
        "| `collective.codec` | str | `none` | none, bfloat16, int8, powersgd, auto |",
        "| `training.micro_batch_size` | int or null | `null` | 1 or more, or null |",
        "| `topology.port` | int | `7070` | from 1 to 65533 |",
    ):
        assert row in page


def test_recipes_and_options_all_stand_in_recipes_md() -> None:
    text = (ROOT / "docs/recipes.md").read_text()
    for group in ("recipe", "model", "dataset"):
        for path in (ROOT / "configs" / group).glob("*.yaml"):
            assert f"`{path.stem}`" in text, f"{group}={path.stem}"


def _literals() -> str:
    """All string literals of macft, with ... where an f-string has a value; one to a line."""
    found: list[str] = []
    for path in sorted(Path(macft.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"\{\w+\}", "...", node.value))
    return "\n".join(found)


@pytest.mark.slow
def test_troubleshooting_knows_every_error_and_no_other() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text()
    kinds = {
        name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.MacftError)
    }
    assert all(f"`{name}`" in text for name in kinds)
    literals = _literals()
    short = (ROOT / "docs/cluster.md").read_text().split("## If it does not work")[1]
    messages = re.findall(r"^\| `([^|]+)` \|", text + short, re.MULTILINE)
    assert len(messages) > 60
    for message in messages:
        for part in message.split("..."):
            assert part.strip() in literals, f"nothing says: {part}"


def test_measured_numbers_are_those_of_the_benchmarks() -> None:
    rows = re.findall(r"^\| .*\]\(\.\./benchmarks/([\w-]+\.md)\).*$", HOW.read_text(), re.MULTILINE)
    lines = [line for line in HOW.read_text().splitlines() if "](../benchmarks/" in line and line.startswith("|")]
    assert len(lines) > 8
    for line, source in zip(lines, rows, strict=True):
        measured = (ROOT / "benchmarks" / source).read_text()
        figures = re.findall(r"\*\*([^*]+)\*\*", line)
        assert figures, line
        for figure in figures:
            assert figure in measured, f"{figure} does not stand in {source}"


def test_the_energy_of_four_macs_follows_from_the_planned_speed() -> None:
    row = re.search(
        r"^\| 70B \| 4x M2 Max 32GB \|[^|]*\| (\d+) \|", (ROOT / "docs/big-models.md").read_text(), re.MULTILINE
    )
    assert row is not None
    text = " ".join((ROOT / "docs/thermal.md").read_text().split())
    watts, speed, joules = re.findall(r"take (\d+) W .* at (\d+) tokens/s .* about ([\d.]+) J a token", text)[0]
    wanted = row[1], f"{int(watts) / int(row[1]):.1f}"
    assert (speed, joules) == wanted, "docs/thermal.md: tokens/s and J a token follow from the table of mac_sweep.py"
