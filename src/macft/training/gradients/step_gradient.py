"""What computes a node's part of a step: the whole model at once, block by block, or a stage of a pipeline."""

from __future__ import annotations

import mlx.nn as nn

from macft.device import blas
from macft.model.adapters.dropout import DropoutKeys
from macft.model.backends.base import Backend
from macft.model.blocks.block_weights import BlockWeights
from macft.model.execution import Execution
from macft.parallel.stage_places import StagePlaces
from macft.training.gradients.exact_sums import ExactParameters, ExactStepGradient
from macft.training.gradients.gradient import GradientComputer, StepGradient
from macft.training.gradients.pipelined import PipelinedGradient
from macft.training.gradients.staged import StagedGradient, StagedLoss
from macft.training.gradients.staged_model import StagedModel
from macft.training.loss import TokenLoss
from macft.training.validation import Losses


def make_step_gradient(
    model: nn.Module,
    backend: Backend,
    execution: Execution,
    dropout_keys: DropoutKeys,
    streamed: BlockWeights | None,
    *,
    seed: int,
    bucket_bytes: int,
    places: StagePlaces | None = None,
    deterministic: bool = False,
) -> StepGradient:
    """What ``execution`` asks for; ``streamed`` supplies the blocks' weights where they are not all in memory.

    ``places``: the ranks' stages, where ``execution`` is that of a pipeline. ``deterministic``: sums are exact, of
    micro-batches that are computed one by one.
    """
    exact = ExactParameters.of(model, bucket_bytes) if deterministic else None
    if exact is not None:
        blas.set_threads(1)  # how many there are would show in the last bits
    if execution.placement == "pipeline":
        assert streamed is not None
        assert places is not None
        return PipelinedGradient(
            model,
            backend,
            execution,
            dropout_keys,
            streamed,
            places,
            seed=seed,
            bucket_bytes=bucket_bytes,
            exact=exact,
        )
    inner: StepGradient = (
        GradientComputer(model, backend, execution, dropout_keys, seed=seed, bucket_bytes=bucket_bytes)
        if streamed is None
        else StagedGradient(model, backend, execution, dropout_keys, streamed, seed=seed, bucket_bytes=bucket_bytes)
    )
    return inner if exact is None else ExactStepGradient(inner, exact)


def make_losses(model: nn.Module, backend: Backend, streamed: BlockWeights | None) -> Losses:
    """The loss of ``model``, which is installed in ``backend``, without a gradient."""
    if streamed is None:
        return TokenLoss(model, backend)
    return StagedLoss(StagedModel(model, backend, streamed))
