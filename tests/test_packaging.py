"""The wheel carries all that a checkout has, and works without one."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(folder), str(REPOSITORY)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    return next(folder.glob("macft-*.whl"))


def yaml_of_checkout() -> set[str]:
    groups = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "configs").rglob("*.yaml")}
    recipes = {f"configs/recipe/{path.name}" for path in (REPOSITORY / "recipes").glob("*.yaml")}
    source = REPOSITORY / "src" / "macft"
    tables = {path.relative_to(source).as_posix() for path in source.rglob("*.yaml")}
    return groups | recipes | tables


@pytest.mark.slow
def test_the_wheel_has_every_yaml_and_the_dataset(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert {name.removeprefix("macft/") for name in names if name.endswith(".yaml")} == yaml_of_checkout()
    assert {f"macft/data/builtin/sql/{split}.jsonl" for split in ("train", "valid", "test")} <= set(names)
    assert "macft/py.typed" in names


@pytest.mark.slow
def test_an_installed_macft_finds_its_recipes(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    # -S leaves an editable install's hook out, -s the user's; the dependencies come back by PYTHONPATH.
    paths = [str(site), *(path for path in sys.path if path.endswith("site-packages"))]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    code = "import macft, runpy, sys; print(macft.__file__); runpy.run_module('macft.train', run_name='__main__')"
    for program in (["-c", code], [str(site / "bin" / "macft"), "train"]):
        done = subprocess.run(
            [sys.executable, "-S", *program, "--cfg", "job", "+recipe=smoke"],
            cwd=elsewhere,
            env=variables,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert program[0] != "-c" or str(site) in done.stdout.splitlines()[0]
        assert "name: smoke" in done.stdout


def test_the_checkout_is_used_as_it_stands() -> None:
    """An edit of configs/ or recipes/ takes effect at once: nothing is copied into the package folder."""
    assert not (REPOSITORY / "src" / "macft" / "configs").exists()
    assert (REPOSITORY / "configs" / "recipe").resolve() == REPOSITORY / "recipes"
