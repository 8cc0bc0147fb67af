"""Frozen configuration dataclasses with all validation; nothing here knows gin."""

from openmoe.config.run import DataConfig, InitialState, TrainConfig
from openmoe.config.step import (
  BALANCE_LOSSES,
  Architecture,
  CapacityConvention,
  ConfigError,
  Dispatch,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  OptimizerName,
  Remat,
  RouterLoss,
  RouterOrder,
  Schedule,
  parse_enum,
)

__all__ = [
  'BALANCE_LOSSES',
  'Architecture',
  'CapacityConvention',
  'ConfigError',
  'DataConfig',
  'Dispatch',
  'InitialState',
  'MeshConfig',
  'MoEConfig',
  'ModelConfig',
  'OptimizerConfig',
  'OptimizerName',
  'Remat',
  'RouterLoss',
  'RouterOrder',
  'Schedule',
  'TrainConfig',
  'parse_enum',
]
