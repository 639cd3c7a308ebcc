"""The typed schema of a run, put together from the settings of each package."""

from __future__ import annotations

from dataclasses import dataclass, field

from macft.collective.settings import CollectiveConfig
from macft.config.plan_settings import PlanConfig
from macft.data.settings import DatasetConfig
from macft.model.adapters.settings import AdapterConfig
from macft.model.settings import ModelConfig
from macft.report.settings import ReportConfig
from macft.thermal.settings import ThermalConfig
from macft.topology.settings import TopologyConfig
from macft.training.settings import OptimizerConfig, TrainingConfig

SCHEMA_NAME = "macft_schema"


@dataclass
class TrainConfig:
    """The configuration of a run."""

    # Name of the run; part of its folder's name.
    name: str = "run"
    # Seed of the data order, the adapter's initial values and dropout.
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    collective: CollectiveConfig = field(default_factory=CollectiveConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    thermal: ThermalConfig = field(default_factory=ThermalConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)


def is_scored(config: TrainConfig) -> bool:
    """Whether the dataset's metrics are measured before and after training."""
    return bool(config.dataset.metrics()) and config.training.metric_rows != 0


def register_schema() -> None:
    """Registers the schema with Hydra, which then checks every key and type when it composes."""
    from hydra.core.config_store import ConfigStore  # Hydra is slow to import, and only the command line needs it

    ConfigStore.instance().store(name=SCHEMA_NAME, node=TrainConfig)
