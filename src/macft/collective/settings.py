"""How the ranks exchange gradients: the Hydra group ``collective``."""

from __future__ import annotations

import math
from dataclasses import dataclass

BACKENDS = ("ring", "mlx")
MLX_BACKENDS = ("any", "ring", "jaccl", "nccl", "mpi")
CODECS = ("none", "bfloat16", "int8", "powersgd", "auto")
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
    # Which of MLX's: ring, jaccl (RDMA over Thunderbolt 5), nccl (CUDA), mpi (under mpirun). any: what the launcher of
    # the processes has prepared, otherwise ring. Only with backend=mlx.
    mlx_backend: str = "any"
    # on: all traffic between nodes is encrypted, and only nodes whose keys are trusted take part (`python -m
    # macft.keys`). off: neither; for a cable that nobody else can reach. auto: on unless all nodes are this machine.
    encryption: str = "auto"
    # Data goes over plain TCP connections beside ZeroMQ's: faster by half and more. Where encryption is on they are
    # encrypted too (AES-256-GCM). They use ports that the system chooses; where those can't be reached, and with false,
    # data goes over ZeroMQ.
    streams: bool = True
    # none: gradients travel as they are. bfloat16, int8: half and a quarter of the bytes. powersgd: low-rank factors of
    # rank `powersgd_rank`. What these round away is added later. auto: the least lossy of the first three with which
    # exchanging takes less than a twentieth of a step, measured over the first steps.
    codec: str = "none"
    # Rank of PowerSGD's factors: 1 is the smallest, higher ones lose less.
    powersgd_rank: int = 1
    # Seconds a peer may be silent. A live one never is: its heartbeats go on while it computes.
    timeout: float = 10.0
    # Seconds a peer that is alive may keep the others waiting: a long step, a download, an evaluation.
    patience: float = 600.0
    # Seconds between two heartbeats to each neighbour.
    heartbeat: float = 1.0
    # Most bytes of one message; larger arrays go in several, so that sending, receiving and adding overlap. On a slow
    # link they are smaller by themselves.
    piece_bytes: int = 2 * 1024 * 1024
    # Bytes of gradient that leave together, last layer first; while a bucket is on the wire the next one is computed.
    bucket_bytes: int = 4 * 1024 * 1024


def problems(config: CollectiveConfig) -> list[str]:
    """One line for each value that can't be right; no I/O."""
    found = []
    if config.backend not in BACKENDS:
        found.append(f"collective.backend: '{config.backend}' is not one of {', '.join(BACKENDS)}")
    if config.mlx_backend not in MLX_BACKENDS:
        found.append(f"collective.mlx_backend: '{config.mlx_backend}' is not one of {', '.join(MLX_BACKENDS)}")
    elif config.backend != "mlx" and config.mlx_backend != "any":
        found.append(f"collective.mlx_backend: only collective=mlx uses it, this is collective={config.backend}")
    if config.encryption in ("True", "False"):
        found.append("collective.encryption: YAML reads on and off as true and false; put it in quotes")
    elif config.encryption not in ENCRYPTION:
        found.append(f"collective.encryption: '{config.encryption}' is not one of {', '.join(ENCRYPTION)}")
    elif config.encryption == "on" and config.backend == "mlx":
        found.append("collective.encryption: collective=mlx can't encrypt; use collective=ring, or encryption=off")
    if config.codec not in CODECS:
        found.append(f"collective.codec: '{config.codec}' is not one of {', '.join(CODECS)}")
    elif config.backend == "mlx" and config.codec in ("bfloat16", "int8", "auto"):
        found.append(f"collective.codec: {config.codec} works on collective=ring only; collective=mlx has powersgd")
    if not 1 <= config.powersgd_rank <= 64:
        found.append(f"collective.powersgd_rank: {config.powersgd_rank} must be from 1 to 64")
    for key in ("timeout", "patience", "heartbeat"):
        value = getattr(config, key)
        if not (math.isfinite(value) and 0.1 <= value <= MAX_SECONDS):
            found.append(f"collective.{key}: {value} must be from 0.1 to {MAX_SECONDS:.0f} seconds")
    if config.heartbeat >= config.timeout:
        found.append(
            f"collective.heartbeat: {config.heartbeat} must be less than collective.timeout "
            f"({config.timeout}), or every peer would seem silent"
        )
    if not MIN_PIECE_BYTES <= config.piece_bytes <= MAX_PIECE_BYTES:
        limits = f"{MIN_PIECE_BYTES} to {MAX_PIECE_BYTES}"
        found.append(f"collective.piece_bytes: {config.piece_bytes} must be from {limits}")
    elif config.piece_bytes % 8:
        found.append(f"collective.piece_bytes: {config.piece_bytes} must be a multiple of 8, the size of a float64")
    if not MIN_PIECE_BYTES <= config.bucket_bytes <= MAX_BUCKET_BYTES:
        limits = f"{MIN_PIECE_BYTES} to {MAX_BUCKET_BYTES}"
        found.append(f"collective.bucket_bytes: {config.bucket_bytes} must be from {limits}")
    return found
