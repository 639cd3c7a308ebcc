"""How long and how to train: the Hydra groups ``training`` and ``optimizer``."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from typing import Any

from macft.training.optimizer_table import OPTIMIZERS

MOST_PARTS = 1024
"""Micro-batches of a step whose sum is sure to be exact with ``deterministic``."""
_PARTS = 8
"""Micro-batches of a step with ``deterministic``, unless told otherwise."""
SYNCS = ("every_step", "diloco")
KERNELS = ("auto", "mlx", "cpu")
RECOMPUTE = ("auto", "none", "cheap", "blocks")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass
class OptimizerConfig:
    """The Hydra group ``optimizer``."""

    # adamw, adam, adamax, lion, muon, sgd, adafactor, rmsprop or adagrad, as implemented by MLX.
    name: str = "adamw"
    # Peak learning rate.
    learning_rate: float = 1e-4
    # After the warm-up: constant, or down to `final_learning_rate` along a line or a half cosine.
    schedule: str = "cosine"
    # Steps over which the learning rate climbs from 0 to its peak.
    warmup_steps: int = 0
    # Learning rate of the last step of a linear or cosine schedule; at 0 that step changes nothing.
    final_learning_rate: float = 0.0
    # Decoupled weight decay; only for adamw, lion, muon, sgd and adafactor.
    weight_decay: float = 0.0
    # Further arguments of the MLX optimizer by their MLX names: {betas: [0.9, 0.95], eps: 1e-8}.
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainingConfig:
    """The Hydra group ``training``. Rows are rows of the dataset, counted over all nodes."""

    # Rows in a global batch: one optimizer update. (mlx-lm: batch_size x grad_accumulation_steps.)
    batch_size: int = 8
    # Most rows in one forward pass of a node; gradients of more are accumulated. Null: all of the node's rows.
    micro_batch_size: int | None = None
    # The same adapter, bit for bit, on any number of nodes of one kind, whatever their shares, limits and placement,
    # and if nodes are lost: each micro-batch is a fixed set of rows (without micro_batch_size, an eighth of the batch),
    # and sums are exact in any order. Gradients take four times the bytes on their way. Where they are auto, compile
    # means false, recompute none, kernels mlx.
    deterministic: bool = False
    # Optimizer updates to make (mlx-lm: iters / grad_accumulation_steps). Or give `epochs`.
    steps: int | None = None
    # Passes over the training set, instead of `steps`; rounded up to whole steps.
    epochs: float | None = None
    # every_step: nodes exchange gradients in each step, and learn what one machine would. diloco: each takes
    # `inner_steps` steps by itself before they meet (DiLoCo, arXiv:2311.08105): far less traffic, another loss curve.
    sync: str = "every_step"
    # With sync=diloco: steps between two meetings.
    inner_steps: int = 10
    # With sync=diloco: learning rate of the step that the meetings make.
    outer_learning_rate: float = 0.7
    # With sync=diloco: Nesterov momentum of that step.
    outer_momentum: float = 0.9
    # Clip the gradient to this global L2 norm, over all parameters and nodes; 0 turns clipping off.
    max_grad_norm: float = 1.0
    # What the backward pass computes again instead of holding it. cheap: what lies between a block's matrix products
    # and attention (with kernels=cpu nothing, they hold little). blocks: each block from its input, about a third more
    # time. auto: none, or what the memory budget needs.
    recompute: str = "auto"
    # Lay rows end to end instead of padding them, and compute what they begin with in common once: auto (where the
    # model can take it), true (or fail), false.
    packing: str = "auto"
    # Compile gradient and update, once for each shape of a micro-batch: auto (on a GPU), true, false.
    compile: str = "auto"
    # What computes the layers: mlx (MLX operations only, as on a GPU), cpu (NumPy and OpenBLAS, for a float32 model on
    # a Linux CPU), or auto: cpu where that is possible and the step isn't compiled, else mlx.
    kernels: str = "auto"
    # Target positions whose logits are computed at once; null: as many as are fast and small.
    loss_chunk: int | None = None
    # Steps between two validations; there is also one before the first step and one after the last. 0 means never.
    eval_every: int = 50
    # Validation rows to use, the same ones each time; -1 means all.
    eval_rows: int = -1
    # Held-out rows on which dataset.metric is measured before and after training; 0 means none, -1 all. They are test
    # rows, or validation rows where there are none.
    metric_rows: int = 32
    # Longest answer generated for a metric or a sample, in tokens, with the model's thinking.
    metric_max_tokens: int = 64
    # Steps between two checkpoints; one is also saved at the end. 0 means at the end only.
    save_every: int = 50
    # Checkpoints to keep, the newest ones; the best one is kept besides.
    keep_last: int = 2
    # With topology=hosts or ssh, nodes that keep the checkpoints, each on its own disk. (With topology=local all nodes
    # have one disk, and one copy.)
    replicas: int = 2
    # The adapter folder gets the adapter of the lowest validation loss (best) or of the last step (last).
    export: str = "best"
    # Stop after this many validations in a row without a lower loss; 0 means never.
    patience: int = 0


def problems(training: TrainingConfig, optimizer: OptimizerConfig) -> list[str]:
    """One line for each value that can't be right; no I/O."""
    return _training_problems(training) + _optimizer_problems(optimizer, training.steps)


