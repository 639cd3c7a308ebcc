"""How one node computes a run: the record of all decisions that depend on device, model and configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Execution:
    """Decided once, before the model is loaded; loading, gradient, validation, evaluation and planner only read it.

    ``kernels`` is the backend (:mod:`macft.model.backends`): "mlx", MLX operations only, as on Metal and CUDA, or
    "cpu", NumPy and OpenBLAS, for float32 models on a Linux CPU.
    """

    # "cpu", "metal" or "cuda".
    device: str
    kernels: str
    # Type of the floating-point weights: "float32", "bfloat16" or "float16".
    dtype: str
    # Bits and group size of quantised weights; None: not quantised.
    bits: int | None = None
    group_size: int = 64
    # Rows are laid end to end instead of padded, and common beginnings are computed once.
    packing: bool = False
    shared_prefixes: bool = False
    # Most tokens in a pack of several rows; None: no limit.
    pack_tokens: int | None = None
    # Gradient and update are compiled with mx.compile.
    compiled: bool = False
    # What the backward pass computes again: "none" or "blocks".
    recompute: str = "none"
    # Target positions whose logits exist at once; None: the kernels choose by the vocabulary.
    loss_chunk: int | None = None
    # Most rows in a forward pass of training (None: all of a node's rows) and of validation.
    micro_batch_size: int | None = None
    evaluation_rows: int = 8
    # Parts of a micro-batch that are computed at the same time, on a thread each.
    lanes: int = 1
