"""The packages form a line: each imports only packages before it. CONTRIBUTING.md shows the same order."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import macft

ROOT = Path(macft.__file__).parent

# From the bottom of the line to its top.
ORDER = (
    "cli",
    "logs",
    "device",
    "topology",
    "collective",
    "data",
    "model",
    "parallel",
    "checkpoint",
    "network",
    "remote",
    "rendezvous",
    "membership",
    "diagnostics",
    "pairing",
    "report",
    "training",
    "thermal",
    "evaluation",
    "generation",
    "serving",
    "inspection",
    "monitoring",
    "config",
    "planner",
    "run",
    "launch",
    "publishing",
    "api",
    "completion",
    "collective_bench",
    "training_bench",
)

# At the top of the package, or a package's __main__.
COMMANDS = {
    "adapter",
    "bench",
    "cluster",
    "completion",
    "data",
    "doctor",
    "evaluate",
    "fuse",
    "generate",
    "keys",
    "monitor",
    "plan",
    "push",
    "serve",
    "train",
}


def imports_of(path: Path) -> set[str]:
    """Names of the macft modules that a file imports."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "macft":
            modules |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names if alias.name.split(".")[0] == "macft"}
    return modules


def module_name(path: Path) -> str:
    parts = ("macft", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in ROOT.rglob("*.py")}
COMMAND_MODULES = {f"macft.{path.parent.name}.__main__" for path in ROOT.glob("*/__main__.py")}
"""Where a command has the name of a package: the package's ``__main__``, which like any command may import them all."""


def packages_imported_by(package: str) -> dict[str, set[str]]:
    """For each package that ``package`` imports, the files that do so; a command of its name is no part of it."""
    imported: dict[str, set[str]] = {}
    for name, path in FILES.items():
        if name in COMMAND_MODULES:
            continue
        if name == f"macft.{package}" or name.startswith(f"macft.{package}."):
            for module in imports_of(path):
                parts = module.split(".")
                if len(parts) > 1 and parts[1] not in (package, "errors", "__version__"):
                    imported.setdefault(parts[1], set()).add(name)
    return imported


@pytest.mark.parametrize("package", ORDER)
def test_a_package_imports_only_packages_before_it(package: str) -> None:
    before = set(ORDER[: ORDER.index(package)])
    beyond = {name: files for name, files in packages_imported_by(package).items() if name not in before}
    assert not beyond


def test_there_is_no_import_cycle_between_packages() -> None:
    graph = {package: set(packages_imported_by(package)) for package in ORDER}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(ORDER)


def test_there_is_no_import_cycle_between_modules() -> None:
    graph = {
        name: {i for i in imports_of(path) if i in FILES and i not in (name, "macft")} for name, path in FILES.items()
    }
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(FILES) - 1


def test_forecasting_is_a_leaf() -> None:
    users = {package for package in ORDER if "planner" in packages_imported_by(package)}
    assert users <= {"run", "training_bench"}


def test_the_planner_s_packages_form_a_line() -> None:
    """Predictions for one node, placements on several, then what a run or ``macft plan`` does with them."""
    after = {"": ("placement", "preflight", "plan"), "placement": ("preflight", "plan"), "preflight": ("plan",)}
    for name, path in FILES.items():
        if name.startswith("macft.planner."):
            parts = name.split(".")
            above = after.get(parts[2] if len(parts) > 3 else "", ())
            prefixes = tuple(f"macft.planner.{package}." for package in above)
            assert not [module for module in imports_of(path) if module.startswith(prefixes)], name


def test_the_order_is_complete() -> None:
    packages = {path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert packages == set(ORDER)


def test_only_commands_and_errors_are_at_the_top() -> None:
    modules = {path.stem for path in ROOT.glob("*.py")} - {"__init__", "__main__"}
    assert modules | {name.split(".")[1] for name in COMMAND_MODULES} == COMMANDS | {"errors"}
    assert {path.parent.parent for path in ROOT.rglob("__main__.py")} <= {ROOT, ROOT.parent}  # none lies deeper


def test_nothing_imports_a_command_of_a_package_and_it_only_calls_its_body() -> None:
    for name in COMMAND_MODULES:
        assert not [other for other, path in FILES.items() if name in imports_of(path)]
        assert not [node for node in ast.walk(ast.parse(FILES[name].read_text())) if isinstance(node, ast.FunctionDef)]


def test_contributing_shows_this_order() -> None:
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    assert tuple(re.findall(r"^\| `(\w+)/` \|", text, re.M)) == ORDER


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


def test_no_two_public_classes_share_a_name() -> None:
    owners: dict[str, list[str]] = {}
    for name, path in FILES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                owners.setdefault(node.name, []).append(name)
    assert {name: modules for name, modules in owners.items() if len(modules) > 1} == {}


def test_a_command_line_is_checked_without_what_only_a_run_needs() -> None:
    script = "import sys, macft.train; print({'mlx', 'mlx_lm', 'transformers', 'asyncssh', 'zmq'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=180)
    assert done.stdout.strip() == "set()"


def test_a_run_starts_without_the_trackers_that_mlx_lm_imports() -> None:
    """They are there for whoever asks mlx-lm for its callbacks."""
    script = (
        "import sys, macft.launch.worker; print({'wandb', 'swanlab'} & set(sys.modules)); "
        "from mlx_lm.tuner import callbacks; print(callbacks.wandb.__name__, callbacks.swanlab.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=180)
    assert done.stdout.splitlines() == ["set()", "wandb swanlab"]
    using = {name for name, path in FILES.items() if "from mlx_lm.tuner" in path.read_text()}
    assert using == {"macft.model.mlx_lm_tuner", "macft.training_bench.sides"}


def test_mlx_reads_files_by_their_path() -> None:
    """A Python file object is read in a thread of MLX's own, which aborts a process that ends meanwhile (134)."""
    calls = [
        (path, call)
        for path in ROOT.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("mx.load", "mlx.core.load")
    ]
    assert calls
    for path, call in calls:
        assert ast.unparse(call.args[0]).startswith("str("), f"{path}:{call.lineno}"
