"""Models: the same layers and one interface (see openmoe.models.common.ModelOutput)."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.config import Architecture, ModelConfig
from openmoe.layers.moe.exchange import through_experts
from openmoe.models.jetmoe import JetMoE
from openmoe.models.openmoe import OpenMoE
from openmoe.types import Batch, PyTree


def build_model(
  config: ModelConfig, name: str | None = None, run_experts: Callable = through_experts
) -> nn.Module:
  """The decoder that a config describes; inside a module, a submodule of this name.

  Args:
    run_experts: how `decode` moves rows to experts and back.
  """
  match config.architecture:
    case Architecture.OPENMOE:
      return OpenMoE(config, run_experts, name=name)
    case Architecture.JETMOE:
      return JetMoE(config, run_experts, name=name)


def empty_batch(rows: int, length: int) -> Batch:
  """A batch of padding, for shapes."""
  zeros = jnp.zeros((rows, length), jnp.int32)
  return Batch(zeros, zeros, zeros.astype(jnp.float32), zeros, zeros)


def abstract_params(config: ModelConfig) -> tuple[PyTree, PyTree]:
  """(shapes, logical axes) of the parameters, without allocating any."""
  model = build_model(config)
  init = lambda: model.init(jax.random.key(0), empty_batch(1, 8), train=False)
  with partitioning.without_mesh():
    boxed = jax.eval_shape(init)['params']
  axes = jax.tree.map(
    lambda box: tuple(box.names), boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
  )
  return nn.unbox(boxed), axes
