"""Experts of mixtures: trained as mlx-lm trains them, by both backends, with dropout that only the row decides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import _gather_sort
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import quantize_model

from harness.families import build, configuration, new_model
from harness.launches import launches
from harness.runs import adapter, train_to_end, write_jsonl
from helpers.computing import gradient_computer, packs, randomize_adapter
from helpers.models import assert_same_gradient
from helpers.runs_here import refused, train_here
from macft.data.batch import collate
from macft.data.formats import Row
from macft.errors import ConfigError, ModelError
from macft.model.adapters.adapt import adapt
from macft.model.adapters.attach import attach
from macft.model.adapters.files import load_adapter_weights, save_adapter
from macft.model.adapters.fuse import fuse
from macft.model.adapters.settings import AdapterConfig
from macft.model.backends.mlx.experts import sorted_by_expert
from macft.model.load import load
from macft.model.settings import ModelConfig
from macft.training.gradients.gradient import LocalGradient

TOKENS = mx.arange(3, 40)[None]
LENGTHS = (40, 9, 33, 17, 5)


def model_of(family: str) -> Any:
    mx.random.seed(0)
    return new_model(configuration(family))


def rows() -> list[Row]:
    """Alone, the short ones have so few tokens that mlx-lm doesn't sort them by expert."""
    generator = np.random.default_rng(3)
    return [Row(generator.integers(3, 500, n).astype(np.int32), 2) for n in LENGTHS]


def gradient_of(
    family: str, kernels: str, groups: Sequence[Sequence[int]], dropout: float = 0.0, **fields: Any
) -> LocalGradient:
    """That of :func:`rows`, in micro-batches of those in ``groups``."""
    model = model_of(family)
    adaptation = adapt(model, AdapterConfig(rank=4, dropout=dropout), seed=1)
    randomize_adapter(model)
    batches = [collate([rows()[i] for i in group], np.array(group)) for group in groups]
    with gradient_computer(model, adaptation, kernels, **fields) as compute:
        return compute(7, batches)


ALONE, TOGETHER = [[0], [1], [2], [3], [4]], [[0, 1, 2, 3, 4]]


def assert_same(found: LocalGradient, expected: LocalGradient) -> None:
    assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-6)
    assert_same_gradient(found.gradient, expected.gradient, rtol=1e-4)


def plain_gradient(family: str) -> tuple[float, dict[str, mx.array]]:
    """Summed loss and gradient by mlx-lm's model and LoRA alone, row by row."""
    model = model_of(family)
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": 4, "scale": 20.0, "dropout": 0.0})
    randomize_adapter(model)

    def loss(tokens: mx.array) -> mx.array:
        losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        return losses[:, 1:].sum()  # the prompt has two tokens

    found = [nn.value_and_grad(model, loss)(mx.array(row.tokens)[None]) for row in rows()]
    gradients = [dict(tree_flatten(gradient)) for _, gradient in found]
    return sum(float(value.item()) for value, _ in found), {
        name: sum((gradient[name] for gradient in gradients[1:]), start=gradients[0][name]) for name in gradients[0]
    }


