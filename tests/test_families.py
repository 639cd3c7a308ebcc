"""Families of mlx-lm: each is known, and a few of different kinds pass every check of benchmarks/families.py."""

from __future__ import annotations

from dataclasses import replace
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
from macft.model.confirm import confirm
from macft.model.files.learned_positions import check_lengths
from macft.model.files.vocabulary import vocabulary_of
from macft.model.load import load
from macft.model.settings import ModelConfig
from macft.model.trials.fitness import obstacle_to_training
from macft.model.trials.traceable import is_traceable

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
@pytest.mark.parametrize(
    ("family", "checks"),
    [
        ("qwen3_moe", list(CHECKS)),
        ("gemma3", list(CHECKS)),
        ("deepseek_v2", ["layers", "gradient", "packing", "recompute", "quantized"]),
        ("gpt_oss", ["gradient", "packing", "validation"]),
        ("mamba2", ["layers", "gradient", "recompute", "fuse"]),
        ("gemma4_text", ["gradient", "recompute"]),
        ("afm7", ["gradient", "recompute", "files", "fuse"]),
        ("dbrx", ["dropout"]),
    ],
)
def test_all_that_is_made_of_a_family_is_as_in_mlx_lm(family: str, checks: list[str], tmp_path: Path) -> None:
    """Mixture; wrapper and window; compressed values; sinks; states; shared keys; adapters in lists; odd dropout."""
    words = run(Case(family, build(family, tmp_path / family), KERNELS), checks)
    assert {check: word for check, word in words.items() if ":" in word} == {}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "gpt_bigcode", "baichuan_m1", "minimax_m3_vl"])
def test_answers_are_those_of_one_prompt_alone_where_a_batch_would_change_them(family: str, tmp_path: Path) -> None:
    """mlx-lm's batches of these: masks of another shape, one position for all, padding in a state, shifted blocks."""
    assert run(Case(family, build(family, tmp_path / family), KERNELS), ["generate"]) == {"generate": "yes"}


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
    if (obstacle := obstacle_to_training(model)) is not None:
        raise ValueError(obstacle)
    plain_sums(model, seven_rows()[:1])


def test_an_architecture_that_ends_the_program_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As olmo's does where a package is missing."""
    folder = build("llama", tmp_path / "model")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"llama"', '"ends_it_all"'))
    (tmp_path / "ends_it_all.py").write_text("import sys\nsys.exit(1)\n")
    monkeypatch.setattr(mlx_lm.models, "__path__", [*mlx_lm.models.__path__, str(tmp_path)])
    assert vocabulary_of(folder) is None
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


@pytest.mark.parametrize(
    ("family", "words"),
    [("phi3small", "lets a token see later ones"), ("gemma3n", "other logits in training than in generation")],
)
def test_a_model_that_would_learn_nothing_of_use_is_refused(family: str, words: str, tmp_path: Path) -> None:
    """A boolean mask is added to the scores; keys and values are shared by later blocks where there is a cache only."""
    loaded = load(ModelConfig(precision="float32"), build(family, tmp_path / family))
    with pytest.raises(ModelError, match=words):
        confirm(loaded.execution, loaded)


@pytest.mark.parametrize("family", ["gemma3_text", "gemma4_text", "qwen3_5_moe", "rwkv7", "afm7", "minimax_m3_vl"])
def test_other_models_are_fit_for_training(family: str, tmp_path: Path) -> None:
    assert obstacle_to_training(load_model(build(family, tmp_path / family))[0]) is None


def test_a_model_whose_code_needs_values_is_not_compiled(tmp_path: Path) -> None:
    """In training, the experts of dbrx are chosen in Python."""
    loaded = load(ModelConfig(precision="float32"), build("dbrx", tmp_path / "dbrx"))
    wanted = replace(loaded.execution.padded(), kernels="mlx", compiled=True)
    revised, notes = confirm(wanted, loaded)
    assert revised == replace(wanted, compiled=False)
    assert notes == ["this model's code needs values of arrays, so its steps aren't compiled"]
    assert is_traceable(load_model(build("qwen3_moe", tmp_path / "other"))[0])
