"""How one node computes a run: the record of all decisions that depend on device, model and configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace

from macft.device.kind import Device
from macft.errors import ConfigError
from macft.model.blocks.ends import BOTH_ENDS
from macft.model.settings import ModelConfig

FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Tokens in a pack of several rows on a CPU, where longer packs are no faster and take more memory.
_PACK_TOKENS_ON_CPU = 512
# Most logits in a chunk of automatic size; a chunk has at least 64 targets. MLX holds about 12 arrays of that size.
_LOGITS_ON_CPU, _LOGITS_ON_GPU = 2**21, 2**24
_MIN_CHUNK_TARGETS = 64
# Most scores at once where attention is recomputed. MLX holds about five arrays of that size in the backward pass.
_SCORES = 2**24
# Without a gradient a GPU's fused attention holds no scores; cut so that no kernel runs long.
_EVALUATION_SCORES_ON_GPU = 2**28
# Most operations of a linear layer in one kernel, an addition and a multiplication being two: 0.4 s at the full speed
# of the slowest chip in chips.yaml, of the five seconds after which Metal ends a command.
_OPERATIONS = 2**40
_EVALUATION_ROWS = 8
_CANNOT_PACK = "training.packing: this model's attention can't take packed rows; use auto or false"


@dataclass(frozen=True)
class WeightFormat:
    """How weights are held: ``dtype`` of most floating-point values, ``bits`` of quantised matrices (None: floats)."""

    dtype: str
    bits: int | None = None
    group_size: int = 64

    @property
    def float_bytes(self) -> int:
        """Bytes of a floating-point value."""
        return FLOAT_BYTES[self.dtype]


@dataclass(frozen=True)
class Execution:
    """How one node computes a run. Loading, gradient, validation, evaluation and planner read it and decide nothing.

    :func:`resolve` makes it before the model is loaded. The memory planner (``topology.batch=auto``) and
    :func:`~macft.model.confirm.confirm` may replace it by a changed copy. ``kernels`` is the backend
    (:mod:`macft.model.backends`): "mlx", MLX operations only, as on Metal and CUDA, or "cpu", NumPy and OpenBLAS, for
    float32 models on a Linux CPU.
    """

    # "cpu", "metal" or "cuda".
    device: str
    kernels: str
    # Type of the floating-point weights: "float32", "bfloat16" or "float16".
    dtype: str
    # The weights keep the types of the checkpoint, which may hold a few in another type than dtype.
    keeps_checkpoint_dtypes: bool = False
    # Bits of quantised weights; None: not quantised.
    bits: int | None = None
    # Weights that share a scale; of no use where bits is None.
    group_size: int = 64
    # Weights are rounded to this many bits and then held as floating-point values (fake quantisation); None: they
    # are not. The arithmetic of QLoRA on a CPU.
    fake_quantized_bits: int | None = None
    # Rows are laid end to end instead of padded, and common beginnings are computed once.
    packing: bool = False
    shared_prefixes: bool = False
    # A model that turns out not to take packed rows is an error.
    requires_packing: bool = False
    # Most tokens in a pack of several rows; None: no limit.
    pack_tokens: int | None = None
    # Gradient and update are compiled with mx.compile.
    compiled: bool = False
    # What the backward pass computes again: "none"; "cheap", what lies between a block's costly operations; "blocks".
    recompute: str = "none"
    # What of these the planner may choose from, the fastest first; empty where the configuration says which.
    recompute_choices: tuple[str, ...] = ()
    # Target positions whose logits exist at once, where the configuration says so; see loss_chunk_for.
    loss_chunk: int | None = None
    # Most logits in a chunk of automatic size.
    max_logits: int = _LOGITS_ON_GPU
    # Most scores of queries and keys in a block of queries, where attention is recomputed.
    max_scores: int = _SCORES
    # The same in a forward pass without a gradient.
    max_evaluation_scores: int = _SCORES
    # Most operations of a linear layer in one kernel, with MLX's operations.
    max_operations: int = _OPERATIONS
    # Most rows in a forward pass of training (None: all of a node's rows) and of validation.
    micro_batch_size: int | None = None
    evaluation_rows: int = _EVALUATION_ROWS
    # Parts of a micro-batch that are computed at the same time, on a thread each.
    lanes: int = 1
    # Where the blocks' weights are: "replicate", all in memory; "stream", read from disk when they are needed, but for
    # the resident blocks, which stay in memory; "pipeline", those of this node's stage in memory, up to block_capacity
    # of them. But for replicate, blocks are computed one by one, and again in the backward pass; in a pipeline not
    # those of a stage whose blocks, times the micro-batches that it holds at once, are activation_capacity or fewer.
    # border_capacity: where they are, how many hidden states of a micro-batch a stage has room for.
    placement: str = "replicate"
    resident_blocks: tuple[int, ...] = ()
    # What is around the blocks is read when it is needed, too: a node without the first or the last block has no use
    # for embedding or head.
    reads_ends: bool = False
    # The ends beside which there is room for block_capacity blocks.
    ends: frozenset[str] = BOTH_ENDS
    block_capacity: int = 0
    activation_capacity: int = 0
    border_capacity: int = 0

    @property
    def weight_format(self) -> WeightFormat:
        """How the loaded weights are held."""
        return WeightFormat(self.dtype, self.bits, self.group_size)

    def loss_chunk_for(self, vocabulary: int) -> int:
        """Target positions whose logits exist at once, of a model with this vocabulary."""
        return self.loss_chunk or max(_MIN_CHUNK_TARGETS, self.max_logits // vocabulary)

    def with_batch(self, micro_batch_size: int | None, recompute: str) -> Execution:
        """The same with another micro-batch, which limits validation too, and another recomputation."""
        return replace(
            self,
            micro_batch_size=micro_batch_size,
            evaluation_rows=micro_batch_size or _EVALUATION_ROWS,
            recompute=recompute,
        )

    def unplanned(self) -> Execution:
        """The same where memory can't be predicted: little is held, if that is left to the planner, at little cost."""
        return replace(self, recompute="cheap") if "cheap" in self.recompute_choices else self

    def streamed(self, resident_blocks: tuple[int, ...], *, reads_ends: bool = False) -> Execution:
        """The same with all blocks but these read from disk when they are needed; each is computed by itself."""
        held = replace(self, placement="stream", resident_blocks=resident_blocks, reads_ends=reads_ends)
        return replace(held, recompute="none", compiled=False)

    def pipelined(
        self, block_capacity: int, resident_blocks: tuple[int, ...] = (), ends: frozenset[str] = BOTH_ENDS
    ) -> Execution:
        """The same for stages of a pipeline, of which a node holds up to ``block_capacity`` blocks in memory.

        That many fit beside ``ends`` of the model. ``resident_blocks``: those of them that it holds at first. One part
        of the rows is computed at a time, so that parts do not depend on how many threads a node has.
        """
        held = replace(self, placement="pipeline", block_capacity=block_capacity, resident_blocks=resident_blocks)
        return replace(held, reads_ends=True, ends=ends, recompute="none", compiled=False, lanes=1)

    @property
    def may_keep_activations(self) -> bool:
        """Whether a stage of a pipeline may keep what its backward pass needs, where there is room."""
        return self.recompute == "none" and self.kernels == "mlx"

    @property
    def supplies_blocks(self) -> bool:
        """Whether blocks' weights are read when they are needed, not when the model is loaded."""
        return self.placement != "replicate"

    def padded(self) -> Execution:
        """The same with rows that are padded, not packed."""
        return replace(self, packing=False, shared_prefixes=False, requires_packing=False, pack_tokens=None)