# All blocks alike; the first one dense; tokens of all rows in one dimension; experts of two layers, in plain blocks.
@pytest.mark.parametrize(
    "family", ["qwen3_moe", "phixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in ("deepseek", "olmoe"))]
)
def test_loss_and_gradient_are_those_of_mlx_lm(family: str, kernels: str) -> None:
    loss, gradient = plain_gradient(family)
    assert any("switch_mlp" in name for name in gradient)
    for groups in (TOGETHER, ALONE):
        found = gradient_of(family, kernels, groups)
        assert found.loss_sum == pytest.approx(loss, rel=1e-6)
        assert_same_gradient(found.gradient, gradient, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", pytest.param("phixtral", marks=pytest.mark.slow)])
def test_a_row_meets_the_same_dropout_alone_beside_others_and_packed(family: str, kernels: str) -> None:
    expected = gradient_of(family, kernels, ALONE, dropout=0.3)
    without = gradient_of(family, kernels, ALONE)
    assert abs(expected.loss_sum / without.loss_sum - 1) > 1e-3
    assert_same(gradient_of(family, kernels, TOGETHER, dropout=0.3), expected)
    assert_same(gradient_of(family, kernels, [[3, 1], [4, 0, 2]], dropout=0.3), expected)
    if packs(model_of(family), kernels):
        assert_same(gradient_of(family, kernels, TOGETHER, dropout=0.3, packing=True), expected)


@pytest.mark.parametrize(
    ("kernels", "fields"),
    [
        ("mlx", {"recompute": "blocks"}),
        pytest.param("mlx", {"compiled": True}, marks=pytest.mark.slow),
        pytest.param("mlx", {"compiled": True, "recompute": "blocks", "packing": True}, marks=pytest.mark.slow),
        ("cpu", {"recompute": "blocks"}),
        ("cpu", {"lanes": 2}),
        pytest.param("cpu", {"lanes": 2, "recompute": "blocks", "packing": True}, marks=pytest.mark.slow),
    ],
    indirect=["kernels"],
)
def test_how_it_is_computed_changes_nothing(kernels: str, fields: dict[str, Any]) -> None:
    expected = gradient_of("qwen3_moe", kernels, ALONE, dropout=0.3)
    assert_same(gradient_of("qwen3_moe", kernels, TOGETHER, dropout=0.3, **fields), expected)


def test_a_token_s_gradient_is_summed_over_its_experts_in_one_order() -> None:
    """Not by additions to the same memory, which a GPU makes in another order each time."""
    mx.random.seed(2)
    x, indices = mx.random.normal((3, 40, 1, 1, 8)), mx.random.randint(0, 5, (3, 40, 2))
    cotangent = mx.random.normal((240, 1, 8))
    found, expected = (
        mx.vjp(lambda x, sort=sort: sort(x, indices)[0], [x], [cotangent])
        for sort in (sorted_by_expert(_gather_sort), _gather_sort)
    )
    assert [launches(*gradient)["Scatter"] for _, gradient in (found, expected)] == [0, 1]
    for one, other in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-6, atol=1e-6)


def test_masks_of_experts_differ_by_token_and_by_expert() -> None:
    model = model_of("qwen3_moe")
    adaptation = adapt(model, AdapterConfig(rank=4, dropout=0.5), seed=1)
    model.train()
    layer = model.layers[0].mlp.switch_mlp.up_proj
    width = layer.linear.input_dims
    seen: list[np.ndarray] = []
    dropout = layer.dropout
    layer.lora_a = mx.broadcast_to(mx.eye(width)[None], (layer.num_experts, width, width))
    layer.lora_b = mx.broadcast_to(mx.eye(layer.linear.output_dims, width)[None], (layer.num_experts, 32, width))
    layer.linear.weight = mx.zeros_like(layer.linear.weight)
    with adaptation.dropout_keys.using(mx.array([5, 9], dtype=mx.uint32)):
        indices = mx.array([[[0, 1], [1, 2]], [[0, 1], [3, 1]]])
        output = layer(mx.ones((2, 2, 1, 1, width)), indices)
    assert dropout is layer.dropout
    dropped = np.array(output[..., 0, :] == 0)
    assert 0.3 < dropped.mean() < 0.7
    masks = dropped.reshape(8, -1)
    for i in range(8):
        seen += [masks[i]]
        assert all(0.2 < np.mean(masks[i] == other) < 0.8 for other in seen[:-1])


@pytest.fixture(scope="module")
def mixture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first block is dense."""
    return build("deepseek", tmp_path_factory.mktemp("mixture"))


def fresh(folder: Path) -> Any:
    return load(ModelConfig(path=str(folder)), folder).model


CONFIGS = [
    AdapterConfig(rank=4),
    AdapterConfig(rank=4, num_layers=1),
    AdapterConfig(rank=4, layers=[0]),
    AdapterConfig(rank=4, layers=[0, 1], targets=["switch_mlp.up_proj", "mlp.gate_proj"]),
    AdapterConfig(rank=4, targets=["gate_proj", "up_proj", "down_proj"]),
    AdapterConfig(rank=4, type="dora", targets=["q_proj", "shared_experts.up_proj"]),
    AdapterConfig(type="full", targets=["switch_mlp.down_proj"]),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_adapters_load_in_mlx_lm_and_come_back(config: AdapterConfig, mixture_folder: Path, tmp_path: Path) -> None:
    model = fresh(mixture_folder)
    adaptation = adapt(model, config, seed=0)
    randomize_adapter(model, scale=0.03)
    save_adapter(tmp_path, model, adaptation.mlx_lm_config, model_name="tiny")
    expected = model(TOKENS)
    assert mx.allclose(load_adapters(fresh(mixture_folder), str(tmp_path))(TOKENS), expected, rtol=1e-5, atol=1e-5)
    again, attached = fresh(mixture_folder), fresh(mixture_folder)
    adapt(again, config, seed=9)
    load_adapter_weights(tmp_path, again)
    assert mx.array_equal(again(TOKENS), expected)
    attach(attached, tmp_path)
    assert mx.allclose(attached(TOKENS), expected, rtol=1e-5, atol=1e-5)
    assert not mx.allclose(fresh(mixture_folder)(TOKENS), expected, rtol=1e-2, atol=1e-2)


def test_an_adapter_of_mlx_lm_is_taken_up(mixture_folder: Path, tmp_path: Path) -> None:
    theirs, ours = fresh(mixture_folder), fresh(mixture_folder)
    settings = {"rank": 8, "scale": 20.0, "dropout": 0.0}
    linear_to_lora_layers(theirs, -1, settings)
    randomize_adapter(theirs)
    save_adapter(tmp_path, theirs, {"num_layers": -1, "lora_parameters": settings}, model_name="tiny")
    adapt(ours, AdapterConfig(), seed=0)
    load_adapter_weights(tmp_path, ours)
    assert mx.array_equal(ours(TOKENS), theirs(TOKENS))
    attached = fresh(mixture_folder)
    attach(attached, tmp_path)
    assert mx.array_equal(attached(TOKENS), theirs(TOKENS))


def test_an_adapter_that_does_not_fit_says_where(mixture_folder: Path, tmp_path: Path) -> None:
    model, other = fresh(mixture_folder), fresh(mixture_folder)
    adaptation = adapt(model, AdapterConfig(targets=["q_proj"]), seed=0)
    save_adapter(tmp_path, model, adaptation.mlx_lm_config, model_name="tiny")
    adapt(other, AdapterConfig(targets=["switch_mlp.up_proj", "q_proj"]), seed=0)
    with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.mlp\.switch_mlp\.up_proj\.lora_a"):
        load_adapter_weights(tmp_path, other)
    other = fresh(mixture_folder)
    adapt(other, AdapterConfig(targets=["k_proj"]), seed=0)
    with pytest.raises(ModelError, match=r"holds model\.layers\.0\.self_attn\.q_proj\.lora_a, which isn't trained"):
        load_adapter_weights(tmp_path, other)
    other = fresh(mixture_folder)
    adapt(other, AdapterConfig(targets=["q_proj"], rank=4), seed=0)
    with pytest.raises(ModelError, match=r"q_proj\.lora_a is \(64, 8\), not \(64, 4\)"):
        load_adapter_weights(tmp_path, other)


@pytest.mark.parametrize("bits", [None, 8])
def test_a_fused_mixture_answers_like_the_tuned_one(bits: int | None, mixture_folder: Path) -> None:
    loaded = load(ModelConfig(path=str(mixture_folder)), mixture_folder)
    if bits:
        loaded.model, loaded.config = quantize_model(loaded.model, loaded.config, 32, bits)
        loaded.is_quantized = True
    base = loaded.model(TOKENS)
    adaptation = adapt(loaded.model, AdapterConfig(rank=4), seed=0)
    randomize_adapter(loaded.model, scale=0.05)
    loaded.model.eval()
    tuned = loaded.model(TOKENS)
    kinds = [type(module) for module in loaded.model.modules()]
    assert adaptation.trainable_parameters > 0
    layers = kinds.count(LoRASwitchLinear) + kinds.count(LoRALinear)
    assert kinds.count(LoRASwitchLinear) == 3
    assert fuse(loaded, dequantize=False) == layers
    assert loaded.is_quantized == bool(bits)
    change = float(mx.abs(tuned - base).max())
    assert float(mx.abs(loaded.model(TOKENS) - tuned).max()) < (0.15 if bits else 1e-4) * change


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            AdapterConfig(type="dora"),
            r"^adapter\.targets: DoRA can't be added to mlp\.switch_mlp\.down_proj and 2 more .*"
            r"use 'adapter\.targets=\[k_proj,mlp\.down_proj,mlp\.gate_proj,mlp\.up_proj,o_proj,q_proj,"
            r"shared_experts\.down_proj,shared_experts\.gate_proj,shared_experts\.up_proj,v_proj\]'$",
        ),
        (AdapterConfig(type="dora", targets=["up_proj"]), r"targets=\[mlp\.up_proj,shared_experts\.up_proj\]'$"),
        (AdapterConfig(layers=[0], targets=["switch_mlp.up_proj"]), r"no projection 'switch_mlp\.up_proj'"),
    ],
)
def test_what_experts_cannot_have_is_refused(config: AdapterConfig, words: str, mixture_folder: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        adapt(fresh(mixture_folder), config, seed=0)


def test_quantised_experts_are_not_trained_whole(mixture_folder: Path) -> None:
    loaded = load(ModelConfig(path=str(mixture_folder)), mixture_folder)
    model, _ = quantize_model(loaded.model, loaded.config, 32, 4)
    with pytest.raises(ConfigError, match=r"model\.quantization=none"):
        adapt(model, AdapterConfig(type="full", targets=["switch_mlp.up_proj"]), seed=0)


@pytest.mark.slow
def test_two_nodes_train_experts_as_one_does(tmp_path: Path) -> None:
    """With dropout and checkpointed blocks; then mlx-lm reads the adapter."""
    model = build("qwen3_moe", tmp_path / "model")
    generator = np.random.default_rng(0)
    texts = [" ".join(str(n) for n in generator.integers(0, 99, size)) for size in (3, 20, 7, 40, 11, 5, 30, 9)]
    for name in ("train", "valid"):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", [{"text": text} for text in texts])
    data = tmp_path / "data"
    common = [
        *("+recipe=smoke", f"model={model}", f"dataset={data}", "dataset.metric=null", "training.metric_rows=0"),
        *("adapter.dropout=0.2", "adapter.num_layers=-1", "training.steps=4", "training.batch_size=4", "thermal=off"),
        *("training.recompute=blocks", "training.eval_every=0"),
    ]
    one = adapter(train_here(*common, folder=tmp_path / "one"))
    two = adapter(train_to_end(*common, "topology=local", "topology.nodes=2", folder=tmp_path / "two"))
    assert any("switch_mlp" in name for name in one)
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-2, atol=2e-4)
    tuned = load_adapters(fresh(model), str(tmp_path / "one" / "adapters"))
    assert not mx.allclose(tuned(TOKENS), fresh(model)(TOKENS), rtol=1e-3, atol=1e-3)
    assert "DoRA can't be added to mlp.switch_mlp" in str(
        refused(*common, "adapter.type=dora", folder=tmp_path / "dora")
    )
