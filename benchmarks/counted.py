"""Peak memory of a step of the real 8B model, macft's MLX operations beside mlx_lm: counted by the plan, not measured.

    python benchmarks/counted.py

For each form of the weights and number of adapted blocks: GB of the whole step, of what it takes beside the weights,
and both as parts of mlx_lm's. As on Metal, where attention is not fused while a model trains. No weights are made.
`benchmarks/gpu_path.py` measures the same on a machine that holds the model, and small models of its proportions here.
"""

from __future__ import annotations

from macft.device.kind import METAL
from macft.model.adapters.settings import AdapterConfig
from macft.model.execution import WeightFormat, resolve
from macft.model.settings import ModelConfig
from macft.model.shape import shape_of
from macft.planner.memory import ComputeShape, predict
from macft.planner.mlx_lm_memory import predict_mlx_lm
from macft.training_bench.random_weights import config_of

MODEL = "Meta-Llama-3.1-8B"
ROWS = ((2, 1020), (1, 64), (4, 256), (1, 4096))
SIDES = ("mlx_lm", "none", "cheap", "blocks")


def peaks(bits: int | None, adapted: int, rows: int, length: int) -> tuple[float, dict[str, float]]:
    """Bytes of the weights, and of the whole step by side."""
    config = config_of(MODEL) | {"torch_dtype": "bfloat16"}
    shape = shape_of(config | ({"quantization": {"bits": bits, "group_size": 64}} if bits else {}), MODEL)
    weights = WeightFormat("bfloat16", bits)
    adapter = AdapterConfig(num_layers=adapted)
    execution = resolve(ModelConfig(), weights, METAL, packing="false")
    work = ComputeShape(rows, length, rows * length, rows * length)
    found = {"mlx_lm": predict_mlx_lm(shape, execution, adapter, length, rows=rows)}
    for recompute in SIDES[1:]:
        found[recompute] = predict(shape, execution.with_batch(None, recompute), adapter, "adam", work).step
    return shape.weight_bytes(weights), found


def main() -> None:
    print("| rows | weights | adapted | side | whole, GB | of mlx_lm's | beside the weights, GB | of mlx_lm's |")
    print("| --- | --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for rows, length in ROWS:
        for bits in (None, 4):
            for adapted in (16, 32):
                weights, found = peaks(bits, adapted, rows, length)
                for side in SIDES:
                    whole, base = found[side], found["mlx_lm"]
                    cells = [f"{rows} x {length:,}", f"{bits} bits" if bits else "bfloat16", adapted, side]
                    cells += [f"{whole / 1e9:.1f}", f"{whole / base:.2f}", f"{(whole - weights) / 1e9:.2f}"]
                    cells += [f"{(whole - weights) / (base - weights):.2f}"]
                    print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
