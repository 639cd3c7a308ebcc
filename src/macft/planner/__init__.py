"""Predicts memory and time of a run before anything is loaded.

The modules here predict one node: :mod:`~macft.planner.memory` and what it is made of,
:mod:`~macft.planner.memory_planner` (which batch settings fit), :mod:`~macft.planner.speed`. A node has the whole model
(:mod:`~macft.planner.whole_model`) or a stage of a pipeline (:mod:`~macft.planner.stage`).

The packages below form a line:

- :mod:`~macft.planner.placement` compares placements on several nodes: which one holds which blocks.
- :mod:`~macft.planner.preflight` is how the nodes of a run agree on one before they load the model.
- :mod:`~macft.planner.plan` is ``macft plan``.
"""
