"""What is trained: the adapter's kind, where it sits and how large it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

KINDS = ("lora", "dora", "full")


@dataclass
class AdapterConfig:
    """The Hydra group ``adapter``. ``rank``, ``scale``, ``dropout``, ``num_layers`` mean what they mean in mlx-lm."""

    # lora, dora (Liu et al. 2024), or full: the chosen layers' own weights are trained, no adapter is added.
    type: str = "lora"
    # Rank of the low-rank update, mlx-lm's parameter.
    rank: int = 8
    # Factor of the low-rank update, mlx-lm's parameter. `alpha`, if given, sets it instead.
    scale: float = 20.0
    # PEFT's parameter: scale = alpha / rank, or alpha / sqrt(rank) with `rslora`.
    alpha: float | None = None
    # Rank-stabilised LoRA (Kalajdzievski 2023). Needs `alpha`.
    rslora: bool = False
    # Probability with which an input of the low-rank path is dropped while training.
    dropout: float = 0.0
    # How many of the last blocks are trained; -1 means all of them.
    num_layers: int = -1
    # Block numbers, from 0, instead of `num_layers`: [0, 1, 28, 29].
    layers: list[int] = field(default_factory=list)
    # Projections by the end of their name: [q_proj, v_proj], [self_attn.o_proj], [switch_mlp.up_proj]. Empty: mlx-lm's
    # choice, every linear layer of a block, experts and embeddings inside of it too.
    targets: list[str] = field(default_factory=list)
    # Folder of an adapter, or of a run, to start from: of the same kind, rank and layers (mlx-lm: resume_adapter_file).
    init_from: str | None = None

    def effective_scale(self) -> float:
        """The factor of the low-rank update after ``alpha`` and ``rslora``."""
        if self.alpha is None:
            return self.scale
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def problems(config: AdapterConfig) -> list[str]:
    """One line for each value that can't be right; no I/O."""
    lines = []
    if config.type not in KINDS:
        lines.append(f"adapter.type: '{config.type}' is not one of {', '.join(KINDS)}")
    if config.rank < 1:
        lines.append(f"adapter.rank: {config.rank} is too small; use 1 or more (8 is usual)")
    if not 0.0 <= config.dropout < 1.0:
        lines.append(f"adapter.dropout: {config.dropout} is not in [0, 1)")
    if config.num_layers < -1 or config.num_layers == 0:
        lines.append(f"adapter.num_layers: {config.num_layers} trains nothing; use -1 for all or 1 and more")
    if config.layers and config.num_layers != -1:
        lines.append(f"adapter.layers: adapter.num_layers={config.num_layers} chooses blocks, too; set that to -1")
    if any(layer < 0 for layer in config.layers) or len(set(config.layers)) != len(config.layers):
        lines.append(f"adapter.layers: {list(config.layers)} must be different block numbers, counted from 0")
    if config.rslora and config.alpha is None:
        lines.append("adapter.rslora: needs adapter.alpha (rsLoRA's scale is alpha / sqrt(rank)); 16 is usual")
    if config.rslora and config.type == "full":
        lines.append("adapter.rslora: has no meaning with adapter.type=full")
    if not math.isfinite(config.scale) or config.scale == 0:
        lines.append(f"adapter.scale: {config.scale} would leave the adapter without effect; 20.0 is mlx-lm's default")
    if config.alpha is not None and not (math.isfinite(config.alpha) and config.alpha > 0):
        lines.append(f"adapter.alpha: {config.alpha} must be greater than 0")
    return lines
