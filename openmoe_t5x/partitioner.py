"""Our mesh for t5x, and the factoring of our stacked parameters."""

from __future__ import annotations

import flax.core
import jax
from t5x import adafactor
from t5x import partitioning as t5x_partitioning
from t5x.contrib.moe import adafactor_utils
from t5x.contrib.moe import partitioning as moe_partitioning

from openmoe import partitioning
from openmoe.config import MeshConfig
from openmoe.types import PyTree


class OpenMoEPartitioner(moe_partitioning.MoePjitPartitioner):
  """t5x's partitioner for mixtures of experts, on our mesh of (data, expert, model).

  t5x's own works as well, but takes num_expert_partitions as an upper bound and puts all CPU
  devices of a host on `model`.
  """

  @t5x_partitioning.cached_property
  def mesh(self) -> jax.sharding.Mesh:
    """All devices.

    Raises:
      ConfigError: the partitions do not divide them.
    """
    return partitioning.make_mesh(MeshConfig(self._num_expert_partitions, self._num_partitions))


def logical_factor_rules() -> PyTree:
  """t5x's rules for mixtures of experts, and the axes of stacked parameters (JetMoE)."""
  row = adafactor.FactorDim
  ours = {'groups': row.BATCH, 'layers': row.BATCH, 'gate': row.COLUMN}
  return flax.core.freeze(ours | adafactor_utils.logical_factor_rules().unfreeze())
