"""How the ranks exchange gradients: the Hydra group ``collective``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from macft.collective.codecs.registry import CODECS as REGISTERED_CODECS

BACKENDS = ("ring", "mlx")
MLX_BACKENDS = ("any", "ring", "jaccl", "nccl", "mpi")
CODECS = (*REGISTERED_CODECS, "auto")
ENCRYPTION = ("auto", "on", "off")
MAX_SECONDS = 86_400.0
MIN_PIECE_BYTES = 4 * 1024
MAX_BUCKET_BYTES = 1 << 32
MAX_PIECE_BYTES = 64 * 1024 * 1024


@dataclass
class CollectiveConfig:
    """The Hydra group ``collective``."""

    # ring: a ring over ZeroMQ (TCP). mlx: MLX's own communication, mx.distributed.
    backend: str = "ring"
    # MLX's own backend: ring, jaccl (RDMA over Thunderbolt 5), nccl (CUDA), mpi (under mpirun). any: the one that the
    # launcher of the processes has set up, otherwise ring. Only with backend=mlx.
    mlx_backend: str = "any"
    # on: all traffic between nodes is encrypted, and only nodes whose keys are trusted can join (`python -m
    # macft.keys`). off: no encryption and no keys; only for a cable that nobody else can reach. auto: on, unless all
    # nodes are this machine.
    encryption: str = "auto"
    # Send data over plain TCP connections beside ZeroMQ's, which is at least 1.5 times as fast. With encryption they
    # are encrypted too (AES-256-GCM). They use ports that the system chooses. If a port can't be reached, or with
    # false, data goes over ZeroMQ.
    streams: bool = True
    # none: gradients are sent as float32. bfloat16, int8: half and a quarter of the bytes. powersgd: low-rank factors
    # of rank `powersgd_rank`. Rounding errors are added in the next step (error feedback). auto: the least lossy of
    # the first three with which the exchange takes less than 5% of a step, measured over the first steps.
    codec: str = "none"
    # Rank of PowerSGD's factors. A higher rank loses less and sends more.
    powersgd_rank: int = 1
    # Seconds without a heartbeat after which a peer is lost. Heartbeats are sent while a peer computes, too.
    timeout: float = 10.0
    # Seconds that the ranks wait for a peer that is alive but busy: a long step, a download, an evaluation.
    patience: float = 600.0
    # Seconds between two heartbeats to each neighbour.
    heartbeat: float = 1.0
    # Most bytes of one message. Larger arrays are sent in several, so that sending, receiving and adding overlap. On a
    # slow link messages are smaller automatically.
    piece_bytes: int = 2 * 1024 * 1024
    # Bytes of gradient that are reduced together, last layer first. While a bucket is sent, the next one is computed.
    bucket_bytes: int = 4 * 1024 * 1024


def problems(config: CollectiveConfig) -> list[str]:
    """One line for each invalid value; no I/O."""
    lines = []
    if config.backend not in BACKENDS:
        lines.append(f"collective.backend: '{config.backend}' is not one of {', '.join(BACKENDS)}")
    if config.mlx_backend not in MLX_BACKENDS:
        lines.append(f"collective.mlx_backend: '{config.mlx_backend}' is not one of {', '.join(MLX_BACKENDS)}")
    elif config.backend != "mlx" and config.mlx_backend != "any":
        lines.append(f"collective.mlx_backend: only collective=mlx uses it, this is collective={config.backend}")
    if config.encryption in ("True", "False"):
        lines.append("collective.encryption: YAML reads on and off as true and false; put it in quotes")
    elif config.encryption not in ENCRYPTION:
        lines.append(f"collective.encryption: '{config.encryption}' is not one of {', '.join(ENCRYPTION)}")
    elif config.encryption == "on" and config.backend == "mlx":
        lines.append("collective.encryption: collective=mlx can't encrypt; use collective=ring, or encryption=off")
    if config.codec not in CODECS:
        lines.append(f"collective.codec: '{config.codec}' is not one of {', '.join(CODECS)}")
    elif config.backend == "mlx" and (config.codec == "auto" or REGISTERED_CODECS[config.codec].ring_only):
        lines.append(f"collective.codec: {config.codec} works on collective=ring only; collective=mlx has powersgd")
    if not 1 <= config.powersgd_rank <= 64:
        lines.append(f"collective.powersgd_rank: {config.powersgd_rank} must be from 1 to 64")
    for key in ("timeout", "patience", "heartbeat"):
        value = getattr(config, key)
        if not (math.isfinite(value) and 0.1 <= value <= MAX_SECONDS):
            lines.append(f"collective.{key}: {value} must be from 0.1 to {MAX_SECONDS:.0f} seconds")
    if config.heartbeat >= config.timeout:
        lines.append(
            f"collective.heartbeat: {config.heartbeat} must be less than collective.timeout "
            f"({config.timeout}), or every peer would seem silent"
        )
    if not MIN_PIECE_BYTES <= config.piece_bytes <= MAX_PIECE_BYTES:
        limits = f"{MIN_PIECE_BYTES} to {MAX_PIECE_BYTES}"
        lines.append(f"collective.piece_bytes: {config.piece_bytes} must be from {limits}")
    elif config.piece_bytes % 8:
        lines.append(f"collective.piece_bytes: {config.piece_bytes} must be a multiple of 8, the size of a float64")
    if not MIN_PIECE_BYTES <= config.bucket_bytes <= MAX_BUCKET_BYTES:
        limits = f"{MIN_PIECE_BYTES} to {MAX_BUCKET_BYTES}"
        lines.append(f"collective.bucket_bytes: {config.bucket_bytes} must be from {limits}")
    return lines