def _training_problems(config: TrainingConfig) -> list[str]:
    lines = []
    if config.batch_size < 1:
        lines.append(f"training.batch_size: {config.batch_size} must be 1 or more")
    if config.micro_batch_size is not None and config.micro_batch_size < 1:
        lines.append(f"training.micro_batch_size: {config.micro_batch_size} must be 1 or more, or null")
    if config.packing.lower() not in ("auto", "true", "false"):
        lines.append(f"training.packing: '{config.packing}' is not auto, true or false")
    if config.compile.lower() not in ("auto", "true", "false"):
        lines.append(f"training.compile: '{config.compile}' is not auto, true or false")
    if config.kernels not in KERNELS:
        lines.append(f"training.kernels: '{config.kernels}' is not one of {', '.join(KERNELS)}")
    if config.kernels == "cpu" and config.compile.lower() == "true":
        lines.append("training.kernels: cpu can't be compiled; use training.compile=auto, or training.kernels=mlx")
    if config.recompute not in RECOMPUTE:
        lines.append(f"training.recompute: '{config.recompute}' is not one of {', '.join(RECOMPUTE)}")
    if config.loss_chunk is not None and config.loss_chunk < 1:
        lines.append(f"training.loss_chunk: {config.loss_chunk} must be 1 or more, or null")
    if (config.steps is None) == (config.epochs is None):
        lines.append("training.steps and training.epochs: give exactly one of them and set the other to null")
    if config.steps is not None and config.steps < 1:
        lines.append(f"training.steps: {config.steps} must be 1 or more")
    if config.epochs is not None and not config.epochs > 0:
        lines.append(f"training.epochs: {config.epochs} must be greater than 0")
    lines += _sync_problems(config)
    if config.deterministic and config.batch_size > MOST_PARTS * fixed_micro_batch(config):
        lines.append(
            f"training.deterministic: {config.batch_size} rows are more than {MOST_PARTS} micro-batches of "
            f"{fixed_micro_batch(config)}; raise training.micro_batch_size"
        )
    if config.max_grad_norm < 0:
        lines.append(f"training.max_grad_norm: {config.max_grad_norm} must be 0 (off) or greater")
    for key in ("eval_every", "save_every", "patience"):
        if (value := getattr(config, key)) < 0:
            lines.append(f"training.{key}: {value} must be 0 (never) or more")
    for key in ("eval_rows", "metric_rows"):
        if (value := getattr(config, key)) < -1:
            lines.append(f"training.{key}: {value} must be -1 (all) or more")
    if config.metric_max_tokens < 1:
        lines.append(f"training.metric_max_tokens: {config.metric_max_tokens} must be 1 or more")
    if config.keep_last < 1:
        lines.append(
            f"training.keep_last: {config.keep_last} must be 1 or more, a run needs a checkpoint to resume from"
        )
    if config.replicas < 1:
        lines.append(f"training.replicas: {config.replicas} must be 1 (this run's first node alone) or more")
    if config.export not in ("best", "last"):
        lines.append(f"training.export: '{config.export}' is not best or last")
    if config.patience and not config.eval_every:
        lines.append("training.patience: early stopping needs validations; set training.eval_every")
    return lines


def fixed_micro_batch(config: TrainingConfig) -> int:
    """Rows of a micro-batch with ``deterministic``: the same on any number of nodes."""
    return config.micro_batch_size or max(1, config.batch_size // _PARTS)


def steps_for(config: TrainingConfig, steps_per_epoch: float) -> int:
    """Total optimizer updates from ``training.steps``, or as many as ``training.epochs`` needs to see every row."""
    if config.steps is not None:
        return config.steps
    # Rounded up, but not because of the last bits of a product: 3 epochs of 3.3333 steps are 10.
    return max(1, math.ceil(round((config.epochs or 0) * steps_per_epoch, 6)))


def _sync_problems(config: TrainingConfig) -> list[str]:
    lines = []
    if config.sync not in SYNCS:
        lines.append(f"training.sync: '{config.sync}' is not one of {', '.join(SYNCS)}")
    if config.inner_steps < 1:
        lines.append(f"training.inner_steps: {config.inner_steps} must be 1 or more")
    elif config.sync == "diloco":
        for key in ("eval_every", "save_every"):
            if (value := getattr(config, key)) % config.inner_steps:
                lines.append(
                    f"training.{key}: {value} must be a multiple of training.inner_steps ({config.inner_steps}): "
                    "with sync=diloco the nodes have one adapter only when they meet"
                )
    if not config.outer_learning_rate > 0:
        lines.append(f"training.outer_learning_rate: {config.outer_learning_rate} must be greater than 0")
    if not 0 <= config.outer_momentum < 1:
        lines.append(f"training.outer_momentum: {config.outer_momentum} must be from 0 to less than 1")
    return lines


def _optimizer_problems(config: OptimizerConfig, steps: int | None) -> list[str]:
    lines = []
    for key, names in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
        value = getattr(config, key)
        if value not in names:
            near = difflib.get_close_matches(value, names, 1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            lines.append(f"optimizer.{key}: '{value}' is not one of {', '.join(names)}{hint}")
    if not config.learning_rate > 0:
        lines.append(f"optimizer.learning_rate: {config.learning_rate} must be greater than 0")
    if not 0 <= config.final_learning_rate <= max(config.learning_rate, 0):
        lines.append(
            f"optimizer.final_learning_rate: {config.final_learning_rate} must be from 0 to optimizer.learning_rate"
        )
    if config.warmup_steps < 0 or (steps is not None and config.warmup_steps >= max(steps, 1)):
        lines.append(
            f"optimizer.warmup_steps: {config.warmup_steps} must be 0 or more and less than training.steps ({steps})"
        )
    if config.weight_decay < 0:
        lines.append(f"optimizer.weight_decay: {config.weight_decay} must be 0 or more")
    if config.weight_decay and config.name in OPTIMIZERS and not OPTIMIZERS[config.name].weight_decay:
        lines.append(f"optimizer.weight_decay: {config.name} has none; use adamw, or set it to 0")
    return lines
