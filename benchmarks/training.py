"""macft against mlx_lm.lora, and Unsloth, on one node: the same model, rows, adapter, precision, BLAS, cores, in turn.

    python benchmarks/training.py [--case sql|mixed|long] [--runs 5] [--steps 24] [--compile WORD] [--packing WORD]
        [--random MODEL [--bits 4]] [--unsloth PYTHON]

Each run is a process of its own, A B B A ...; it trains one pass over the same rows and reports the time from the end
of the warm-up to the end of the last step, the losses, and the process's peak memory. The device is idle at both ends
of that time, so that it holds the steps that are counted, all of them and no other. The table shows medians and the
median of the pairwise ratios; ``held_out_loss`` is that of the trained model on other rows, measured by the same code
for all.
Cases: ``sql``, the SQL dataset with masked prompts; ``mixed``, unmasked text of 16 to 384 tokens; and ``long``,
unmasked text of 1,000 tokens and more, two rows a step.

``--random`` takes random weights in the shape of another model, such as Llama-3.2-1B, in bfloat16 or quantised to
``--bits``: for a GPU, where speed depends on the shape alone and not on what the weights are.

mlx_lm gets macft's OpenBLAS and the model already dequantised to float32, without which it would be many times slower
on a CPU; ``--stock`` leaves it MLX's own BLAS. ``--unsloth`` adds Unsloth's MLX trainer; PYTHON is that of an
environment with macft in it, and with ``pip install --no-deps unsloth-zoo mlx-vlm``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from harness.random_weights import in_bfloat16

ROWS_A_STEP = {"sql": 4, "mixed": 4, "long": 2}
WARM_UP_STEPS = {"sql": 4, "mixed": 4, "long": 1}
TOKENS = {"mixed": (16, 384), "long": (1000, 1020)}
NUM_LAYERS = 16
RANK, SCALE = 8, 20.0
LEARNING_RATE = 1e-4


def load_everything(options: argparse.Namespace) -> tuple[Any, list[dict[str, Any]]]:
    """Model and records, the same for all."""
    from macft.data.settings import SourceConfig
    from macft.data.sources import read_source
    from macft.device.mlx_device import prepare_device
    from macft.model.load import load, load_tokenizer
    from macft.model.resolve import resolve
    from macft.model.settings import ModelConfig

    case, config = options.case, ModelConfig()
    prepare_device()
    folder = Path(options.folder) if options.folder else resolve(config)
    if options.random:
        model = random_model(options.random, options.bits)
        loaded = types.SimpleNamespace(model=model, tokenizer=load_tokenizer(config, folder))
    else:
        loaded = load(config, folder)  # type: ignore[assignment]
    records = [dict(row.record) for row in read_source(SourceConfig(path="builtin:sql"))["train"]]
    count = ROWS_A_STEP[case] * options.steps
    return loaded, records[:count] if case == "sql" else texts(records, loaded.tokenizer, *TOKENS[case], count)


def random_model(name: str, bits: int | None) -> Any:
    """A frozen model of the shape that ``name`` has in macft's list of models, the same weights each time."""
    from macft.planner.run_plan import known_models

    # isort: split
    import mlx.core as mx
    from mlx_lm.utils import _get_classes

    (config,) = [known for path, known in known_models().items() if f"/{name}-" in path]
    del config["quantization"]
    mx.random.seed(1)
    model_class, arguments = _get_classes(config)
    return in_bfloat16(model_class(arguments.from_dict(config)), bits)


def texts(records: list[dict[str, Any]], tokenizer: Any, least: int, most: int, count: int) -> list[dict[str, Any]]:
    """``count`` texts of ``least`` to ``most`` tokens, evenly spread on a log scale, cut from the SQL dataset."""
    stream = tokenizer.encode("\n".join(json.dumps(record) for record in records))
    generator = random.Random(0)
    found, start = [], 0
    for _ in range(count):
        length = round(math.exp(generator.uniform(math.log(least), math.log(most))))
        start = start if start + length < len(stream) else 0
        found.append({"text": tokenizer.decode(stream[start : start + length])})
        start += length
    return found


def execution_of(model: Any, **training: Any) -> Any:
    """How this machine computes ``model``; ``training`` are arguments of resolve()."""
    from macft.device.kind import Device
    from macft.model.execution import resolve
    from macft.model.load import weight_format_of
    from macft.model.packable import may_pack
    from macft.model.settings import ModelConfig

    config = ModelConfig(precision="checkpoint", quantization="keep")
    return resolve(config, weight_format_of(model), Device.default(), can_pack=may_pack(model), **training)


