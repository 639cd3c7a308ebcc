"""A backend changes one model, and takes everything back: mlx-lm and every other model stay as they are."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.trainer import default_loss

import macft
from harness.execution import execution_with
from helpers.computing import gradient_computer, randomize_adapter
from helpers.models import assert_same_gradient, make_model
from macft.data.batch import collate
from macft.data.formats import Row
from macft.model.adapters.adapt import Adaptation, adapt
from macft.model.adapters.settings import AdapterConfig
from macft.model.backends.choose import make_backend
from macft.model.module_classes import replaced_functions

CLASSES = (nn.Module, nn.Linear, nn.Embedding, nn.RMSNorm, nn.LayerNorm, nn.RoPE, LoRALinear, DoRALinear)


def tuned_model(kind: str = "lora", family: str = "llama") -> tuple[nn.Module, Adaptation]:
    model = make_model(family)
    adaptation = adapt(model, AdapterConfig(type=kind, rank=4), seed=1)
    if kind != "full":
        randomize_adapter(model)
    return model, adaptation


def long_rows() -> list[Row]:
    """Rows that the CPU's attention takes: of 64 tokens and more."""
    generator = np.random.default_rng(3)
    return [Row(generator.integers(1, 97, n).astype(np.int32), 4) for n in (100, 70, 90)]


def stock_loss_and_gradient(model: nn.Module) -> dict[str, np.ndarray]:
    """mlx-lm's own loss of ``model``, and the gradient."""
    batch = collate(long_rows(), np.arange(3))
    lengths = mx.array(np.stack([batch.prompt_lengths, batch.lengths - 1], axis=1))
    (loss, _), gradient = nn.value_and_grad(model, default_loss)(model, mx.array(batch.tokens), lengths)
    return {"loss": np.array(loss)} | {name: np.array(value) for name, value in tree_flatten(gradient)}


def process_state() -> dict[str, Any]:
    """What of MLX and mlx-lm other code could replace: calls of layers, functions of every architecture loaded."""
    names = [name for name in sys.modules if name.startswith("mlx_lm.models.")]
    functions = {
        f"{name}.{key}": value for name in names for key, value in vars(sys.modules[name]).items() if callable(value)
    }
    kinds = [value for value in functions.values() if isinstance(value, type) and issubclass(value, nn.Module)]
    return functions | {f"{kind}.__call__": kind.__call__ for kind in [*CLASSES, *kinds]}


def classes_of(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("recompute", ["none", "blocks"])
@pytest.mark.parametrize("packing", [False, True])
def test_stock_mlx_lm_is_the_same_before_during_and_after(
    packing: bool, recompute: str, kind: str, kernels: str
) -> None:
    """Its functions, layers, losses and gradients; during, those of a second model of the same architecture."""
    (model, adaptation), (other, _) = tuned_model(kind), tuned_model(kind)
    before, state, classes = stock_loss_and_gradient(model), process_state(), classes_of(model)
    with gradient_computer(model, adaptation, kernels, packing=packing, recompute=recompute) as compute:
        compute(0, [collate(long_rows(), np.arange(3))])
        assert classes_of(model) != classes or (kernels == "mlx" and not packing and recompute == "none")
        assert process_state() == state
        assert_same(stock_loss_and_gradient(other), before)
    assert process_state() == state
    assert classes_of(model) == classes
    assert_same(stock_loss_and_gradient(model), before)


def fail_inside(context: AbstractContextManager[None], is_changed: Callable[[], bool]) -> None:
    with context:
        assert is_changed()
        raise ZeroDivisionError


@pytest.mark.parametrize("family", ["llama", "gemma2", "smollm3"])
def test_an_error_inside_takes_everything_back(family: str, kernels: str) -> None:
    model, _ = tuned_model(family=family)
    state, classes = process_state(), classes_of(model)
    execution = execution_with(kernels, packing=family != "gemma2", recompute="blocks")
    with pytest.raises(ZeroDivisionError):
        fail_inside(make_backend(execution).installed(model), lambda: classes_of(model) != classes)
    assert process_state() == state
    assert classes_of(model) == classes


def test_two_models_in_two_backends(kernels: str) -> None:
    """Each is computed by its own, in whatever order they are left."""
    (one, first), (two, second) = tuned_model(), tuned_model()
    classes, batches = classes_of(one), [collate(long_rows(), np.arange(3))]
    with ExitStack() as outer:
        compute_one = outer.enter_context(gradient_computer(one, first, kernels, packing=True))
        with gradient_computer(two, second, "mlx", recompute="blocks") as compute_two:
            gradients = [compute(0, batches).gradient for compute in (compute_one, compute_two)]
        assert classes_of(two) == classes
        again = compute_one(0, batches).gradient
    assert_same_gradient(gradients[0], gradients[1], rtol=1e-4)
    for name, value in gradients[0].items():
        np.testing.assert_array_equal(np.array(value), np.array(again[name]))


def test_what_a_layer_is_stays_true(kernels: str) -> None:
    """Layers keep their kind, their parameters and the names of these, so that saving and merging work inside."""
    model, _ = tuned_model()
    names = [name for name, _ in tree_flatten(model.parameters())]
    with make_backend(execution_with(kernels, packing=True, recompute="blocks")).installed(model):
        assert [name for name, _ in tree_flatten(model.parameters())] == names
        assert isinstance(model.layers[0].self_attn.q_proj, LoRALinear)
        assert isinstance(model.layers[0].self_attn.q_proj.fuse(), nn.Linear)


def test_answers_are_those_of_the_stock_model(kernels: str) -> None:
    model, _ = tuned_model()
    model.eval()

    def answer() -> list[int]:
        steps = generate_step(mx.array(long_rows()[0].tokens), model, max_tokens=12)
        return [int(token) for token, _ in steps]

    expected = answer()
    with make_backend(execution_with(kernels, packing=True)).installed(model):
        assert answer() == expected
    assert answer() == expected


class Doubled(nn.Module):
    """Calls ``helper`` from a method that another calls, and from a function inside of it."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.inner(x)

    def inner(self, x: mx.array) -> mx.array:
        def nested(x: mx.array) -> mx.array:
            return helper(x)

        return helper(x) + nested(x)


class Derived(Doubled):
    """Inherits the method that calls ``helper``."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.inner(x) + 1


def helper(x: mx.array) -> mx.array:
    return 2 * x


@pytest.mark.parametrize(("kind", "stock", "expected"), [(Doubled, 12, 18), (Derived, 13, 19)])
def test_functions_are_replaced_wherever_a_module_calls_them(kind: type[nn.Module], stock: int, expected: int) -> None:
    def make(original: Any) -> Any:
        return lambda x: original(x) + x

    module, other, x = kind(), kind(), mx.array(3)
    with replaced_functions(module, {"helper": make}):
        assert module(x).item() == expected
        assert other(x).item() == stock
        assert helper(x).item() == 6
    assert module(x).item() == stock


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_only_the_choice_of_a_backend_knows_the_cpu_s() -> None:
    root = Path(macft.__file__).parent
    cpu = root / "model" / "backends" / "cpu"
    users = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if cpu not in path.parents and any(name.startswith("macft.model.backends.cpu") for name in imports(path))
    }
    assert users == {"model/backends/choose.py"}
