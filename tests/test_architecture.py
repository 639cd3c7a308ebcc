"""The map of rooms holds: imports go one way."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import macft

ROOT = Path(macft.__file__).parent

# What each room may import besides macft.errors.
ALLOWED = {
    "collective": set(),
    "benchmarking": {"cluster", "collective"},
    "cluster": {"collective", "blas"},
    "plan": {"blas", "cluster", "collective", "config", "data", "model", "status", "training"},
    "report": {"plan"},
    "thermal": {"plan", "report"},
    "model": {"blas"},
    "data": set(),
    "checkpoint": set(),
    "evaluation": {"collective", "data", "model", "plan", "training"},
    "training": {"checkpoint", "collective", "data", "model", "plan", "report", "stop"},
    "config": {"cluster", "collective", "data", "evaluation", "model", "plan", "report", "thermal", "training"},
}


def imports_of(path: Path) -> set[str]:
    """Names of macft modules a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "macft":
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "macft"}
    return found


def module_name(path: Path) -> str:
    parts = ("macft", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in ROOT.rglob("*.py")}


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    for name, path in FILES.items():
        if not name.startswith(f"macft.{room}.") and name != f"macft.{room}":
            continue
        rooms = {imported.split(".")[1] for imported in imports_of(path) if imported.count(".")}
        beyond = rooms - ALLOWED[room] - {room, "errors", "__version__"}
        assert not beyond, f"{name} imports {beyond}"


def test_there_is_no_import_cycle() -> None:
    graph = {
        name: {i for i in imports_of(path) if i in FILES and i not in (name, "macft")} for name, path in FILES.items()
    }
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(FILES) - 1


def test_every_room_is_on_the_map() -> None:
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert rooms == set(ALLOWED)


@pytest.mark.parametrize("library", ["zmq", "hydra", "tensorboard", "rich"])
def test_the_trainer_sees_interfaces_only(library: str) -> None:
    for path in (ROOT / "training").glob("*.py"):
        names = {
            n.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import) for n in node.names
        }
        names |= {
            node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
        }
        assert not any(name.split(".")[0] == library for name in names), path


def test_a_command_line_is_checked_without_what_only_a_run_needs() -> None:
    script = "import sys, macft.train; print({'mlx', 'mlx_lm', 'transformers', 'asyncssh', 'zmq'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"
