"""Families of mlx-lm: each is known, and a few of different kinds pass every check of benchmarks/families.py."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx_lm.models
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from harness.families import FAMILIES, NOT_TRAINED, build, shipped_families
from harness.family_checks import CHECKS, Case, plain_sums, run, seven_rows
from helpers.docs import ROOT
from macft.data.formats import Place, Row
from macft.data.load import Split
from macft.device import blas
from macft.device.mlx_device import on_cpu
from macft.errors import DataError, ModelError
from macft.model.causal import sees_later_tokens
from macft.model.confirm import confirm
from macft.model.learned_positions import check_lengths
from macft.model.load import load
from macft.model.settings import ModelConfig

KERNELS = ("mlx", "cpu") if on_cpu() and blas.library() is not None else ("mlx",)


def test_every_family_of_mlx_lm_is_known_and_documented() -> None:
    """A new version of mlx-lm may ship another: it gets a configuration, and a row in the table."""
    assert sorted([*FAMILIES, *NOT_TRAINED]) == shipped_families()
    rows = [line for line in (ROOT / "docs/models.md").read_text().splitlines() if line.startswith("| `")]
    documented = {line.split("`")[1] for line in rows if line.count("|") == 10}
    assert documented == set(shipped_families())


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3_text", "deepseek_v3", "mamba2", "rwkv7"])
def test_a_tiny_model_is_causal_and_the_same_each_time(family: str, tmp_path: Path) -> None:
    """What comes later in a row changes nothing before, so that padding behind it doesn't either."""
    one, other = (load_model(build(family, tmp_path / name))[0] for name in ("one", "other"))
    tokens = mx.array(seven_rows()[5].tokens)[None]
    whole = one(tokens)
    assert mx.array_equal(whole, other(tokens)).item()
    assert mx.allclose(whole[:, :20], one(tokens[:, :20]), rtol=1e-4, atol=1e-4).item()
    assert 0.1 < float(mx.std(whole).item()) < 10


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3", "deepseek_v2", "gpt_oss", "mamba2", "afm7", "gemma4_text"])
def test_all_that_is_made_of_a_family_is_as_in_mlx_lm(family: str, tmp_path: Path) -> None:
    """Mixture; wrapper and window; compressed values; sinks; states; several results of a layer; shared keys."""
    words = run(Case(family, build(family, tmp_path / family), KERNELS))
    assert {check: word for check, word in words.items() if ":" in word} == {}
    assert words.keys() == CHECKS.keys()


@pytest.mark.parametrize("family", NOT_TRAINED)
def test_what_is_said_not_to_be_trained_is_not_trained_by_mlx_lm(family: str, tmp_path: Path) -> None:
    """With its default layers; the reasons in the table are as good as mlx-lm's version."""
    with pytest.raises((Exception, SystemExit)):
        train_by_mlx_lm(family, tmp_path / family)


def train_by_mlx_lm(family: str, folder: Path) -> None:
    model = load_model(build(family, folder))[0]
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": 2, "scale": 1.0, "dropout": 0.0})
    if not tree_flatten(model.trainable_parameters()):
        raise ValueError("no layer is trained")
    if sees_later_tokens(model):
        raise ValueError("it is not causal")
    plain_sums(model, seven_rows()[:1])


def test_an_architecture_that_ends_the_program_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As olmo's does where a package is missing."""
    folder = build("llama", tmp_path / "model")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"llama"', '"ends_it_all"'))
    (tmp_path / "ends_it_all.py").write_text("import sys\nsys.exit(1)\n")
    monkeypatch.setattr(mlx_lm.models, "__path__", [*mlx_lm.models.__path__, str(tmp_path)])
    with pytest.raises(ModelError, match=r"can't be read .*: its code in mlx-lm ends the program"):
        load(ModelConfig(), folder)


def test_a_row_longer_than_the_learned_positions_is_refused(tmp_path: Path) -> None:
    """MLX would read past the end of the table."""

    def split(*lengths: int) -> Split:
        rows = [Row(np.zeros(length, np.int32), 0) for length in lengths]
        return Split(rows, [{}] * len(rows), [Place("some.jsonl", "train", number + 1) for number in range(len(rows))])

    folder = build("gpt2", tmp_path / "gpt2")
    check_lengths(folder, [split(5, 1024)])
    with pytest.raises(DataError, match=r"row 3: it has 1025 tokens.* 1024 positions; use .*max_seq_length=1024"):
        check_lengths(folder, [split(5), split(5, 1024, 1025)])
    check_lengths(build("llama", tmp_path / "llama"), [split(1025)])


def test_a_model_that_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    """Of mlx-lm's families one does, whose attention adds a boolean mask to the scores."""
    loaded = load(ModelConfig(precision="float32"), build("phi3small", tmp_path / "model"))
    with pytest.raises(ModelError, match="lets a token see later ones"):
        confirm(loaded.execution, loaded)
    assert not sees_later_tokens(load_model(build("gemma3_text", tmp_path / "other"))[0])
