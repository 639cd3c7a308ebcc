"""Kernels that a step hands to a GPU, and shapes that are compiled: macft beside mlx_lm. Counted, on any machine.

    python benchmarks/step_launches.py [--cases CASE ...] [--device metal|cuda] [--recompute none|cheap|blocks]
        [--packing auto|true|false] [--steps 100] [--nodes 1|2] [--kinds]
    python benchmarks/step_launches.py --by-block [--without low-rank|norms|swiglu|attention|mask|sums]

The rows, in the order and the batches of each trainer, are those of `benchmarks/training.py`, and so is the number of
blocks; macft's rows are packed or padded as `training.packing=auto` chooses for the true model on such a device. Only
the width is small, on which the number of kernels does not depend; chunks of the loss are as large as with the true
vocabulary. Graphs are traced and compiled by ``mx.compile`` as on a GPU, and not computed: see `harness/launches.py`
for what counts. A step holds all that its trainer has computed: loss, gradient, norm, clipping, update. With
``--nodes 2`` it is that of a node among several: the gradient that it sends, and the update after the all-reduce; norm
and clipping are the host's then.

``kernels`` are those of the average of the first ``--steps`` steps; ``traces``: how often a gradient was traced and
compiled in them; ``tokens``: those computed in an average step, with padding. ``--kinds`` lists the kernels by kind.
``--by-block`` prints kernels of a step, of a block with a backward pass and of one without, for each way to lay out
rows and to recompute: the table of `planner/kernels.py`. ``--without``: with the plain way in place of one of macft's:
mlx-lm's low-rank layers, MLX's gradients of norms, SwiGLU and attention, packs laid out as rows, MLX's sums of a
token's gradients, which are additions to the same memory.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from macft.config.execution import execution_for
from macft.config.reference import default_config
from macft.data.batch import Batch, micro_batches
from macft.data.formats import Row
from macft.data.tokenize import tokenize
from macft.device.kind import Device
from macft.device.mlx_device import prepare_device
from macft.model.adapters.adapt import adapt
from macft.model.backends.choose import make_backend
from macft.model.backends.mlx import attention, backend
from macft.model.execution import Execution
from macft.model.fetch.resolve import resolve
from macft.model.load import load_tokenizer
from macft.model.settings import ModelConfig
from macft.model.shape import shape_of
from macft.planner.kernels import COUNTED, StepKernels
from macft.planner.node_part import planner_for
from macft.planner.packing import choose_packing
from macft.planner.workload import steps_of
from macft.training.gradients.gradient import GradientComputer
from macft.training.optimizer import OptimizerStep, make_optimizer
from macft.training_bench.cases import Case
from macft.training_bench.random_weights import held_as
from macft.training_bench.rows import records_of
from macft.training_bench.sides import ADAPTER, OPTIMIZER, Training, add_mlx_lm_adapter, row_order

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.datasets import CacheDataset, create_dataset
from mlx_lm.tuner.trainer import default_loss, iterate_batches

from harness.launches import launches, like_a_gpu

CASES = {
    "1B, sql": Case("1B-sql", "Llama-3.2-1B", "sql"),
    "8B, sql": Case("8B-sql", "Meta-Llama-3.1-8B", "sql"),
    "1B, mixed": Case("1B-mixed", "Llama-3.2-1B", "mixed"),
    "8B, mixed": Case("8B-mixed", "Meta-Llama-3.1-8B", "mixed"),
    "8B, long": Case("8B-long", "Meta-Llama-3.1-8B", "long"),
    "8B in 4 bits, long": Case("8B-4bit-long", "Meta-Llama-3.1-8B", "long", 4),
}
VOCABULARY = 512
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Found:
    """Kernels of each step by kind, traces, and tokens computed in all steps."""

    kernels: list[Counter[str]]
    traces: int
    tokens: int

    def line(self, name: str, side: str) -> str:
        """A row of the table."""
        kernels = sum(each.total() for each in self.kernels) / len(self.kernels)
        return f"| {name} | {side} | {kernels:,.0f} | {self.traces} | {self.tokens / len(self.kernels):,.0f} |"


def small_model(config: dict[str, Any], bits: int | None) -> nn.Module:
    """Of the blocks of ``config`` and of little width, in bfloat16 or ``bits``."""
    names = ("model_type", "num_hidden_layers", "rms_norm_eps", "rope_theta")
    known = {name: config[name] for name in names}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    tied = config.get("tie_word_embeddings", False)
    arguments = known | SMALL | {"head_dim": head_dim, "vocab_size": VOCABULARY, "tie_word_embeddings": tied}
    return held_as(Model(ModelArgs.from_dict(arguments)), bits)


class Arrays:
    """The arrays of trees of modules, dicts and lists; :meth:`put_back` sets them to what they were."""

    def __init__(self, *trees: Any):
        self._places = [place for tree in trees for place in self._walk(tree)]

    def _walk(self, tree: Any) -> Iterator[tuple[Any, Any, mx.array]]:
        keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
        for key in list(keys):
            if isinstance(tree[key], mx.array):
                yield tree, key, tree[key]
            else:
                yield from self._walk(tree[key])

    def put_back(self) -> None:
        """Sets them."""
        for tree, key, value in self._places:
            tree[key] = value


@contextmanager
def not_computed(function: str = "async_eval") -> Iterator[None]:
    """Inside, nothing that is handed to the device to be computed in the background, or by ``function``, is."""
    before = getattr(mx, function)
    setattr(mx, function, lambda *_arrays: None)
    try:
        yield
    finally:
        setattr(mx, function, before)


def count_mlx_lm(model: nn.Module, batches: Iterable[tuple[mx.array, mx.array]]) -> Found:
    """The step of ``mlx_lm.tuner.trainer.train``, of its ``batches``."""
    add_mlx_lm_adapter(model)
    mx.eval(model.parameters())
    model.train()
    optimizer = optim.Adam(OPTIMIZER.learning_rate, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    mx.eval(optimizer.state)
    state = [model.state, optimizer.state, mx.random.state]
    value_and_grad = nn.value_and_grad(model, default_loss)
    traces = 0

    def step(tokens: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
        nonlocal traces
        traces += 1
        (loss, count), gradient = value_and_grad(model, tokens, lengths)
        optimizer.update(model, gradient)
        return loss, count

    compiled = mx.compile(step, inputs=state, outputs=state)
    arrays = Arrays(*state)
    kernels, tokens, known = [], 0, dict[Any, Counter[str]]()
    for given, lengths in batches:
        traced = traces
        loss, count = compiled(given, lengths)
        if traces > traced:
            after = Arrays(*state)
            known[given.shape] = launches(mx.zeros(()) + loss, mx.zeros((), mx.int32) + count, *values(after, arrays))
            known[given.shape]["Full"] -= 2  # its sums so far, which are there
        kernels.append(known[given.shape])
        tokens += given.shape[0] * (given.shape[1] - 1)
        arrays.put_back()
    return Found(kernels, traces, tokens)


def values(after: Arrays, before: Arrays) -> list[mx.array]:
    """The arrays that are others than ``before``."""
    old = {id(value) for _, _, value in before._places}
    return [value for _, _, value in after._places if id(value) not in old]


def count_macft(
    model: nn.Module,
    batches: list[list[Batch]],
    execution: Execution,
    nodes: int = 1,
    trained: int = ADAPTER.num_layers,
) -> Found:
    """macft's gradient and update: queued on one node, before and after the all-reduce on several.

    ``trained``: blocks with an adapter, the last ones.
    """
    adapter = replace(ADAPTER, num_layers=min(trained, len(model.layers)))
    adaptation = adapt(model, adapter, seed=0)
    mx.eval(model.parameters())
    optimizer = make_optimizer(OPTIMIZER)
    kernels = make_backend(execution)
    with kernels.installed(model):
        compute = GradientComputer(model, kernels, execution, adaptation.dropout_keys, seed=0)
        update = OptimizerStep(model, optimizer, compiled=True)
        return count_steps(compute, update, model, optimizer, batches, nodes=nodes)


def count_steps(
    compute: GradientComputer,
    update: OptimizerStep,
    model: nn.Module,
    optimizer: Any,
    batches: list[list[Batch]],
    *,
    nodes: int = 1,
) -> Found:
    """Their steps."""
    with like_a_gpu(compute.execution.device), not_computed():
        kernels, tokens, known = [], 0, dict[Any, Counter[str]]()
        zeros = {key: mx.zeros(value.shape) for key, value in update._parameters.get().items()}
        parameters = update._parameters.get()
        update.queue(zeros, 1e-4, mx.zeros(()), 1, 0.0)  # which makes the optimizer's state
        optimizer.state = tree_map(lambda value: mx.zeros(value.shape, value.dtype), optimizer.state)
        update._is_sound = mx.array(True)
        mx.eval(parameters, update._parameters.put(parameters), optimizer.state)
        for step, work in enumerate(batches):
            parts = [part for batch in work for part in compute._layout.parts(batch)]
            key = tuple((part.inputs.shape, part.positions.shape, *(x.shape for x in part.layout)) for part in parts)
            tokens += sum(part.inputs.size for part in parts)
            arrays, state = Arrays(model, optimizer.state), optimizer.state
            local = compute(step, work, form="joined" if nodes == 1 else "buckets")
            if key not in known:
                if nodes == 1:
                    total = sum(local.losses, mx.array(0.0))
                    results = [*update.queue(local.gradient, 1e-4, total, local.target_tokens, 0.0), update._is_sound]
                    known[key] = Counter()
                else:
                    known[key] = launches(*local.losses, *local.gradient.values())
                    summed = {name: mx.zeros(value.shape) for name, value in local.gradient.items()}
                    results = []
                    mx.eval(summed)
                    with not_computed("eval"):
                        update(summed, 1e-4)
                after = Arrays(model, optimizer.state)
                known[key] += launches(*results, *values(after, arrays))
                optimizer.state = state
                update._parameters.put(parameters)
                update._is_sound = mx.array(True)
            kernels.append(known[key])
        return Found(kernels, compute._traces, tokens)


LAYOUTS = {"padded": (58, 60, 65, 49), "mask": (58, 60, 65, 49), "rows": (1000, 600, 1000, 700)}
"""Lengths of the rows of a batch, which begin alike; so laid out by macft where they are packed."""


def count_by_block(device: str, layout: str, recompute: str) -> StepKernels:
    """From models of two and three blocks, and of two more that are not trained."""
    generator = np.random.default_rng(0)
    begun = generator.integers(1, 500, 20)
    tokens = [np.append(begun, generator.integers(1, 500, n - 20)).astype(np.int32) for n in LAYOUTS[layout]]
    rows = [Row(each, len(each) // 2) for each in tokens]
    packs = layout != "padded"
    execution = Execution(
        device=device,
        kernels="mlx",
        dtype="bfloat16",
        packing=packs,
        shared_prefixes=packs,
        compiled=True,
        recompute=recompute,
    )

    def count(blocks: int, trained: int) -> int:
        config = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 1e4, "head_dim": 64}
        model = small_model({**config, "num_hidden_layers": blocks}, None)
        work = micro_batches(rows, np.arange(len(rows)), None)
        return count_macft(model, [work], execution, trained=trained).kernels[0].total()

    two, three, of_four = count(2, 2), count(3, 3), count(4, 2)
    return StepKernels(two - 2 * (three - two), three - two, (of_four - two) // 2)


@contextmanager
def without(technique: str | None) -> Iterator[None]:
    """Inside, the plain way is in place of ``technique``."""

    def as_it_is(original: Any, *_arguments: Any) -> Any:
        return original

    plain: dict[str | None, list[tuple[Any, str, Any]]] = {
        "low-rank": [(backend, "in_base_type", lambda _most, _kind: None)],
        "norms": [(backend, "frozen_norms", lambda _model: nullcontext())],
        "swiglu": [(backend, "short_swiglu", as_it_is)],
        "attention": [(backend, "plain_attention", as_it_is)],
        "mask": [(attention, "attends_under_mask", lambda *_sizes: False)],
        "sums": [(attention, "operation", lambda forward, _backward: forward)],
    }
    changed = [(module, name, getattr(module, name), new) for module, name, new in plain.get(technique, [])]
    for module, name, _, new in changed:
        setattr(module, name, new)
    try:
        yield
    finally:
        for module, name, old, _ in changed:
            setattr(module, name, old)


def execution_of(case: Case, device: Device, records: list[Any], tokenizer: Any, options: argparse.Namespace) -> Any:
    """How macft would compute ``case`` on such a device, and the global batches of its steps."""
    training = Training(case.rows, options.steps, 1)
    rows = [tokenize(record, tokenizer, mask_prompt=training.masked) for record in records]
    steps = steps_of(rows, row_order(len(rows), training), training.steps)
    kept = ModelConfig(precision="checkpoint", quantization="keep")
    config = replace(
        default_config(),
        model=kept,
        adapter=ADAPTER,
        training=replace(training.config(), packing=options.packing, recompute=options.recompute),
    )
    shape = shape_of({**case.model_config, "torch_dtype": "bfloat16"}, case.model)
    execution = execution_for(config, shape, shape.checkpoint, device)
    execution = choose_packing(planner_for(config, shape, execution, steps))[0]
    chunk = execution.loss_chunk_for(int(case.model_config["vocab_size"]))
    return replace(execution, loss_chunk=chunk), [micro_batches(step.rows, step.ids, None) for step in steps]


def count(name: str, device: Device, options: argparse.Namespace) -> tuple[Found, Found, str]:
    """mlx_lm's, macft's, and how macft lays rows out."""
    case = CASES[name]
    training = Training(case.rows, options.steps, 1)
    config = ModelConfig()
    tokenizer = load_tokenizer(config, resolve(config))
    records = records_of(case.rows, tokenizer, training.batch_size * training.steps)
    shape = dict(case.model_config)
    data = CacheDataset(create_dataset(records, tokenizer, argparse.Namespace(mask_prompt=training.masked)))
    batches_of_mlx_lm = iterate_batches(data, training.batch_size, 2048, loop=True)
    with like_a_gpu(device.kind):
        theirs = count_mlx_lm(small_model(shape, case.bits), islice(batches_of_mlx_lm, training.steps))
    execution, batches = execution_of(case, device, records, tokenizer, options)
    ours = count_macft(small_model(shape, case.bits), batches, execution, options.nodes)
    return theirs, ours, "packed" if execution.packing else "padded"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--device", choices=("metal", "cuda"), default="metal")
    parser.add_argument("--recompute", choices=("none", "cheap", "blocks"), default="none")
    parser.add_argument("--packing", choices=("auto", "true", "false"), default="auto")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--nodes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--kinds", action="store_true", help="list the first step's kernels")
    parser.add_argument("--by-block", action="store_true", help="print the table of planner/kernels.py")
    parser.add_argument("--without", choices=("low-rank", "norms", "swiglu", "attention", "mask", "sums"))
    options = parser.parse_args()
    prepare_device()
    if options.by_block:
        with without(options.without):
            for device, layout, recompute in COUNTED:
                print(device, layout, recompute, tuple(count_by_block(device, layout, recompute)), flush=True)
        return
    print("| case | side | kernels | traces | tokens |\n| --- | --- | ---: | ---: | ---: |", flush=True)
    for name in options.cases:
        theirs, ours, layout = count(name, Device(options.device), options)
        print(theirs.line(name, "mlx_lm"))
        print(ours.line(name, f"macft, {layout}"), flush=True)
        if options.kinds:
            for kind, here in sorted((theirs.kernels[-1] | ours.kernels[-1]).items(), key=lambda each: -each[1]):
                print(f"    {kind:44}{theirs.kernels[-1][kind]:8}{ours.kernels[-1][kind]:8}", flush=bool(here))


if __name__ == "__main__":
    main()
