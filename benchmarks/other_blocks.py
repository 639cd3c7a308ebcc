"""Blocks that are not Llama's: predicted against measured memory of a gradient, beside weights, adapter and optimizer.

    python benchmarks/other_blocks.py [--family NAME ...]

Random models of 4 blocks of hidden size 256 and a vocabulary of 4,096, float32, 4 rows of 192 tokens of which half are
targets, LoRA of rank 4 on all blocks, `training.kernels=mlx`, rows padded, nothing recomputed, not compiled. The
prediction is from the configuration alone (`planner/trace.py`). The exit status is 1 if one is more than 15% off.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from dataclasses import replace
from typing import Any

from harness.execution import execution_with
from harness.families import configuration, new_model
from macft.data.batch import collate
from macft.data.formats import Row
from macft.model.adapters.adapt import adapt
from macft.model.adapters.settings import AdapterConfig
from macft.model.backends.choose import make_backend
from macft.model.shape import shape_of
from macft.planner.memory import ComputeShape, predict
from macft.training.gradients.gradient import GradientComputer

# isort: split
import mlx.core as mx
import numpy as np

GOAL = 0.15
KINDS = {
    "qwen3_moe": "mixture",
    "mixtral": "mixture",
    "glm4_moe": "mixture, first block dense",
    "gpt_oss": "mixture with sinks and windows",
    "deepseek_v3": "latent attention",
    "gemma2": "four norms, capped scores and logits",
    "gemma3_text": "windows",
    "gemma3": "windows, behind a wrapper",
    "phi3": "fused projections",
    "lfm2": "convolutions",
}
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 4096,
    "block_dim": 256,
    "block_ff_dim": 704,
    "conv_dim": 256,
}
ROWS, LENGTH, TARGETS = 4, 192, 96


def config_of(family: str) -> dict[str, Any]:
    """The family's small config.json, with the sizes above."""

    def sized(config: dict[str, Any]) -> dict[str, Any]:
        more = {key: value for key, value in SIZES.items() if key in config}
        return {**{k: sized(v) if k == "text_config" else v for k, v in config.items()}, **more}

    return sized(configuration(family))


def measured(config: dict[str, Any], adapter: AdapterConfig) -> float:
    """Bytes at the peak of a gradient: the median of three."""
    model = new_model(config)
    adaptation = adapt(model, adapter, seed=0)
    tokens = np.random.default_rng(0).integers(1, 4000, (ROWS, LENGTH + 1)).astype(np.int32)
    batch = collate([Row(row, prompt_length=LENGTH + 1 - TARGETS) for row in tokens], np.arange(ROWS))
    execution = replace(execution_with("mlx"), max_logits=2**21)
    backend, peaks = make_backend(execution), []
    with backend.installed(model):
        compute = GradientComputer(model, backend, execution, adaptation.dropout_keys, seed=0)
        for _ in range(4):
            mx.synchronize()
            gc.collect()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            mx.eval(compute(0, [batch]).gradient)
            mx.synchronize()
            peaks.append(mx.get_peak_memory() - before)
    return statistics.median(peaks[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=KINDS, default=list(KINDS), metavar="NAME")
    print("| kind | architecture | measured, MB | predicted, MB | error |\n| --- | --- | ---: | ---: | ---: |")
    worst, adapter = 0.0, AdapterConfig(rank=4)
    for family in parser.parse_args().family:
        config = config_of(family)
        execution = replace(execution_with("mlx"), max_logits=2**21)
        work = ComputeShape(ROWS, LENGTH, ROWS * LENGTH, ROWS * TARGETS)
        parts = predict(shape_of(config, family), execution, adapter, "adamw", work)
        found = measured(config, adapter)
        guess = parts.activations + parts.logits
        worst = max(worst, abs(guess / found - 1))
        cells = [KINDS[family], family, f"{found / 1e6:.1f}", f"{guess / 1e6:.1f}", f"{guess / found - 1:+.1%}"]
        print(f"| {' | '.join(cells)} |", flush=True)
        mx.clear_cache()
    return worst > GOAL


if __name__ == "__main__":
    sys.exit(main())
