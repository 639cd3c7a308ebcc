"""What macft uses of ``mlx_lm.tuner``. Nothing else in a run imports that package.

It imports W&B and SwanLab wherever they are installed, for the callbacks of mlx-lm's own trainer: about a second at the
start of every process. Here they are left out of that import. A later ``import mlx_lm.tuner.callbacks`` finds them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_CALLBACKS = "mlx_lm.tuner.callbacks"
_TRACKERS = ("wandb", "swanlab")


@contextmanager
def _without_trackers() -> Iterator[None]:
    if _CALLBACKS in sys.modules:
        yield
        return
    # Importing a name that stands for None is an ImportError, which mlx-lm expects.
    left_out: dict[str, Any] = dict.fromkeys(name for name in _TRACKERS if name not in sys.modules)
    sys.modules.update(left_out)
    try:
        yield
    finally:
        for name in (*left_out, _CALLBACKS):
            sys.modules.pop(name, None)
        vars(sys.modules.get("mlx_lm.tuner", sys)).pop("callbacks", None)


with _without_trackers():
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear
    from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

__all__ = ["DoRALinear", "LoRALinear", "LoRASwitchLinear", "linear_to_lora_layers", "load_adapters"]
