"""macft against mlx_lm.lora, and Unsloth, on one node: the same model, rows, adapter, precision, BLAS, cores, in turn.

    python benchmarks/training.py [--case sql|mixed|long] [--runs 5] [--steps 24] [--compile WORD] [--packing WORD]
        [--recompute WORD] [--random MODEL [--bits 4]] [--unsloth PYTHON]

Each run is a process of its own, A B B A ...; it trains one pass over the same rows and reports the time from the end
of the warm-up to the end of the last step, the losses, and the process's peak memory. The device is idle at both ends
of that time, so that it holds the steps that are counted, all of them and no other. The table shows medians and the
median of the pairwise ratios; ``held_out_loss`` is that of the trained model on other rows, measured by the same code
for all.
Cases: ``sql``, the SQL dataset with masked prompts; ``mixed``, unmasked text of 16 to 384 tokens; and ``long``,
unmasked text of 1,000 tokens and more, two rows a step.

``--random`` takes random weights in the shape of another model, such as Llama-3.2-1B, quantised to ``--bits``, or in
bfloat16 (float32 on a CPU): for a GPU, where speed depends on the shape alone and not on what the weights are.

mlx_lm gets macft's OpenBLAS and the model already dequantised to float32, without which it would be many times slower
on a CPU; ``--stock`` leaves it MLX's own BLAS. ``--unsloth`` adds Unsloth's MLX trainer; PYTHON is that of an
environment with macft in it, and with ``pip install --no-deps unsloth-zoo mlx-vlm``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

# macft is imported in the functions that need it: with --stock, MLX comes first.
CASES = ("long", "mixed", "sql")
WARM_UP_STEPS = {"sql": 4, "mixed": 4, "long": 1}


def load_everything(options: argparse.Namespace) -> tuple[Any, list[dict[str, Any]], Any]:
    """Model, records and what is trained, the same for all."""
    from macft.device.mlx_device import prepare_device
    from macft.model.fetch.resolve import resolve
    from macft.model.load import load, load_tokenizer
    from macft.model.settings import ModelConfig
    from macft.model.shape import read_shape, shape_of
    from macft.training_bench.cases import Case
    from macft.training_bench.random_weights import random_model
    from macft.training_bench.rows import records_of
    from macft.training_bench.sides import Training

    config, training = ModelConfig(), Training(options.case, options.steps, options.warm_up)
    prepare_device()
    folder = Path(options.folder) if options.folder else resolve(config)
    if options.random:
        case = Case(options.random, options.random, options.case, options.bits)
        model = random_model(case.model_config, bits=options.bits, dtype=case.dtype)
        shape, held = shape_of(case.model_config, case.model), ModelConfig(precision="checkpoint", quantization="keep")
        tokenizer = load_tokenizer(config, folder)
    else:
        found = load(config, folder)
        model, tokenizer, shape, held = found.model, found.tokenizer, read_shape(folder), config
    loaded = types.SimpleNamespace(model=model, tokenizer=tokenizer, shape=shape, config=held)
    return loaded, records_of(options.case, loaded.tokenizer, training.batch_size * options.steps), training


def execution_of(model: Any, **training: Any) -> Any:
    """How this machine computes ``model``; ``training`` are arguments of resolve()."""
    from macft.device.kind import Device
    from macft.model.execution import resolve
    from macft.model.load import weight_format_of
    from macft.model.settings import ModelConfig
    from macft.model.trials.packable import may_pack

    config = ModelConfig(precision="checkpoint", quantization="keep")
    return resolve(config, weight_format_of(model), Device.default(), can_pack=may_pack(model), **training)


def held_out_loss(loaded: Any, case: str) -> float:
    """Mean loss of the target tokens of rows that no trainer has seen, in nats."""
    from macft.collective.solo import Solo
    from macft.data.tokenize import tokenize
    from macft.model.backends.choose import make_backend
    from macft.parallel.shares import DataShard
    from macft.training.loss import TokenLoss
    from macft.training.validation import validation_loss
    from macft.training_bench.rows import ROW_KINDS, records_of

    count = {"sql": 32, "mixed": 8, "long": 2}[case]
    records = records_of(case, loaded.tokenizer, count, split="valid")
    rows = [tokenize(record, loaded.tokenizer, mask_prompt=ROW_KINDS[case].masked) for record in records]
    model = loaded.model
    execution = execution_of(model, micro_batch_size=4)
    backend = make_backend(execution)
    with backend.installed(model):
        loss = TokenLoss(model, backend)
        return validation_loss(
            model, loss, execution, rows, Solo(), shard=DataShard(0, 1), progress=lambda *_: None
        ).loss


def train_macft(options: argparse.Namespace) -> tuple[dict[str, float], Any]:
    """macft's own loop, computed as a run would choose."""
    loaded, records, training = load_everything(options)

    from macft.training_bench import sides
    from macft.training_bench.cases import plan_training

    keys = {"packing": options.packing, "compile": options.compile, "recompute": options.recompute}
    rows = sides.tokenized(records, loaded.tokenizer, training)
    plan = plan_training(loaded.shape, loaded.config, training, rows, **keys)
    return sides.train_macft(loaded.model, rows, training, plan.execution), loaded


