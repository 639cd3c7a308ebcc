"""The cases that ``macft bench --training`` measures, and what the plan says of each on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from macft.config.execution import execution_for
from macft.config.reference import default_config
from macft.data.formats import Row
from macft.device.kind import Device
from macft.device.memory import usable_bytes
from macft.model.execution import Execution
from macft.model.settings import ModelConfig
from macft.model.shape import ModelShape, shape_of
from macft.planner.mlx_lm_memory import predict_mlx_lm
from macft.planner.node_part import planner_for, whole_model_planner
from macft.planner.packing import choose_packing
from macft.planner.speed import own_speed, step_cost
from macft.planner.workload import steps_of
from macft.topology.settings import parse_budget
from macft.training_bench.random_weights import config_of
from macft.training_bench.rows import records_of
from macft.training_bench.sides import ADAPTER, OPTIMIZER, Training, row_order, tokenized


@dataclass(frozen=True)
class Case:
    """``rows`` of a kind, and a model of random weights in 16 bits, or in ``bits``; on a CPU in float32.

    ``config``: its config.json, instead of that of ``model``.
    """

    name: str
    model: str
    rows: str
    bits: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def model_config(self) -> dict[str, Any]:
        """config.json with the form of the weights as they are made here."""
        config = {**(self.config or config_of(self.model)), "torch_dtype": self.dtype}
        return {**config, "quantization": {"bits": self.bits, "group_size": 64}} if self.bits else config

    @cached_property
    def dtype(self) -> str:
        """Type of what is not quantised."""
        return "float32" if Device.default().kind == "cpu" and not self.bits else "bfloat16"


CASES = (
    Case("135M-sql", "SmolLM2-135M", "sql"),
    Case("135M-mixed", "SmolLM2-135M", "mixed"),
    Case("1B-sql", "Llama-3.2-1B", "sql"),
    Case("8B-sql", "Meta-Llama-3.1-8B", "sql"),
    Case("1B-mixed", "Llama-3.2-1B", "mixed"),
    Case("8B-mixed", "Meta-Llama-3.1-8B", "mixed"),
    Case("8B-long", "Meta-Llama-3.1-8B", "long"),
    Case("8B-4bit-long", "Meta-Llama-3.1-8B", "long", 4),
)


@dataclass(frozen=True)
class CasePlan:
    """How macft would compute a case here. Memory in bytes; ``mlx_lm_peak`` is what the planner says of mlx-lm.

    ``operations`` are those of the average step that is timed, ``seconds`` an estimate of a step.
    """

    shape: ModelShape
    execution: Execution
    budget: float
    peak: float
    mlx_lm_peak: float
    refusal: str | None
    operations: float
    tokens: float
    seconds: float


def plan_case(case: Case, training: Training, tokenizer: Any) -> CasePlan:
    """What ``macft plan`` would say of the steps of ``training``."""
    model = ModelConfig(precision="checkpoint", quantization="keep")
    records = records_of(training.rows, tokenizer, training.batch_size * training.steps)
    rows = tokenized(records, tokenizer, training)
    return plan_training(shape_of(case.model_config, case.model), model, training, rows)


def plan_training(
    shape: ModelShape,
    model: ModelConfig,
    training: Training,
    rows: Sequence[Row],
    **keys: Any,
) -> CasePlan:
    """The same of a model of any shape; ``model`` says how it is held, ``keys`` are those of ``training``."""
    steps = steps_of(rows, row_order(len(rows), training), training.steps)
    config = replace(
        default_config(),
        model=model,
        adapter=ADAPTER,
        optimizer=OPTIMIZER,
        training=replace(training.config(), **keys),
    )
    config = replace(config, topology=replace(config.topology, placement="replicate"))
    given = planner_for(config, shape, execution_for(config, shape, shape.checkpoint, Device.default()), steps)
    planner = replace(given, execution=choose_packing(given)[0])
    budget = parse_budget(config.topology.memory_budget, usable_bytes())
    whole_model = whole_model_planner(config, planner, budget)
    execution, refusal = whole_model.choice()
    longest = max(int(step.lengths.max()) for step in steps)
    timed = step_cost(replace(planner, steps=steps[training.warm_up :]), execution)
    tokens = timed.tokens
    speed = own_speed(shape.parameters * tokens, execution)
    return CasePlan(
        shape=shape,
        execution=execution,
        budget=budget,
        peak=whole_model.parts(execution).peak,
        mlx_lm_peak=predict_mlx_lm(shape, execution, ADAPTER, longest, rows=training.batch_size),
        refusal=refusal,
        operations=timed.operations,
        tokens=tokens,
        seconds=timed.operations / speed.operations_per_second,
    )


def reason_against(plan: CasePlan) -> str | None:
    """Why the case does not fit this machine's memory, shortly; None if it does."""
    if plan.refusal is None:
        return None
    return f"needs about {plan.peak / 1e9:.1f} GB, and {plan.budget / 1e9:.1f} GB are available"


def find_cases(names: Sequence[str]) -> list[Case]:
    """The cases with these names, in the order of :data:`CASES`; all without names.

    Raises:
        ValueError: there is no such case; says which there are.
    """
    known = [case.name for case in CASES]
    for name in names:
        if name not in known:
            raise ValueError(f"'{name}' is not one of {', '.join(known)}")
    return [case for case in CASES if not names or case.name in names]
