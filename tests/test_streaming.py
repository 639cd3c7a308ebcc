"""Blocks read from disk when they are needed: the same numbers as with all weights in memory, within less memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from harness.execution import execution_with
from harness.families import build
from helpers.computing import randomize_adapter, settled_memory
from macft.data.batch import micro_batches
from macft.data.formats import Row
from macft.errors import ModelError
from macft.model.adapters.adapt import adapt
from macft.model.adapters.settings import AdapterConfig
from macft.model.backends.choose import make_backend
from macft.model.blocks.block_weights import BlockWeights
from macft.model.load import LoadedModel, load
from macft.model.settings import ModelConfig
from macft.model.shape import read_shape
from macft.planner.memory_planner import MemoryPlanner
from macft.planner.streamed_memory import streamed_parts
from macft.planner.workload import unlike_rows
from macft.training.batch_layout import BatchLayout
from macft.training.gradients.gradient import StepGradient
from macft.training.gradients.step_gradient import make_step_gradient

BLOCKS = 5
EXACT = ModelConfig(precision="float32", quantization="none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of five blocks, its embedding tied to its head."""
    return build("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=BLOCKS, tie_word_embeddings=True)


def rows() -> list[Row]:
    generator = np.random.default_rng(0)
    lengths = (9, 33, 17, 5, 20, 21)
    return [Row(generator.integers(1, 97, length).astype(np.int32), prompt_length=3) for length in lengths]


@dataclass
class Trained:
    """A model under training. ``streamed`` supplies its weights, if they aren't all in memory."""

    loaded: LoadedModel
    compute: StepGradient

    @property
    def streamed(self) -> BlockWeights:
        assert self.loaded.streamed is not None
        return self.loaded.streamed

    def gradient(self, step: int, size: int | None = None, rests: list[int] | None = None) -> dict[str, Any]:
        """Loss, counts and gradient of a step of all rows, in micro-batches of ``size``."""
        batches = list(micro_batches(rows(), np.arange(len(rows())), size))
        local = self.compute(step, batches, lambda: rests.append(1) if rests is not None else None)
        mx.eval(local.gradient)
        found: dict[str, NDArray[np.float32]] = {name: np.array(value) for name, value in local.gradient.items()}
        return {"loss": local.loss_sum, "tokens": (local.target_tokens, local.tokens), **found}

    def losses(self) -> list[list[float]]:
        """Validation's, of batches of four rows."""
        self.loaded.model.eval()
        layout = BatchLayout.for_validation(self.compute.execution)
        batches = micro_batches(rows(), np.arange(len(rows())), 4)
        return list(self.compute.loss.of_batches([list(layout.parts(batch)) for batch in batches]))


@contextmanager
def under_training(
    folder: Path,
    kernels: str,
    adapter: AdapterConfig,
    *,
    resident: tuple[int, ...] | None,
    model: ModelConfig = EXACT,
    **fields: Any,
) -> Iterator[Trained]:
    """The model in ``folder``; ``resident`` blocks stay in memory, None: all do, and blocks are recomputed."""
    execution = execution_with(kernels, dropout=adapter.dropout > 0, **fields)
    if execution.packing:
        execution = replace(execution, pack_tokens=40)
    execution = execution.with_batch(None, "blocks") if resident is None else execution.streamed(resident)
    loaded = load(model, folder, execution)
    adaptation = adapt(loaded.model, adapter, seed=0, streamed=loaded.streamed)
    magnitudes = {name: value for name, value in tree_flatten(loaded.model.trainable_parameters()) if name[-2:] == ".m"}
    randomize_adapter(loaded.model)
    loaded.model.load_weights(list(magnitudes.items()), strict=False)
    mx.eval(loaded.model.trainable_parameters())
    backend = make_backend(execution)
    with ExitStack() as installed:
        installed.enter_context(backend.installed(loaded.model))
        keys, streamed = adaptation.dropout_keys, loaded.streamed
        compute = make_step_gradient(loaded.model, backend, execution, keys, streamed, seed=1, bucket_bytes=4_000_000)
        yield Trained(loaded, compute)


def assert_same_bits(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "adapter",
    [
        AdapterConfig(),
        AdapterConfig(num_layers=3, dropout=0.3),
        AdapterConfig(type="dora"),
        AdapterConfig(layers=[1, 3]),
    ],
    ids=["lora", "last three, dropout", "dora", "two blocks"],
)
def test_gradients_have_the_bits_of_recomputed_blocks_in_memory(
    folder: Path, kernels: str, packing: bool, adapter: AdapterConfig
) -> None:
    """With accumulation, and side by side where the backend has lanes; validation too."""
    lanes = 2 if kernels == "cpu" else 1
    with under_training(folder, kernels, adapter, resident=None, packing=packing, lanes=lanes) as whole:
        expected = [whole.gradient(step, size) for step, size in enumerate((None, 2))]
        losses = whole.losses()
    with under_training(folder, kernels, adapter, resident=(1,), packing=packing, lanes=lanes) as streamed:
        for step, size in enumerate((None, 2)):
            assert_same_bits(streamed.gradient(step, size), expected[step])
        assert streamed.losses() == losses


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_moe", "jamba"])
def test_other_architectures(family: str, tmp_path: Path) -> None:
    """Windows, experts, state spaces; the head is the model's own."""
    folder = build(family, tmp_path / family)
    with under_training(folder, "mlx", AdapterConfig(), resident=None) as whole:
        expected, losses = whole.gradient(0, 4), whole.losses()
    with under_training(folder, "mlx", AdapterConfig(), resident=()) as streamed:
        found = streamed.gradient(0, 4)
        assert found.keys() == expected.keys()
        for name, value in expected.items():  # layers that loop over time are recomputed in other pieces
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=2e-6 * np.abs(value).max(), err_msg=name)
        np.testing.assert_allclose(streamed.losses()[0], losses[0], rtol=1e-6)


