"""Loads a run's model with its adapter, and installs the operations that compute it."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from macft.config.schema import TrainConfig
from macft.model.adapters.adapt import Adaptation, adapt
from macft.model.adapters.files import load_adapter_weights
from macft.model.backends.base import Backend
from macft.model.backends.choose import make_backend
from macft.model.confirm import confirm
from macft.model.execution import Execution
from macft.model.load import LoadedModel, load
from macft.parallel.stage_places import StagePlaces
from macft.report.phase_lines import PhaseLines
from macft.run.prepare_data import PreparedData, begin_phase
from macft.training.gradients.gradient import StepGradient
from macft.training.gradients.step_gradient import make_step_gradient

_log = logging.getLogger("macft.run")


@dataclass(frozen=True)
class PreparedModel:
    """A model in memory with its adapter.

    Attributes:
        loaded: The model, frozen but for the adapter.
        adaptation: What is trained of it.
        execution: How it is computed, as the loaded model allows.
        notes: Lines for the user.
    """

    loaded: LoadedModel
    adaptation: Adaptation
    execution: Execution
    notes: list[str]


@dataclass(frozen=True)
class Computation:
    """What computes the model: ``installed`` holds the operations of ``backend`` on it, closing it removes them."""

    backend: Backend
    installed: ExitStack
    gradient: StepGradient


def prepare_model(
    config: TrainConfig,
    prepared: PreparedData,
    execution: Execution,
    phases: PhaseLines,
    *,
    device: str,
    reads_adapter: bool,
) -> PreparedModel:
    """Loads the model and adds the adapter; ``reads_adapter``: with the values of ``adapter.init_from``, if any.

    ``device`` is for the log.

    Raises:
        ConfigError: the model can't be computed as ``execution`` says.
        ModelError: the model or the adapter can't be read, or training would make no sense.
    """
    begin_phase(phases, f"loading the model {config.model.path}")
    _log.info("from %s, on %s", prepared.model_folder, device)
    loaded = load(config.model, prepared.model_folder, execution, prepared.tokenizer)
    execution, revisions = confirm(execution, loaded)
    adaptation = adapt(loaded.model, config.adapter, seed=config.seed, streamed=loaded.streamed)
    if config.adapter.init_from is not None and reads_adapter:
        load_adapter_weights(Path(config.adapter.init_from).expanduser(), loaded.model)
    return PreparedModel(loaded, adaptation, execution, revisions)


def prepare_computation(config: TrainConfig, model: PreparedModel, places: StagePlaces) -> Computation:
    """Installs the operations for ``model``, of which this rank computes its part of ``places``."""
    backend = make_backend(model.execution)
    installed = ExitStack()
    installed.enter_context(backend.installed(model.loaded.model))
    gradient = make_step_gradient(
        model.loaded.model,
        backend,
        model.execution,
        model.adaptation.dropout_keys,
        model.loaded.streamed,
        seed=config.seed,
        bucket_bytes=config.collective.bucket_bytes,
        places=places,
        deterministic=config.training.deterministic,
    )
    return Computation(backend, installed, gradient)
