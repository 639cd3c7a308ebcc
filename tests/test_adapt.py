"""What becomes trainable."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from harness.families import FAMILIES, TARGETS, configuration, new_model
from macft.errors import ConfigError, ModelError
from macft.model.adapters.adapt import adapt
from macft.model.adapters.adaptable import adaptable_blocks
from macft.model.adapters.files import load_adapter_weights, save_adapter
from macft.model.adapters.layers import select_layers
from macft.model.adapters.settings import AdapterConfig
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


# The layers of mlx-lm's default: dense, experts beside dense blocks, state spaces, projections in one with a LoRA of
# their own, wrappers, blocks whose path isn't model.layers.
QUICK = ["llama", "deepseek", "jamba", "afm7", "gemma4", "gpt2", "llama4", "mamba2", "qwen3_next"]


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES if name not in TARGETS],
)
def test_by_default_the_layers_of_mlx_lm_are_trained(family: str) -> None:
    theirs, ours = new_model(configuration(family)), new_model(configuration(family))
    theirs.freeze()
    linear_to_lora_layers(theirs, -1, {"rank": 4, "scale": 20.0, "dropout": 0.0})
    expected = {name: value.shape for name, value in tree_flatten(theirs.trainable_parameters())}
    planned = adaptable_blocks(new_model(configuration(family)))
    made = adapt(ours, AdapterConfig(rank=4), seed=0)
    assert {name: value.shape for name, value in tree_flatten(ours.trainable_parameters())} == expected
    assert made.trainable_parameters == sum(math.prod(shape) for shape in expected.values())
    layers = [layer for block in planned for layer in block.layers]
    assert sum(layer.trained_parameters("lora", 4) for layer in layers) == made.trainable_parameters


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        (
            "gemma3n",
            AdapterConfig(),
            r"^adapter\.targets: LoRA can't be added to altup\.prediction_coefs and 1 more \(the model's code reads "
            r"its weight\); use 'adapter\.targets=\[down_proj,gate_proj,.*v_proj\]'$",
        ),
        (
            "gemma3n",
            AdapterConfig(targets=["correction_coefs"]),
            r"can't be added to altup\.correction_coefs \(.*q_proj",
        ),
        ("afm7", AdapterConfig(type="dora"), r"qkv_proj \(FusedLinear has a LoRA of its own\); use .*\[down_proj,"),
        ("bitnet", AdapterConfig(), r"^adapter\.type: mlx-lm has no adapter for this model's layers"),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused(family: str, config: AdapterConfig, words: str) -> None:
    """Before the weights are loaded, and afterwards where the shape isn't known."""
    model = new_model(configuration(family))
    with pytest.raises(ConfigError, match=words) as caught:
        select_layers(config, adaptable_blocks(model))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=words):
        adapt(model, config, seed=0)


def test_the_targets_that_a_refusal_names_can_be_trained() -> None:
    model = new_model(configuration("gemma3n"))
    with pytest.raises(ConfigError) as caught:
        adapt(model, AdapterConfig(), seed=0)
    targets = str(caught.value).rpartition("[")[2].rstrip("]'").split(",")
    adapt(model, AdapterConfig(targets=targets), seed=0)
    lines = trainable(model)
    assert any("modality_router" in name for name in lines)
    assert not any("coefs" in name for name in lines)


class Layered(nn.Module):
    """Blocks with an embedding, and a linear layer whose weight the second one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [EmbeddingBlock(), ReadingBlock()]

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.layers[1](self.layers[0](tokens))


class EmbeddingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.inner = nn.Linear(8, 8)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.inner(self.table(tokens))


class ReadingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 4)
        self.read = nn.Linear(8, 4)

    def __call__(self, x: mx.array) -> mx.array:
        return self.inner(x) + x @ self.read.weight.T


def test_embeddings_inside_of_blocks_and_weights_that_are_read() -> None:
    with pytest.raises(ConfigError, match=r"LoRA can't be added to read .*; use 'adapter\.targets=\[inner,table\]'$"):
        adapt(Layered(), AdapterConfig(rank=2), seed=0)
    model = Layered()
    adapt(model, AdapterConfig(rank=2, targets=["inner", "table"]), seed=0)
    shapes = {name: value.shape for name, value in tree_flatten(model.trainable_parameters())}
    assert shapes == {
        "layers.0.table.lora_a": (16, 2),
        "layers.0.table.lora_b": (2, 8),
        "layers.0.inner.lora_a": (8, 2),
        "layers.0.inner.lora_b": (2, 8),
        "layers.1.inner.lora_a": (8, 2),
        "layers.1.inner.lora_b": (2, 4),
    }


def test_a_model_without_a_gradient_is_refused() -> None:
    with pytest.raises(ModelError, match=r"can't be trained on .*: \[gather_axis\] Cannot calculate VJP"):
        adapt(new_model(configuration("deepseek_v41")), AdapterConfig(), seed=0)


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
    save_adapter(tmp_path / "adapters", model, adaptation.mlx_lm_config, model_name="tiny")
    again = load(ModelConfig(path=str(tiny_model_folder)), tiny_model_folder).model
    adapt(again, AdapterConfig(rank=4), seed=5)
    load_adapter_weights(tmp_path, again)  # a run's folder
    assert mx.array_equal(model(mx.arange(9)[None]), again(mx.arange(9)[None]))
    other = load(ModelConfig(path=str(tiny_model_folder)), tiny_model_folder).model
    adapt(other, AdapterConfig(rank=8), seed=5)
    with pytest.raises(ModelError, match="doesn't fit"):
        load_adapter_weights(tmp_path, other)
    (tmp_path / "adapters" / "adapters.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="can't be read"):
        load_adapter_weights(tmp_path / "adapters", other)
    with pytest.raises(ModelError, match="no adapter at"):
        load_adapter_weights(tmp_path / "nowhere", other)