def resolve(  # noqa: PLR0913  (one for each key of the configuration)
    model: ModelConfig,
    checkpoint: WeightFormat,
    device: Device,
    *,
    packing: str = "auto",
    can_pack: bool | None = None,
    dropout: bool = False,
    compile: str = "auto",
    kernels: str = "auto",
    recompute: str = "auto",
    loss_chunk: int | None = None,
    micro_batch_size: int | None = None,
) -> Execution:
    """Decides how ``model`` is computed on ``device``. A pure function: it reads no file and asks no device.

    On a CPU ``auto`` means float32 and dequantised: nothing else goes through BLAS. There, ``4bit`` and ``8bit``
    quantise and then hold those very values in float32: the arithmetic of QLoRA (Dettmers et al. 2023,
    arXiv:2305.14314) without its saving of memory. On a GPU ``auto`` changes nothing of the checkpoint.

    Args:
        model: what the configuration wants of the weights.
        checkpoint: how the checkpoint's files hold the weights.
        device: the device that computes, here or elsewhere.
        packing: ``training.packing``.
        can_pack: whether the architecture takes packed rows; None if that isn't known before it is loaded.
        dropout: whether the model or its adapter has active dropout; each row then has masks of its own.
        compile: ``training.compile``.
        kernels: ``training.kernels``.
        recompute: ``training.recompute``.
        loss_chunk: ``training.loss_chunk``.
        micro_batch_size: ``training.micro_batch_size``.

    Raises:
        ConfigError: the model or the device does not support a setting; one line.
    """
    on_cpu = device.kind == "cpu"
    quantization = model.quantization if model.quantization != "auto" else "none" if on_cpu else "keep"
    wanted_bits = int(quantization[0]) if quantization in ("4bit", "8bit") else None
    if wanted_bits is not None and checkpoint.bits not in (None, wanted_bits):
        raise ConfigError(
            f"model.quantization: {wanted_bits}bit needs an unquantised checkpoint or one of {wanted_bits} bits, and "
            f"this one has {checkpoint.bits} bits; use keep or none"
        )
    is_quantized = quantization == "keep" or (wanted_bits is not None and not on_cpu)
    bits = (wanted_bits or checkpoint.bits) if is_quantized else None
    group_size = model.quantization_group_size if wanted_bits and checkpoint.bits is None else checkpoint.group_size
    precision = model.precision if model.precision != "auto" else "float32" if on_cpu else "checkpoint"
    dtype = checkpoint.dtype if precision == "checkpoint" else precision
    is_dequantized = bits is None and (checkpoint.bits is not None or wanted_bits is not None)
    compiled = compile.lower() == "true" or (compile.lower() == "auto" and not on_cpu)
    packs = packing.lower() != "false" and can_pack is not False
    if packing.lower() == "true" and not packs:
        raise ConfigError(_CANNOT_PACK)
    backend = _kernels(kernels, WeightFormat(dtype, bits, group_size), device, compiled=compiled)
    return Execution(
        device=device.kind,
        kernels=backend,
        dtype=dtype,
        keeps_checkpoint_dtypes=precision == "checkpoint" and not is_dequantized,
        bits=bits,
        group_size=group_size,
        fake_quantized_bits=wanted_bits if bits is None else None,
        packing=packs,
        shared_prefixes=packs and not dropout,
        requires_packing=packing.lower() == "true",
        pack_tokens=_PACK_TOKENS_ON_CPU if packs and on_cpu else None,
        compiled=compiled,
        loss_chunk=loss_chunk,
        max_logits=_LOGITS_ON_CPU if on_cpu else _LOGITS_ON_GPU,
        max_evaluation_scores=_SCORES if on_cpu else _EVALUATION_SCORES_ON_GPU,
        lanes=device.cores if backend == "cpu" else 1,
        recompute_choices=() if recompute != "auto" else recomputations(backend),
    ).with_batch(micro_batch_size, recompute if recompute in recomputations(backend) else "none")


