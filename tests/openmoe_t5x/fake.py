"""The few names of t5x that openmoe_t5x uses, where there is no t5x."""

from __future__ import annotations

import functools
import sys
import types

import flax.core


class Metric:
  """Keeps what it is made of."""

  def __init__(self, **fields):
    self.__dict__.update(fields)

  @classmethod
  def from_model_output(cls, **fields):
    return cls(**fields)


class BaseTransformerModel:
  def __init__(self, module, input_vocabulary, output_vocabulary, optimizer_def):
    self.module, self.optimizer_def = module, optimizer_def
    self.input_vocabulary, self.output_vocabulary = input_vocabulary, output_vocabulary


class MoePjitPartitioner:
  def __init__(self, num_expert_partitions, num_partitions=None, logical_axis_rules=None):
    self._num_expert_partitions, self._num_partitions = num_expert_partitions, num_partitions


_METRICS = ('AveragePerStep', 'TimeRate', 'StepsPerTime', 'Time')
MODULES = {
  't5x': {},
  't5x.contrib': {},
  't5x.contrib.moe': {},
  't5x.adafactor': {'FactorDim': types.SimpleNamespace(BATCH=1, ROW=2, COLUMN=3, NONE=None)},
  't5x.metrics': {name: type(name, (Metric,), {}) for name in _METRICS},
  't5x.models': {'BaseTransformerModel': BaseTransformerModel},
  't5x.partitioning': {'cached_property': functools.cached_property},
  't5x.contrib.moe.partitioning': {'MoePjitPartitioner': MoePjitPartitioner},
  't5x.contrib.moe.adafactor_utils': {
    'logical_factor_rules': lambda: flax.core.freeze({'expert': 1, 'embed': 2})
  },
}


def install() -> list[str]:
  """Puts the modules where imports find them; returns their names."""
  for name, names in MODULES.items():
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = []
    vars(module).update(names)
    parent, _, leaf = name.rpartition('.')
    if parent:
      setattr(sys.modules[parent], leaf, module)
  return list(MODULES)
