"""The optimizers that a run can use. One line here and a file in ``configs/optimizer`` add another one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OptimizerInfo:
    """An optimizer of MLX.

    ``mlx_class`` is its name in ``mlx.optimizers``. ``weight_decay``: it takes that argument. ``states``: float values
    that it keeps for each trainable parameter. ``by_element``: it updates each element by itself, so that parameters
    can be updated as one long array. ``defaults``: arguments that differ from MLX's.
    """

    mlx_class: str
    states: float
    weight_decay: bool = False
    by_element: bool = True
    defaults: tuple[tuple[str, bool], ...] = ()


# Bias correction is part of Adam as published, and MLX leaves it off: without it the first steps are far too long.
_ADAM = (("bias_correction", True),)
# The learning rate comes from the schedule, as for the others.
_ADAFACTOR = (("relative_step", False), ("scale_parameter", False))

OPTIMIZERS = {
    "adamw": OptimizerInfo("AdamW", states=2, weight_decay=True, defaults=_ADAM),
    "adam": OptimizerInfo("Adam", states=2, defaults=_ADAM),
    "adamax": OptimizerInfo("Adamax", states=2),
    "lion": OptimizerInfo("Lion", states=1, weight_decay=True),
    "muon": OptimizerInfo("Muon", states=1, weight_decay=True, by_element=False),
    "sgd": OptimizerInfo("SGD", states=1, weight_decay=True),
    "adafactor": OptimizerInfo("Adafactor", states=0.1, weight_decay=True, by_element=False, defaults=_ADAFACTOR),
    "rmsprop": OptimizerInfo("RMSprop", states=1),
    "adagrad": OptimizerInfo("Adagrad", states=1),
}
"""By the name in ``optimizer.name``."""
