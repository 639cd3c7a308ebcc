"""What macft uses of ``mlx_lm.tuner``. Nothing else in a run imports that package.

It imports W&B and SwanLab wherever they are installed, for the callbacks of mlx-lm's own trainer: about a second at the
start of every process. Here they are left out of that import. A later ``import mlx_lm.tuner.callbacks`` finds them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_CALLBACKS = "mlx_lm.tuner.callbacks"
_TRACKERS = ("wandb", "swanlab")


@contextmanager
def _without_trackers() -> Iterator[None]:
    if _CALLBACKS in sys.modules:
        yield
        return
    left_out = [name for name in _TRACKERS if name not in sys.modules]
    for name in left_out:
        sys.modules[name] = None  # type: ignore[assignment] # its import is an ImportError, which mlx-lm expects
    try:
        yield
        vars(sys.modules["mlx_lm.tuner"]).pop("callbacks", None)
    finally:
        for name in (*left_out, _CALLBACKS):
            sys.modules.pop(name, None)


with _without_trackers():
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear
    from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

__all__ = ["DoRALinear", "LoRALinear", "LoRASwitchLinear", "linear_to_lora_layers", "load_adapters"]
