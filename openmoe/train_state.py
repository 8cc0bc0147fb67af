"""TrainState, and the abstract description of a run's parameters: shapes, axes, counts."""

from __future__ import annotations

import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from openmoe import partitioning
from openmoe.config import ModelConfig, OptimizerConfig
from openmoe.models import build_model
from openmoe.optimizer import optimizer_axes
from openmoe.types import Array, Batch, PyTree


@flax.struct.dataclass
class TrainState:
  """Everything that an optimizer step changes.

  Attributes:
    step: int32 scalar, optimizer steps done.
    params: nested dict of float32 arrays.
    opt_state: of the optimizer.
  """

  step: Array
  params: PyTree
  opt_state: PyTree


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


def init_state(model: nn.Module, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
  """Step 0. A function of the seed alone: threefry keys, the same on every mesh."""
  with partitioning.without_mesh():
    variables = model.init(jax.random.key(seed), empty_batch(1, 8), train=False)
  params = nn.unbox(variables['params'])
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def state_shardings(
  mesh: jax.sharding.Mesh,
  config: OptimizerConfig,
  abstract: TrainState,
  param_axes: PyTree,
  fsdp: bool,
) -> TrainState:
  """NamedShardings of every array of the state."""
  axes = TrainState(
    step=(),
    params=param_axes,
    opt_state=optimizer_axes(config, abstract.opt_state, abstract.params, param_axes),
  )
  rules = partitioning.axis_rules(fsdp)
  return jax.tree.map(
    lambda leaf, names: jax.sharding.NamedSharding(
      mesh, partitioning.logical_to_spec(names, rules)
    ),
    abstract,
    axes,
  )


def count_params(tree: PyTree) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def active_params(config: ModelConfig) -> int:
  """Parameters a token goes through in the blocks: all but the experts it is not sent to.

  Embedding and output layer are not counted (the convention of the paper's "activated").
  """
  shapes, axes = abstract_params(config)
  blocks = jax.tree.leaves(shapes['decoder'])
  names = jax.tree.leaves(axes['decoder'], is_leaf=lambda a: isinstance(a, tuple))
  total = count_params(shapes['decoder_norm'])
  for leaf, axis in zip(blocks, names, strict=True):
    size = math.prod(leaf.shape)
    total += size * config.moe.top_k // config.moe.num_experts if 'expert' in axis else size
  return total
