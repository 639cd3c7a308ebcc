"""Schedules, clipping and the update."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten

from helpers.computing import settled_memory
from macft.errors import ConfigError
from macft.model.joined_parameters import JoinedParameters
from macft.training.adam import parameter_after
from macft.training.clipping import clip_by_global_norm
from macft.training.optimizer import OptimizerStep, learning_rate, make_optimizer
from macft.training.optimizer_table import OPTIMIZERS
from macft.training.settings import OptimizerConfig


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    total=st.integers(1, 500),
    warmup=st.integers(0, 400),
    final=st.floats(0, 1e-4),
)
def test_learning_rate_climbs_to_its_peak_then_only_falls(schedule: str, total: int, warmup: int, final: float) -> None:
    warmup = min(warmup, total - 1)
    config = OptimizerConfig(learning_rate=1e-3, schedule=schedule, warmup_steps=warmup, final_learning_rate=final)
    rates = [learning_rate(config, step, total) for step in range(total)]
    assert rates[warmup] == pytest.approx(1e-3)
    assert all(0 < rate <= 1e-3 * (1 + 1e-9) for rate in rates[: warmup + 1])
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[-1] == (1e-3 if schedule == "constant" or warmup == total - 1 else final)


def test_learning_rates_of_a_short_run() -> None:
    def rates(schedule: str, steps: int, warmup: int = 0) -> list[float]:
        config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=warmup, final_learning_rate=0.2)
        return [round(learning_rate(config, step, steps), 12) for step in range(steps)]

    assert rates("linear", 5) == [1.0, 0.8, 0.6, 0.4, 0.2]
    assert rates("linear", 6, warmup=3) == [0.25, 0.5, 0.75, 1.0, 0.6, 0.2]
    assert rates("cosine", 3) == [1.0, 0.6, 0.2]
    assert rates("constant", 3, warmup=1) == [0.5, 1.0, 1.0]
    assert rates("linear", 1) == [1.0]


@given(
    norm=st.floats(1e-6, 1e6),
    limit=st.just(0.0) | st.floats(1e-3, 100),
    loss=st.floats(0, 1e6),
    tokens=st.integers(0, 2**20),
)
def test_the_mean_gradient_is_clipped_and_smaller_ones_are_left_alone(
    norm: float, limit: float, loss: float, tokens: int
) -> None:
    count = max(tokens, 1)
    scalars = clip_by_global_norm(loss * count, norm * count, float(tokens), limit, xp=np)
    assert scalars.is_finite
    assert math.isclose(scalars.loss, loss, rel_tol=1e-12)
    assert math.isclose(scalars.norm, norm, rel_tol=1e-12)
    clipped = scalars.scale * norm * count
    assert math.isclose(clipped, min(norm, limit) if limit else norm, rel_tol=1e-9)
    device = clip_by_global_norm(mx.array(loss * count), mx.array(norm * count), mx.array(float(tokens)), limit, xp=mx)
    for name in ("loss", "norm", "scale"):
        assert math.isclose(getattr(device, name).item(), getattr(scalars, name), rel_tol=1e-6, abs_tol=1e-30)


@pytest.mark.parametrize("xp", [np, mx])
@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)])
def test_what_is_not_finite_is_found(xp: Any, loss: float, norm: float) -> None:
    wrap = float if xp is np else mx.array
    assert not bool(clip_by_global_norm(wrap(loss), wrap(norm), wrap(3.0), 1.0, xp=xp).is_finite)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_quadratic(name: str) -> None:
    model = nn.Linear(6, 4, bias=False)
    model.weight = mx.ones((4, 6))
    optimizer = make_optimizer(OptimizerConfig(name=name))
    for _ in range(20):
        OptimizerStep(model, optimizer)({"weight": mx.array(model.weight)}, 0.02)
    assert float(mx.square(model.weight).sum()) < 0.97 * 24


def test_adamw_is_mlx_adamw() -> None:
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.update(ours.parameters())
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.1, arguments={"betas": [0.9, 0.95]}))
    reference = optim.AdamW(learning_rate=1e-2, betas=[0.9, 0.95], weight_decay=0.1, bias_correction=True)
    gradient = {"weight": mx.arange(6, dtype=mx.float32).reshape(2, 3), "bias": mx.array([1.0, -1.0])}
    for _ in range(3):
        OptimizerStep(ours, optimizer)(gradient, 1e-2)
        reference.update(theirs, gradient)
    assert mx.array_equal(ours.weight, theirs.weight)
    assert mx.array_equal(ours.bias, theirs.bias)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_small_parameters_together_are_updated_as_each_by_itself(name: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            mx.random.seed(3)
            self.layers = [nn.Linear(3, 2), nn.Linear(512, 513), nn.Linear(4, 5, bias=False)]
            self.layers[2].set_dtype(mx.bfloat16)

    ours, theirs = Two(), Two()
    optimizer = make_optimizer(OptimizerConfig(name=name))
    reference = make_optimizer(OptimizerConfig(name=name))
    reference.learning_rate = 1e-2
    for turn in range(3):
        gradient = {
            key: mx.random.normal(value.shape, key=mx.random.key(turn))
            for key, value in tree_flatten(ours.parameters())
        }
        OptimizerStep(ours, optimizer)(gradient, 1e-2)
        typed = [(key, gradient[key].astype(value.dtype)) for key, value in tree_flatten(theirs.parameters())]
        reference.update(theirs, tree_unflatten(typed))
    for (key, ours_value), (_, value) in zip(
        tree_flatten(ours.parameters()), tree_flatten(theirs.parameters()), strict=True
    ):
        assert ours_value.dtype == value.dtype
        assert mx.array_equal(ours_value, value), key


def test_an_argument_the_optimizer_lacks_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.arguments: adamw"):
        make_optimizer(OptimizerConfig(arguments={"momentumm": 0.9}))


def test_parameters_are_found_wherever_a_model_keeps_them() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = [mx.ones(2), mx.ones(3)]
            self.parts = {"bias": mx.zeros(4), "layer": nn.Linear(2, 2)}
            self.frozen = nn.Linear(2, 2)
            self.frozen.freeze()

    model = Odd()
    before = dict(tree_flatten(model.parameters()))
    trained = dict(tree_flatten(model.trainable_parameters()))
    assert {"scales.1", "parts.bias", "parts.layer.weight"} < trained.keys()
    OptimizerStep(model, make_optimizer(OptimizerConfig(name="sgd")))(
        {k: mx.ones(v.shape) for k, v in trained.items()}, 0.5
    )
    for name, value in tree_flatten(model.parameters()):
        np.testing.assert_array_equal(np.array(value), np.array(before[name] - (0.5 if name in trained else 0.0)))


@pytest.mark.parametrize("queued", [False, True])
def test_a_compiled_update_holds_little_beside_parameters_state_and_gradient(queued: bool) -> None:
    """Of many small parameters, in MLX's memory; a queued one squares the gradient for its norm."""
    model = nn.Sequential(*[nn.Linear(64, 256, bias=False) for _ in range(64)])
    update = OptimizerStep(model, make_optimizer(OptimizerConfig()), compiled=True)
    size = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    for _ in range(2):
        gradient = {name: mx.ones(value.shape) for name, value in tree_flatten(model.parameters())}
        if queued:
            gradient = JoinedParameters.of(model).join(gradient)
        mx.eval(gradient)
        before = settled_memory()
        if queued:
            mx.eval(update.queue(gradient, 1e-3, mx.array(1.0), 1, 1.0))
        else:
            update(gradient, 1e-3)
        mx.synchronize()
        beside = mx.get_peak_memory() - before
    assert beside < 1.1 * size


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("kind", [optim.Adam, optim.AdamW])
def test_adam_s_parameters_follow_from_its_new_state(kind: type[optim.Adam], bias_correction: bool) -> None:
    optimizer = kind(learning_rate=1e-2, bias_correction=bias_correction)
    parameter, gradient = {"p": mx.random.normal((50,))}, {"p": mx.random.normal((50,))}
    for _ in range(3):
        updated = optimizer.apply_gradients(gradient, parameter)
        m, v = optimizer.state["p"]["m"], optimizer.state["p"]["v"]
        assert mx.array_equal(parameter_after(optimizer, parameter["p"], m, v), updated["p"])
        parameter = updated