def test_quantised_blocks_are_read_as_they_are(folder: Path, tmp_path: Path) -> None:
    from mlx_lm.utils import load_model, quantize_model, save_model

    model, settings = load_model(folder)
    model, settings = quantize_model(model, settings, 32, 4)
    save_model(tmp_path, model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for quantization in ("keep", "none"):
        config = ModelConfig(quantization=quantization, precision="float32")
        bits = {"bits": 4, "group_size": 32} if quantization == "keep" else {}
        with under_training(tmp_path, "mlx", AdapterConfig(), resident=None, model=config, **bits) as whole:
            expected = whole.gradient(0)
        with under_training(tmp_path, "mlx", AdapterConfig(), resident=(), model=config, **bits) as streamed:
            assert_same_bits(streamed.gradient(0), expected)


def test_rests_are_as_many_as_micro_batches(folder: Path) -> None:
    with under_training(folder, "mlx", AdapterConfig(), resident=()) as streamed:
        for size in (None, 3, 2, 1):
            rests: list[int] = []
            streamed.gradient(0, size, rests)
            assert len(rests) == len(list(micro_batches(rows(), np.arange(len(rows())), size)))
        empty = streamed.compute(0, [])
        assert empty.target_tokens == 0
        assert not any(np.asarray(value).any() for value in empty.gradient.values())


def test_a_step_reads_each_block_twice_but_the_last_and_resident_ones_never(folder: Path) -> None:
    """Blocks below the first trained one are read once."""
    with under_training(folder, "mlx", AdapterConfig(num_layers=3), resident=(3,)) as trained:
        trained.gradient(0)
        trained.streamed.take_figures()
        block = sum(int(value.nbytes) for _, value in tree_flatten(trained.loaded.model.layers[0].parameters()))
        local = trained.compute(1, list(micro_batches(rows(), np.arange(len(rows())), None)))
        assert local.waited_for_weights is not None
        assert local.weights_read == 5 * block  # forward 0, 1, 2 and 4, which stays for the way back, then 2


def test_memory_is_that_of_three_blocks(tmp_path: Path, kernels: str) -> None:
    """Of 24 that are large beside everything else."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24}
    wide = build("llama", tmp_path / "wide", tie_word_embeddings=True, **sizes)
    before = settled_memory()
    with under_training(wide, kernels, AdapterConfig(targets=["v_proj"]), resident=()) as trained:
        model = trained.loaded.model
        block = max(sum(int(v.nbytes) for _, v in tree_flatten(layer.parameters())) for layer in model.layers)
        outside = settled_memory()
        assert outside - before < 2 * block
        trained.gradient(0)
        activations = 24 * 6 * 33 * 256 * 4 + 6 * 33 * 1024 * 4 * 12
        assert mx.get_peak_memory() < outside + 3 * block + activations
        assert trained.streamed.resident == frozenset()


def test_the_peak_of_a_streamed_mixture_is_predicted(tmp_path: Path) -> None:
    """Of its blocks no formula tells what they have inside; it is far more than the hidden states between them."""
    sizes: dict[str, Any] = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 8, "num_hidden_layers": 4}
    folder = build("qwen3_moe", tmp_path / "mixture", **sizes)
    adapter, rows = AdapterConfig(rank=4), unlike_rows(4, 161, 64)
    execution = execution_with("mlx").streamed(())
    parts = streamed_parts(MemoryPlanner(read_shape(folder), execution, adapter, "adamw", [rows], 0), execution)
    before = mx.get_active_memory()
    with under_training(folder, "mlx", adapter, resident=()) as trained:
        batches = list(micro_batches(rows.rows, rows.ids, None))
        mx.reset_peak_memory()
        mx.eval(trained.compute(0, batches).gradient)
        measured = mx.get_peak_memory() - before
    assert parts.unknown is None
    predicted = parts.weights + parts.adapter + parts.gradients + parts.activations + parts.logits
    assert predicted == pytest.approx(measured, rel=0.2)


def test_a_call_of_the_whole_model_is_supplied(folder: Path, kernels: str) -> None:
    """Generation with a cache, token by token."""
    from mlx_lm.models.cache import make_prompt_cache

    answers = []
    for resident in (None, (0, 2)):
        with under_training(folder, kernels, AdapterConfig(), resident=resident) as trained:
            model = trained.loaded.model
            model.eval()
            cache = make_prompt_cache(model)
            parts = [model(mx.array([[5, 6, 7]]), cache=cache), model(mx.array([[8]]), cache=cache)]
            answers.append(np.concatenate([np.array(part) for part in parts], axis=1))
    np.testing.assert_allclose(answers[1], answers[0], rtol=1e-6)


def read_on(trained: Trained) -> None:
    """Steps until all that was read ahead is used."""
    for step in range(3):
        trained.gradient(step)


def test_weights_that_vanish_are_one_clear_error(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    with under_training(copy, "mlx", AdapterConfig(), resident=()) as trained:
        trained.gradient(0)
        (copy / "model.safetensors").write_bytes(b"")
        with pytest.raises(ModelError, match=r"copy.*block"):
            read_on(trained)