def train_mlx_lm(options: argparse.Namespace) -> tuple[dict[str, float], Any]:
    """mlx-lm's own tuner."""
    loaded, records, training = load_everything(options)  # imports macft, and so OpenBLAS, before MLX

    from macft.training_bench import sides

    data = sides.mlx_lm_data(records, loaded.tokenizer, training)
    return sides.train_mlx_lm(loaded.model, data, training), loaded


def train_unsloth(options: argparse.Namespace) -> tuple[dict[str, float], Any]:
    """Unsloth's MLX trainer, as its own examples call it, on the same padded batches; blocks are not recomputed.

    Its package asks for torch and, but for an Apple machine, a GPU; only its MLX part is loaded.
    """
    loaded, records, training = load_everything(options)

    import importlib.util

    import mlx.core as mx

    from macft.training_bench.sides import OPTIMIZER, add_mlx_lm_adapter, result, since_warm_up

    found = importlib.util.find_spec("unsloth_zoo")
    package = types.ModuleType("unsloth_zoo")
    package.__path__ = list((found and found.submodule_search_locations) or [])
    package.__spec__ = found
    sys.modules["unsloth_zoo"] = package
    from unsloth_zoo.mlx.trainer import MLXTrainer, MLXTrainingConfig

    mx.random.seed(0)
    add_mlx_lm_adapter(loaded.model)
    if training.masked:
        halves = [(record["messages"][:-1], record["messages"][-1:]) for record in records]
        records = [{"prompt": prompt, "completion": completion} for prompt, completion in halves]
    times: list[float] = []
    trained: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = MLXTrainer(
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            train_dataset=records,
            args=MLXTrainingConfig(
                per_device_train_batch_size=training.batch_size,
                gradient_accumulation_steps=1,
                max_steps=training.steps,
                warmup_steps=0,
                learning_rate=OPTIMIZER.learning_rate,
                lr_scheduler_type="constant",
                optim="adam",
                weight_decay=0.0,
                gradient_checkpointing=False,
                logging_steps=1,
                output_dir=folder,
                completion_only_loss=True if training.masked else None,
            ),
        )

        def clock(*told: Any, **_more: Any) -> None:
            mx.synchronize()
            times.append(time.perf_counter())
            trained.append(int(told[7]))

        trainer.add_step_callback(clock)
        trainer.train()
    targets = trained[-1] - trained[training.warm_up - 1]
    return result(training, *since_warm_up(training, times), targets), loaded


def run(worker: str, python: str, arguments: list[str]) -> dict[str, Any]:
    """One training in a fresh process, with this script's own ``arguments``."""
    done = subprocess.run(
        [python, __file__, "--worker", worker, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{worker} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


WORKERS: dict[str, Callable[..., tuple[dict[str, float], Any]]] = {
    "macft": train_macft,
    "mlx_lm": train_mlx_lm,
    "unsloth": train_unsloth,
}


def main() -> None:
    """Runs the comparison, or one side of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="sql")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--warm-up", type=int, help="steps before the time is taken")
    parser.add_argument("--stock", action="store_true", help="mlx_lm with the BLAS of MLX's own wheel")
    parser.add_argument("--compile", default="auto", help="macft's training.compile")
    parser.add_argument("--packing", default="auto", help="macft's training.packing")
    parser.add_argument("--recompute", default="auto", help="macft's training.recompute")
    parser.add_argument("--random", metavar="MODEL", help="random weights in the shape of this model")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="quantise them")
    parser.add_argument("--folder", help="where the model, or with --random the tokenizer, is taken from")
    parser.add_argument("--unsloth", metavar="PYTHON", help="also run Unsloth's trainer, with this Python")
    parser.add_argument("--worker", choices=sorted(WORKERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.warm_up = arguments.warm_up or WARM_UP_STEPS[arguments.case]
    if arguments.worker:
        if arguments.stock and arguments.worker != "macft":
            import mlx.core as mx  # before macft, so that OpenBLAS doesn't get in

            mx.eval(mx.zeros(1))
        measured, loaded = WORKERS[arguments.worker](arguments)
        if not arguments.stock:  # it would take longer than the training
            measured["held_out_loss"] = held_out_loss(loaded, arguments.case)
        print(json.dumps(measured))
        return
    pythons = {"macft": sys.executable, "mlx_lm": sys.executable}
    if arguments.unsloth:
        pythons["unsloth"] = arguments.unsloth
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    for number in range(arguments.runs):
        for name in list(pythons) if number % 2 == 0 else reversed(pythons):
            found[name].append(run(name, pythons[name], sys.argv[1:]))
            print(f"run {number + 1} {name}: {found[name][-1]}", file=sys.stderr)
    peers = list(pythons)[1:]
    heads = "".join(f"{peer:>12}{'ratio':>8}" for peer in peers)
    print(f"{'median of ' + str(arguments.runs):26}{'macft':>12}{heads}")
    for key in found["mlx_lm"][0]:
        ours = [item[key] for item in found["macft"]]
        line = f"{key:26}{statistics.median(ours):12.3f}"
        for peer in peers:
            theirs = [item[key] for item in found[peer]]
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            line += f"{statistics.median(theirs):12.3f}{ratio:8.2f}"
        print(line)


if __name__ == "__main__":
    main()
