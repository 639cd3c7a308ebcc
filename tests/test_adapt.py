"""What becomes trainable."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from macft.errors import ConfigError, ModelError
from macft.model.adapt import adapt
from macft.model.adapter_files import load_adapter_weights, save_adapter
from macft.model.adapter_settings import AdapterConfig
from macft.model.load import load
from macft.model.settings import ModelConfig


@pytest.fixture
def model(tiny_model_folder: Path) -> Any:
    """A fresh two-block Llama."""
    return load(ModelConfig(path=str(tiny_model_folder)), tiny_model_folder).model


def trainable(model: Any) -> set[str]:
    return {name.removeprefix("model.layers.") for name, _ in tree_flatten(model.trainable_parameters())}


LINEARS = {
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (AdapterConfig(), {f"{b}.{n}.lora_{x}" for b in (0, 1) for n in LINEARS for x in "ab"}),
        (AdapterConfig(num_layers=1), {f"1.{n}.lora_{x}" for n in LINEARS for x in "ab"}),
        (AdapterConfig(layers=[0]), {f"0.{n}.lora_{x}" for n in LINEARS for x in "ab"}),
        (AdapterConfig(targets=["q_proj"]), {f"{b}.self_attn.q_proj.lora_{x}" for b in (0, 1) for x in "ab"}),
        (
            AdapterConfig(type="dora", targets=["mlp.up_proj"], layers=[1]),
            {f"1.mlp.up_proj.{x}" for x in ("lora_a", "lora_b", "m")},
        ),
        (
            AdapterConfig(type="full", num_layers=1),
            {f"1.{n}.weight" for n in LINEARS | {"input_layernorm", "post_attention_layernorm"}},
        ),
        (AdapterConfig(type="full", targets=["v_proj"]), {f"{b}.self_attn.v_proj.weight" for b in (0, 1)}),
    ],
)
def test_only_what_was_chosen_is_trained(model: Any, config: AdapterConfig, expected: set[str]) -> None:
    adaptation = adapt(model, config, seed=0)
    assert trainable(model) == expected
    assert adaptation.trainable_parameters == sum(value.size for _, value in tree_flatten(model.trainable_parameters()))
    assert adaptation.trainable_parameters < adaptation.total_parameters


def test_scales() -> None:
    assert AdapterConfig().effective_scale() == 20.0
    assert AdapterConfig(rank=16, alpha=32).effective_scale() == 2.0
    assert AdapterConfig(rank=16, alpha=32, rslora=True).effective_scale() == pytest.approx(32 / math.sqrt(16))


def test_the_seed_alone_decides_the_initial_values(tiny_model_folder: Path) -> None:
    def values(seed: int) -> Any:
        mx.random.uniform(shape=(7,))  # other uses of randomness don't matter
        model = load(ModelConfig(path=str(tiny_model_folder)), tiny_model_folder).model
        adapt(model, AdapterConfig(), seed=seed)
        return dict(tree_flatten(model.trainable_parameters()))["model.layers.0.self_attn.q_proj.lora_a"]

    assert mx.array_equal(values(1), values(1))
    assert not mx.array_equal(values(1), values(2))


def test_an_adapter_starts_without_effect(model: Any) -> None:
    tokens = mx.arange(12)[None]
    before = model(tokens)
    adapt(model, AdapterConfig(type="dora", dropout=0.5), seed=0)
    model.eval()
    assert mx.allclose(model(tokens), before, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (AdapterConfig(targets=["qproj"]), r"no projection 'qproj'; it has down_proj, gate_proj, k_proj"),
        (AdapterConfig(layers=[0, 2]), r"adapter\.layers: \[2\] don't exist; this model's blocks are 0 to 1"),
        (AdapterConfig(num_layers=3), r"adapter\.num_layers: 3 is more than this model's 2 blocks"),
    ],
)
def test_what_the_model_lacks_is_named(model: Any, config: AdapterConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        adapt(model, config, seed=0)


def test_an_adapter_goes_back_into_its_layers_only(model: Any, tiny_model_folder: Path, tmp_path: Path) -> None:
    adaptation = adapt(model, AdapterConfig(rank=4), seed=0)
    random = [(name, mx.random.normal(value.shape)) for name, value in tree_flatten(model.trainable_parameters())]
    model.load_weights(random, strict=False)
    save_adapter(tmp_path, model, adaptation.mlx_lm_config, model_name="tiny")
    again = load(ModelConfig(path=str(tiny_model_folder)), tiny_model_folder).model
    adapt(again, AdapterConfig(rank=4), seed=5)
    load_adapter_weights(tmp_path, again)
    assert mx.array_equal(model(mx.arange(9)[None]), again(mx.arange(9)[None]))
    other = load(ModelConfig(path=str(tiny_model_folder)), tiny_model_folder).model
    adapt(other, AdapterConfig(rank=8), seed=5)
    with pytest.raises(ModelError, match="doesn't fit"):
        load_adapter_weights(tmp_path, other)
    (tmp_path / "adapters.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="can't be read"):
        load_adapter_weights(tmp_path, other)
    with pytest.raises(ModelError, match="no adapter at"):
        load_adapter_weights(tmp_path / "nowhere", other)
