"""benchmarks/gpu.py, the script for a GPU, with its small models: each can be made, and a case gives figures."""

from __future__ import annotations

import pytest

import gpu
from macft.training_bench.random_weights import random_model


@pytest.mark.parametrize("case", gpu.CASES)
def test_a_case_has_a_small_model(case: str) -> None:
    model, _, bits = gpu.CASES[case]
    made = random_model(gpu.config_for(model, "small"), bits=bits)
    assert made.layers[0].self_attn.q_proj.weight.shape[0] == 64


@pytest.mark.parametrize("side", ["mlx_lm", "macft"])
def test_a_case_gives_figures(side: str) -> None:
    found = gpu.work({"case": "8B sql", "side": side, "steps": (2, 1), "width": "small"})
    assert found["peak_mlx_gb"] > 0
    assert found["target_tokens_per_second"] > 0
    assert ("recompute" in found) == (side == "macft")