def held_out_loss(loaded: Any, case: str) -> float:
    """Mean loss of the target tokens of rows that no trainer has seen, in nats."""
    from macft.collective.solo import Solo
    from macft.data.settings import SourceConfig
    from macft.data.sources import read_source
    from macft.data.tokenize import tokenize
    from macft.model.backends.choose import make_backend
    from macft.parallel.shares import DataShard
    from macft.training.loss import TokenLoss
    from macft.training.validation import validation_loss

    records = [dict(row.record) for row in read_source(SourceConfig(path="builtin:sql"))["valid"]]
    records = (
        records[:32] if case == "sql" else texts(records, loaded.tokenizer, *TOKENS[case], 8 if case == "mixed" else 2)
    )
    rows = [tokenize(record, loaded.tokenizer, mask_prompt=case == "sql") for record in records]
    model = loaded.model
    execution = execution_of(model, micro_batch_size=4)
    backend = make_backend(execution)
    with backend.installed(model):
        loss = TokenLoss(model, backend)
        return validation_loss(
            model, loss, execution, rows, Solo(), shard=DataShard(0, 1), progress=lambda *_: None
        ).loss


def train_macft(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """macft's own loop, without reports, checkpoints and evaluation."""
    import mlx.core as mx

    from macft.checkpoint.saver import CheckpointSaver
    from macft.checkpoint.snapshot import Progress
    from macft.checkpoint.store import CheckpointStore
    from macft.collective.solo import Solo
    from macft.data.order import RowOrder
    from macft.data.tokenize import tokenize
    from macft.model.adapt import adapt
    from macft.model.adapter_settings import AdapterConfig
    from macft.model.backends.choose import make_backend
    from macft.report.events import Event, NullReporter, StepDone
    from macft.training.build_trainer import build_trainer
    from macft.training.gradient import GradientComputer, LocalGradient
    from macft.training.gradient_reducer import GradientReducer
    from macft.training.optimizer import make_optimizer
    from macft.training.settings import OptimizerConfig, TrainingConfig
    from macft.training.state import TrainState

    seconds: list[float] = []
    targets: list[int] = []

    class Steps(NullReporter):
        def handle(self, event: Event) -> None:
            if isinstance(event, StepDone):
                seconds.append(event.seconds)
                targets.append(event.target_tokens)

    class TimedGradient(GradientComputer):
        """A step may still be under way when the next one begins; the first that is timed waits for the one before."""

        began = 0.0

        def __call__(self, step: int, *arguments: Any, **named: Any) -> LocalGradient:
            if step == options.warm_up:
                mx.synchronize()
                self.began = time.perf_counter()
            return super().__call__(step, *arguments, **named)

    case, steps = options.case, options.steps
    loaded, records = load_everything(options)
    rows = [tokenize(record, loaded.tokenizer, mask_prompt=case == "sql") for record in records]
    adaptation = adapt(loaded.model, AdapterConfig(rank=RANK, scale=SCALE, num_layers=NUM_LAYERS), seed=0)
    optimizer_config = OptimizerConfig(name="adam", learning_rate=LEARNING_RATE, schedule="constant")
    execution = execution_of(loaded.model, packing=options.packing, compile=options.compile)
    backend = make_backend(execution)
    with tempfile.TemporaryDirectory() as folder, backend.installed(loaded.model):
        compute = TimedGradient(loaded.model, backend, execution, adaptation.dropout_keys, seed=0)
        build_trainer(
            TrainingConfig(batch_size=ROWS_A_STEP[case], steps=steps, eval_every=0, save_every=0, max_grad_norm=0.0),
            optimizer_config,
            TrainState(loaded.model, make_optimizer(optimizer_config), Progress(), GradientReducer(Solo())),
            compute,
            rows,
            RowOrder([len(rows)], [1.0], batch_size=ROWS_A_STEP[case], seed=0),
            CheckpointSaver(CheckpointStore(Path(folder), keep_last=1)),
            Steps(),
        ).train()
        mx.synchronize()
        elapsed = time.perf_counter() - compute.began
    return result(options, elapsed, seconds[options.warm_up :], sum(targets[options.warm_up :])), loaded


def train_mlx_lm(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """mlx-lm's own tuner, as mlx_lm.lora calls it."""
    case, steps = options.case, options.steps
    loaded, records = load_everything(options)  # imports macft, and so OpenBLAS, before MLX

    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm.tuner.datasets import CacheDataset, create_dataset
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    mx.random.seed(0)
    linear_to_lora_layers(loaded.model, NUM_LAYERS, {"rank": RANK, "scale": SCALE, "dropout": 0.0})
    data = CacheDataset(create_dataset(records, loaded.tokenizer, types.SimpleNamespace(mask_prompt=case == "sql")))
    times: list[float] = []
    trained: list[int] = []

    class Callback:
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            mx.synchronize()
            times.append(time.perf_counter())
            trained.append(int(info["trained_tokens"]))

        def on_val_loss_report(self, info: dict[str, Any]) -> None:
            raise AssertionError(f"no validation was asked for: {info}")

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArgs(
            batch_size=ROWS_A_STEP[case],
            iters=steps,
            steps_per_report=1,
            steps_per_save=10 * steps,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
        )
        optimizer = optim.Adam(LEARNING_RATE, bias_correction=True)
        train(loaded.model, optimizer, data, None, settings, training_callback=Callback())
    # mlx-lm counts one padding token a row as a target; only the rows' own targets are compared.
    padding = ROWS_A_STEP[case] * (steps - options.warm_up)
    targets = trained[-1] - trained[options.warm_up - 1] - padding
    return result(options, *since_warm_up(options, times), targets), loaded


def train_unsloth(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Unsloth's MLX trainer, as its own examples call it, on the same padded batches; blocks are not recomputed.

    Its package asks for torch and, but for an Apple machine, a GPU; only its MLX part is loaded.
    """
    case, steps = options.case, options.steps
    loaded, records = load_everything(options)

    import importlib.util

    import mlx.core as mx
    from mlx_lm.tuner.utils import linear_to_lora_layers

    found = importlib.util.find_spec("unsloth_zoo")
    package = types.ModuleType("unsloth_zoo")
    package.__path__ = list((found and found.submodule_search_locations) or [])
    package.__spec__ = found
    sys.modules["unsloth_zoo"] = package
    from unsloth_zoo.mlx.trainer import MLXTrainer, MLXTrainingConfig

    mx.random.seed(0)
    linear_to_lora_layers(loaded.model, NUM_LAYERS, {"rank": RANK, "scale": SCALE, "dropout": 0.0})
    if case == "sql":
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
                per_device_train_batch_size=ROWS_A_STEP[case],
                gradient_accumulation_steps=1,
                max_steps=steps,
                warmup_steps=0,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                optim="adam",
                weight_decay=0.0,
                gradient_checkpointing=False,
                logging_steps=1,
                output_dir=folder,
                completion_only_loss=True if case == "sql" else None,
            ),
        )

        def clock(*told: Any, **_more: Any) -> None:
            mx.synchronize()
            times.append(time.perf_counter())
            trained.append(int(told[7]))

        trainer.add_step_callback(clock)
        trainer.train()
    return result(options, *since_warm_up(options, times), trained[-1] - trained[options.warm_up - 1]), loaded


def since_warm_up(options: argparse.Namespace, times: list[float]) -> tuple[float, list[float]]:
    """Seconds from the end of the warm-up to the last of ``times``, the ends of the steps; and those of each step."""
    timed = times[options.warm_up - 1 :]
    return timed[-1] - timed[0], [b - a for a, b in pairwise(timed)]


def result(options: argparse.Namespace, elapsed: float, steps: list[float], targets: int) -> dict[str, Any]:
    """Speed and memory of a training that has just ended; ``steps`` are the seconds of those that were timed."""
    import mlx.core as mx

    peak_resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_mlx = mx.get_peak_memory()
    unit = 1 if platform.system() == "Darwin" else 1024
    return {
        "target_tokens_per_second": targets / elapsed,
        # Without what a shape of batch costs when it comes first, as compiling does.
        "median_step_ms": 1000 * statistics.median(steps),
        "rows_per_second": ROWS_A_STEP[options.case] * len(steps) / elapsed,
        "peak_resident_gb": peak_resident * unit / 1e9,
        "peak_mlx_gb": peak_mlx / 1e9,
    }


def run(worker: str, python: str, arguments: list[str]) -> dict[str, Any]:
    """One training in a fresh process, with this script's own ``arguments``."""
    done = subprocess.run(
        [python, __file__, "--worker", worker, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{worker} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


WORKERS: dict[str, Callable[..., tuple[dict[str, Any], Any]]] = {
    "macft": train_macft,
    "mlx_lm": train_mlx_lm,
    "unsloth": train_unsloth,
}


def main() -> None:
    """Runs the comparison, or one side of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=sorted(ROWS_A_STEP), default="sql")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--warm-up", type=int, help="steps before the time is taken")
    parser.add_argument("--stock", action="store_true", help="mlx_lm with the BLAS of MLX's own wheel")
    parser.add_argument("--compile", default="auto", help="macft's training.compile")
    parser.add_argument("--packing", default="auto", help="macft's training.packing")
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