def recomputations(kernels: str) -> tuple[str, ...]:
    """What the backward pass can compute again with these kernels, the fastest first.

    The CPU's keep the layers' inputs and results in any case, and no attention probabilities.
    """
    return ("none", "blocks") if kernels == "cpu" else ("none", "cheap", "blocks")


def require_cpu_kernels(weights: WeightFormat, device: Device, *, compiled: bool) -> None:
    """Raises ConfigError, with what would help, where the CPU backend can't compute a model; one line."""
    if obstacle := _obstacle_to_cpu_kernels(weights, device, compiled=compiled):
        raise ConfigError(f"training.kernels: cpu needs a float32 model on a Linux CPU, and {obstacle}")


def _obstacle_to_cpu_kernels(weights: WeightFormat, device: Device, *, compiled: bool) -> str:
    """Why the CPU backend can't compute such a model, and what would help; empty if it can."""
    obstacles = [
        (device.kind != "cpu", "this node computes on a GPU; use auto or mlx"),
        (weights.bits is not None, "the model is quantised; add model.quantization=none"),
        (weights.dtype != "float32", f"the model is {weights.dtype}; add model.precision=float32"),
        (compiled, "they can't be compiled; add training.compile=false"),
        (not device.openblas, "no OpenBLAS is loaded (macft.doctor says why); use auto or mlx"),
    ]
    return next((reason for applies, reason in obstacles if applies), "")


def _kernels(wanted: str, weights: WeightFormat, device: Device, *, compiled: bool) -> str:
    """The backend, "mlx" or "cpu", for ``training.kernels``."""
    if wanted == "cpu":
        require_cpu_kernels(weights, device, compiled=compiled)
    return "cpu" if wanted != "mlx" and not _obstacle_to_cpu_kernels(weights, device, compiled=compiled) else "mlx"


def cannot_pack() -> ConfigError:
    """The error where ``training.packing=true`` and the model can't take packed rows."""
    return ConfigError(_CANNOT_PACK)
