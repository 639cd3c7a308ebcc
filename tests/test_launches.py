"""A compiled step hands over no more kernels than mlx_lm's, counted; and joined gradients are the separate ones."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.activations import swiglu

from harness.launches import like_a_gpu
from helpers.computing import gradient_computer, randomize_adapter
from macft.data.batch import Batch, micro_batches
from macft.data.formats import Row
from macft.model.adapters.adapt import adapt
from macft.model.adapters.settings import AdapterConfig
from macft.model.backends.mlx.layers import rms_norm, short_swiglu
from macft.model.execution import Execution
from macft.model.joined_parameters import JoinedParameters
from macft.planner.kernels import COUNTED
from macft.training.gradients.buckets import buckets_of
from step_launches import count_by_block, count_macft, count_mlx_lm, small_model

CONFIG = {"model_type": "llama", "num_hidden_layers": 3, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "head_dim": 64}


def batch_of(*lengths: int) -> Batch:
    generator = np.random.default_rng(0)
    rows = [Row(generator.integers(1, 500, length).astype(np.int32), 2) for length in lengths]
    (batch,) = micro_batches(rows, np.arange(len(rows)), None)
    return batch


def kernels(device: str, recompute: str, bits: int | None, packing: bool, nodes: int = 1) -> tuple[int, int]:
    """macft's and mlx_lm's, of a step of rows of about 60 tokens in bfloat16."""
    rows = batch_of(58, 60, 65, 49)
    lengths = mx.array(np.stack([np.zeros_like(rows.lengths), rows.lengths], axis=1))
    with like_a_gpu(device):
        theirs = count_mlx_lm(small_model(CONFIG, bits), [(mx.zeros((4, 65), mx.int32), lengths)])
    execution = Execution(
        device=device,
        kernels="mlx",
        dtype="bfloat16",
        bits=bits,
        packing=packing,
        shared_prefixes=packing,
        compiled=True,
        recompute=recompute,
    )
    ours = count_macft(small_model(CONFIG, bits), [[rows]], execution, nodes)
    assert ours.traces == theirs.traces == 1
    return ours.kernels[0].total(), theirs.kernels[0].total()


@pytest.mark.parametrize(
    ("device", "recompute", "bits", "packing", "nodes", "most"),
    [
        ("metal", "none", None, False, 1, 0.85),
        ("metal", "none", 4, True, 1, 0.9),
        ("cuda", "none", None, False, 1, 0.9),
        ("metal", "cheap", None, False, 1, 1.0),
        ("metal", "none", None, False, 2, 0.85),
    ],
)
def test_a_step_has_no_more_kernels_than_mlx_lm_s(
    device: str, recompute: str, bits: int | None, packing: bool, nodes: int, most: float
) -> None:
    """Nor has that of a node among several, which sends its gradient between two graphs."""
    ours, theirs = kernels(device, recompute, bits, packing, nodes)
    assert ours <= most * theirs


def test_more_blocks_and_chunks_are_more_kernels() -> None:
    """So that what is counted is there."""
    few, _ = kernels("metal", "none", None, False)
    more, _ = kernels("metal", "blocks", None, False)
    assert more > 1.2 * few


@pytest.mark.parametrize("key", [("metal", "mask", "none"), ("cuda", "padded", "none"), ("metal", "rows", "cheap")])
def test_the_planner_s_counts_are_those_of_the_graphs(key: tuple[str, str, str]) -> None:
    assert count_by_block(*key) == COUNTED[key]


def test_a_joined_gradient_is_the_separate_one() -> None:
    """In bfloat16, whose low-rank matrices are cast together; tests/test_stepper.py has compiled steps."""
    model = small_model(CONFIG, None)
    adaptation = adapt(model, AdapterConfig(rank=4), seed=1)
    randomize_adapter(model)
    parameters = JoinedParameters.of(model)
    work = [batch_of(30, 40), batch_of(20, 35)]
    with gradient_computer(model, adaptation, "mlx", bucket_bytes=40_000) as compute:
        separate, in_buckets, joined = (compute(0, work, form=form) for form in ("parameters", "buckets", "joined"))
        nothing = compute(0, [], form="buckets")
    assert set(joined.gradient) == {"small-float32"}
    assert 2 < len(in_buckets.buckets) == len(in_buckets.gradient) < len(separate.gradient) / 2
    together = parameters.join(in_buckets.gradient)["small-float32"]
    np.testing.assert_array_equal(np.array(together), np.array(joined.gradient["small-float32"]))
    by_piece = {piece.name: piece for bucket in in_buckets.buckets for piece in bucket}
    for found in (in_buckets, joined):
        assert found.loss_sum == pytest.approx(separate.loss_sum, rel=1e-6)
    for name, value in in_buckets.gradient.items():
        assert nothing.gradient[name].shape == value.shape
        assert not np.array(nothing.gradient[name]).any()
        np.testing.assert_array_equal(np.array(by_piece[name].of(separate.gradient)), np.array(value))
    parts = parameters.split(joined.gradient)
    for name, value in separate.gradient.items():
        assert parts[name].dtype == value.dtype == mx.float32
        np.testing.assert_array_equal(np.array(parts[name]), np.array(value))


def test_buckets_are_the_same_whatever_types_a_rank_has() -> None:
    """A rank may hold in bfloat16 what another holds in float32; the update takes each type by itself."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(600, 600), nn.Linear(32, 64), nn.Linear(8, 8))
    layouts = []
    for dtype in (mx.float32, mx.bfloat16):
        model.layers[0].weight = model.layers[0].weight.astype(dtype)
        buckets = buckets_of(model, 1 << 20)
        layouts.append([[piece.names for piece in bucket] for bucket in buckets])
        gradient = {name: mx.random.normal(value.shape) for name, value in tree_flatten(model.parameters())}
        for_update: dict[str, mx.array] = {}
        for piece in (piece for bucket in buckets for piece in bucket):
            for_update |= piece.for_update(piece.of(gradient))
        expected = JoinedParameters(model).join(gradient)
        found = JoinedParameters(model).join(for_update)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(np.array(found[key]), np.array(value))
    assert layouts[0] == layouts[1]
    assert [len(names) for bucket in layouts[0] for names in bucket] == [1, 5, 2]


def test_parameters_that_are_set_are_joined_anew() -> None:
    model = nn.Linear(3, 2)
    parameters = JoinedParameters.of(model)
    first = parameters.get()["small-float32"]
    assert parameters.get()["small-float32"] is first
    views = parameters.put({"small-float32": mx.arange(8, dtype=mx.float32)})
    assert [view.shape for view in views] == [model.weight.shape, model.bias.shape] or len(views) == 2
    assert sorted(np.concatenate([np.array(v).reshape(-1) for _, v in tree_flatten(model.parameters())])) == [*range(8)]
    model.bias = mx.full((2,), 9.0)
    assert 9.0 in np.array(parameters.get()["small-float32"])
    assert JoinedParameters.of(model) is parameters


def test_norms_and_swiglu_have_mlx_s_gradients() -> None:
    mx.random.seed(1)
    x, gate, cotangent = (mx.random.normal((2, 5, 16)) * 3 for _ in range(3))
    weight = mx.random.normal((16,))
    pairs = [
        (lambda x: rms_norm(x, weight, 1e-5), lambda x: mx.fast.rms_norm(x, weight, 1e-5), [x]),
        (short_swiglu(swiglu), swiglu, [gate, x]),
    ]
    for ours, theirs, inputs in pairs:
        found, expected = (mx.vjp(function, inputs, [cotangent]) for function in (ours, theirs))
        for one, other in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
            np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-5, atol=1e-5)
