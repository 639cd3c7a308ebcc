"""macft: distributed LoRA fine-tuning of language models on a small cluster of Macs.

From Python (docs/python.md)::

    import macft

    config = macft.compose("llama-lora", ["training.steps=20"])
    run = macft.fit(config)
    with run.load() as model:
        print(model.generate("Hello"))

Importing any part of macft first puts a fast BLAS in place for MLX (Linux only, see :mod:`macft.device.blas`);
this has to happen before the first ``import mlx.core`` anywhere in the process, which is why it is done here. So is
what mlx-lm's import needs where few files may be open.
"""

import importlib
import logging
from typing import TYPE_CHECKING

from macft.device import blas, open_files

if TYPE_CHECKING:
    from macft.api.configuration import compose
    from macft.api.fitting import fit, resume
    from macft.api.loaded_model import load
    from macft.api.training_run import open_run
    from macft.errors import MacftError
    from macft.planner.plan.run_plan import plan_run
    from macft.report.sinks.callbacks import StopTraining

__version__ = "0.1.0"
__all__ = ["MacftError", "StopTraining", "compose", "fit", "load", "open_run", "plan_run", "resume"]

_WHERE = {
    "compose": "macft.api.configuration",
    "fit": "macft.api.fitting",
    "resume": "macft.api.fitting",
    "load": "macft.api.loaded_model",
    "open_run": "macft.api.training_run",
    "plan_run": "macft.planner.plan.run_plan",
    "MacftError": "macft.errors",
    "StopTraining": "macft.report.sinks.callbacks",
}
"""What is imported when it is first used, so that ``import macft`` costs little. No module has one of these names."""

# Without a log file, Python would print warnings to the console.
logging.getLogger("macft").addHandler(logging.NullHandler())
blas.preload()
open_files.allow_low_limit()


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'macft' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
