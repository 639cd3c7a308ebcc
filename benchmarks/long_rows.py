"""Rows of thousands of tokens: measured against predicted peak memory, macft's MLX operations beside mlx_lm.

    python benchmarks/long_rows.py [--tokens 4096 8192] [--forms bfloat16 4 32] [--sides mlx_lm cheap blocks]
        [--hidden 512]

A model of the 8B's proportions in an eighth of its width (hidden 512, 4 heads of 128, feed-forward 1,792) or another
one, of two adapted blocks, one row, one step that is not compiled, each in a process of its own. Peak MLX memory of the
step, the weights included, in GB. This is what `macft plan --longest-row` rests on. MLX multiplies 16-bit values slowly
on a CPU: a row of 8,192 tokens takes minutes there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from gpu_path import HEAD_DIM, SIZES, make_batch, make_model, side_of
from harness.step_sides import SIDES
from macft.model.adapters.settings import AdapterConfig
from macft.model.execution import Execution, WeightFormat
from macft.model.shape import shape_of
from macft.planner.memory import ComputeShape, predict
from macft.planner.mlx_lm_memory import predict_mlx_lm

BLOCKS = 2
FORMS = {"bfloat16": WeightFormat("bfloat16"), "4": WeightFormat("bfloat16", 4), "32": WeightFormat("float32")}


def set_width(hidden: int) -> None:
    """Makes gpu_path's small model so wide, in the 8B's proportions."""
    SIZES["small"] |= {"hidden_size": hidden, "intermediate_size": hidden * 7 // 2}
    HEAD_DIM["small"] = hidden // SIZES["small"]["num_attention_heads"]


def work(options: argparse.Namespace) -> int:
    """The peak of one step in this process, bytes."""
    from macft.device.mlx_device import prepare_device  # before MLX, so that a CPU has its OpenBLAS

    # isort: split
    import mlx.core as mx
    from mlx.utils import tree_map

    prepare_device()
    form = FORMS[options.worker[1]]
    options.shape = f"smallx{BLOCKS}{f'@{form.bits}' if form.bits else ''}/{BLOCKS}"
    options.compiled = options.packed = options.traces = False
    options.rows, options.tokens = 1, int(options.worker[2])
    model = make_model(options.shape, options.vocabulary)
    if form.dtype == "float32":
        model.update(tree_map(lambda value: value.astype(mx.float32), model.parameters()))
        mx.eval(model.parameters())
    with side_of(options.worker[0], model, options) as side:
        mx.reset_peak_memory()
        side.step(make_batch(options))
    return int(mx.get_peak_memory())


def predicted(side: str, form: WeightFormat, tokens: int, vocabulary: int) -> float:
    """The planner's prediction of the same."""
    config = {
        "model_type": "llama",
        "num_hidden_layers": BLOCKS,
        "head_dim": HEAD_DIM["small"],
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": form.dtype,
        **SIZES["small"],
        **({"quantization": {"bits": form.bits, "group_size": 64}} if form.bits else {}),
    }
    shape = shape_of(config, "small")
    adapter = AdapterConfig(num_layers=BLOCKS)
    execution = Execution(device="cpu", kernels="mlx", dtype=form.dtype, bits=form.bits, max_logits=2**21)
    if side == "mlx_lm":
        return predict_mlx_lm(shape, execution, adapter, tokens)
    work = ComputeShape(1, tokens, tokens, tokens)
    return predict(shape, execution.with_batch(None, side), adapter, "adam", work).step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--forms", choices=FORMS, nargs="+", default=["bfloat16", "4"])
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=["mlx_lm", "cheap", "blocks"])
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 128")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    set_width(options.hidden)
    if options.worker:
        print(json.dumps(work(options)))
        return
    print(
        "| weights | tokens | side | measured, GB | predicted, GB | error |\n| --- | ---: | --- | ---: | ---: | ---: |"
    )
    for tokens in options.tokens:
        for form in options.forms:
            for side in options.sides:
                words = ["--worker", side, form, str(tokens), "--vocabulary", str(options.vocabulary)]
                words += ["--hidden", str(options.hidden)]
                done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(done.stderr)
                found = float(json.loads(done.stdout.strip().splitlines()[-1]))
                guess = predicted(side, FORMS[form], tokens, options.vocabulary)
                cells = (
                    form,
                    f"{tokens:,}",
                    side,
                    f"{found / 1e9:.3f}",
                    f"{guess / 1e9:.3f}",
                    f"{guess / found - 1:+.1%}",
                )
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
