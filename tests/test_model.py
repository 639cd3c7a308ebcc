"""Model settings, loading a model folder, and preparing the device."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from omegaconf import OmegaConf

from macft.errors import ConfigError, ModelError
from macft.model.load import LoadedModel, load
from macft.model.settings import ModelConfig, problems

ROOT = Path(__file__).parents[1]
TOKENS = mx.array([[5, 900, 31, 7, 48000, 12, 12, 640]])


def test_defaults_have_no_problems() -> None:
    assert problems(ModelConfig()) == []
    assert OmegaConf.to_object(OmegaConf.structured(ModelConfig)) == ModelConfig()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"path": " "}, ("model.path", "empty")),
        ({"revision": ""}, ("model.revision", "null")),
        ({"precision": "fp16"}, ("model.precision: 'fp16'", "did you mean 'float16'?")),
        ({"precision": "bflaot16"}, ("model.precision", "did you mean 'bfloat16'?")),
        ({"precision": "8bit"}, ("model.precision", "auto, checkpoint, float32")),
        ({"quantization": "int4"}, ("model.quantization", "did you mean '4bit'?")),
        ({"quantization": "3bit"}, ("model.quantization: '3bit'", "auto, keep, none, 4bit, 8bit")),
        ({"quantization_group_size": 48}, ("model.quantization_group_size: 48", "32, 64, 128")),
    ],
)
def test_each_wrong_value_is_one_line(values: dict[str, Any], words: tuple[str, ...]) -> None:
    (line,) = problems(ModelConfig(**values))
    assert "\n" not in line
    for word in words:
        assert word in line


def test_every_model_file_fits_the_schema() -> None:
    files = sorted((ROOT / "configs" / "model").rglob("*.yaml"))
    assert {"smollm2-135m.yaml", "custom.yaml"} < {path.name for path in files}
    for path in files:
        merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(path))
        assert path.read_text().startswith("# "), path
        if path.stem == "custom":
            assert "model.path: is empty" in problems(OmegaConf.to_object(merged))[0]
        else:
            assert problems(OmegaConf.to_object(merged)) == [], path


@pytest.fixture
def cpu() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.mark.slow
@pytest.mark.usefixtures("cpu")
def test_on_a_cpu_auto_is_dequantised_float32(loaded: LoadedModel, bundled_model: Path) -> None:
    auto = load(ModelConfig(), bundled_model)
    assert (auto.was_quantized, auto.is_quantized, auto.dtype) == (True, False, mx.float32)
    assert auto.notes == []
    assert "quantization" not in auto.config
    assert tree_flatten(auto.model.trainable_parameters()) == []
    assert mx.array_equal(auto.model(TOKENS), loaded.model(TOKENS))


@pytest.mark.slow
@pytest.mark.usefixtures("cpu")
def test_keep_keeps_quantised_layers_and_agrees(loaded: LoadedModel, bundled_model: Path) -> None:
    kept = load(ModelConfig(quantization="keep"), bundled_model)
    assert kept.is_quantized
    assert kept.config["quantization"]["bits"] == 4
    assert "slower" in kept.notes[0]
    assert mx.allclose(kept.model(TOKENS[:, :2]), loaded.model(TOKENS[:, :2]), atol=1e-2)


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("bits", [4, 8])
def test_on_a_cpu_quantised_values_are_held_as_float32(tiny_model_folder: Path, bits: int) -> None:
    config = ModelConfig(quantization=f"{bits}bit", quantization_group_size=32)
    held, plain = load(config, tiny_model_folder), load(ModelConfig(), tiny_model_folder)
    assert (held.was_quantized, held.is_quantized, held.dtype) == (False, False, mx.float32)
    assert held.notes[0].startswith(f"{bits}-bit")
    for name in ("q_proj", "o_proj"):
        before = plain.model.layers[0].self_attn[name].weight
        after = held.model.layers[0].self_attn[name].weight
        quantised = mx.quantize(before, group_size=32, bits=bits)
        assert mx.array_equal(after, mx.dequantize(*quantised, group_size=32, bits=bits))
        assert not mx.array_equal(after, before)


def test_a_checkpoint_of_another_width_is_refused(bundled_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.quantization: 8bit .* has 4 bits"):
        load(ModelConfig(quantization="8bit"), bundled_model)


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bfloat16", mx.bfloat16), ("float16", mx.float16), ("checkpoint", mx.float32)],
)
def test_precision_is_what_was_asked_for(tiny_model_folder: Path, precision: str, dtype: mx.Dtype) -> None:
    result = load(ModelConfig(precision=precision), tiny_model_folder)
    assert result.dtype == dtype
    assert result.model.model.norm.weight.dtype == dtype
    assert (result.notes == []) == (dtype == mx.float32)


@pytest.fixture
def copy_of_tiny(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def test_weights_cut_short_are_refused(copy_of_tiny: Path) -> None:
    weights = copy_of_tiny / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    check_refused(copy_of_tiny, "can't be read")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "perceptron"}, "perceptron not supported"),
        ({"hidden_size": 32}, "can't be read"),
        ({"num_hidden_layers": 3}, "Missing"),
        ({"model_file": "model.py"}, "model.trust_remote_code=true"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(copy_of_tiny: Path, changes: dict[str, Any], words: str) -> None:
    path = copy_of_tiny / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    check_refused(copy_of_tiny, words)


def test_a_config_without_a_model_type_is_refused(copy_of_tiny: Path) -> None:
    (copy_of_tiny / "config.json").write_text("{}")
    check_refused(copy_of_tiny, "no 'model_type'")


def test_a_missing_tokenizer_is_refused(copy_of_tiny: Path) -> None:
    (copy_of_tiny / "tokenizer.json").unlink()
    check_refused(copy_of_tiny, "has no tokenizer")


def test_a_broken_tokenizer_is_refused(copy_of_tiny: Path) -> None:
    (copy_of_tiny / "tokenizer.json").write_text('{"version": "1.0",')
    check_refused(copy_of_tiny, "can't be read as a tokenizer")


def check_refused(folder: Path, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(ModelConfig(), folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


COMPILED_SUM = """
from macft.device.mlx_device import prepare_device
import mlx.core as mx
mx.set_default_device(mx.cpu)
print(prepare_device())
print(mx.compile(lambda x: mx.exp(x) + mx.sin(x))(mx.zeros(1)).item())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux", reason="only MLX's Linux CPU backend needs a C++ compiler")
@pytest.mark.parametrize("situation", ["whole", "no compiler", "broken compiler", "no temporary folder"])
def test_the_cpu_works_whatever_the_compiler(tmp_path: Path, situation: str) -> None:
    environment = dict(os.environ, TMPDIR=str(tmp_path))
    broken = tmp_path / "g++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ]\n')
    broken.chmod(0o755)
    if situation == "no compiler":
        environment["PATH"] = str(tmp_path / "missing")
    elif situation == "broken compiler":
        environment["PATH"] = f"{tmp_path}:/bin"
    elif situation == "no temporary folder":
        environment["TMPDIR"] = str(tmp_path / "missing")
    process = subprocess.run(
        [sys.executable, "-c", COMPILED_SUM], env=environment, capture_output=True, text=True, timeout=180
    )
    line, value = process.stdout.splitlines()
    assert "CPU, float32 through " in line
    assert ("mx.compile off" in line) == (situation in ("broken compiler", "no temporary folder"))
    assert float(value) == 1.0
