"""Peak MLX memory of one step of small models, macft's beside mlx_lm's."""

from __future__ import annotations

import gc
import statistics
from dataclasses import dataclass
from typing import Any

from harness.step_sides import SIDES, step_side
from macft.data.batch import Batch, collate
from macft.data.formats import Row
from macft.model.adapters.settings import AdapterConfig
from macft.model.backends.mlx import plain_attention
from macft.training_bench.random_weights import random_model

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "num_attention_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "narrow": {"hidden_size": 64, "intermediate_size": 192, "num_key_value_heads": 2, "num_hidden_layers": 3},
    "deep": {"hidden_size": 64, "intermediate_size": 192, "num_key_value_heads": 2, "num_hidden_layers": 12},
    "wide": {"hidden_size": 192, "intermediate_size": 640, "num_key_value_heads": 1, "num_hidden_layers": 2},
    "one block": {"hidden_size": 128, "intermediate_size": 448, "num_key_value_heads": 4, "num_hidden_layers": 1},
}
"""Sizes of llamas; heads have hidden_size / 4."""
VOCABULARIES = {"small": 256, "large": 4096}
FORMS: dict[str, tuple[str, int | None]] = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "4 bits": ("bfloat16", 4),
}
ADAPTERS = {
    "LoRA": AdapterConfig(),
    "LoRA on one block": AdapterConfig(num_layers=1),
    "LoRA of rank 64": AdapterConfig(rank=64),
    "DoRA": AdapterConfig(type="dora"),
}
TARGETS = {"all": 1.0, "half": 0.5, "few": 0.0}
"""What part of a row is target; at least two tokens are."""


@dataclass(frozen=True)
class StepCase:
    """A step: a model of MODELS and its form, an adapter, rows of one length or, ``mixed``, of up to that length."""

    model: str = "narrow"
    vocabulary: str = "small"
    form: str = "bfloat16"
    adapter: str = "LoRA"
    rows: int = 2
    tokens: int = 200
    targets: str = "all"
    compiled: bool = False
    mixed: bool = False
    packed: bool = False

    def batch(self) -> Batch:
        """Its rows."""
        generator = np.random.default_rng(0)
        lengths = [self.tokens] * self.rows
        if self.mixed:
            lengths[1:] = generator.integers(4, self.tokens, self.rows - 1, endpoint=True).tolist()
        prompts = [min(int(n * (1 - TARGETS[self.targets])), n - 2) for n in lengths]
        rows = [
            Row(generator.integers(1, 250, n).astype(np.int32), prompt)
            for n, prompt in zip(lengths, prompts, strict=True)
        ]
        return collate(rows, np.arange(self.rows))


def step_peaks(case: StepCase, sides: tuple[str, ...] = SIDES, *, steps: int = 2) -> dict[str, float]:
    """Bytes that a step of each side takes at most beside the model's weights: the median of ``steps`` steps.

    MLX's CPU backend allocates ahead of what it computes, so that the peak of a step varies by a few percent.
    """
    return {side: statistics.median(_peaks(case, side, steps)) for side in sides}


def _peaks(case: StepCase, side: str, steps: int) -> list[float]:
    plain_attention._kept_causal.cache_clear()  # so that the masks of an earlier case are not there for free
    mx.synchronize()
    gc.collect()
    before = mx.get_active_memory()
    dtype, bits = FORMS[case.form]
    config = {**_LLAMA, **MODELS[case.model], "vocab_size": VOCABULARIES[case.vocabulary], "tie_word_embeddings": True}
    model = random_model(config, bits=bits, dtype=dtype)
    before += sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    batch, found = case.batch(), []
    with step_side(side, model, ADAPTERS[case.adapter], compiled=case.compiled, packed=case.packed) as step:
        for _ in range(1 + steps):
            gc.collect()
            mx.reset_peak_memory()
            step.step(batch)
            found.append(float(mx.get_peak_memory() - before))
    return found[1:]
