"""A small train state on a mesh of simulated devices, and what the checkpoint tests share."""

import pathlib

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

IDENTITY = {'name': 'openmoe_test', 'embed_dim': 16, 'moe': {'num_experts': 8, 'top_k': 2}}
DATA = {'shard_0': b'\x00\xff position', 'shard/1 of 2': b''}


@flax.struct.dataclass
class State:
  """As openmoe.train_step.TrainState: what the Checkpointer relies on, and no more."""

  step: jax.Array
  params: dict
  opt_state: tuple


SPECS = {'embed': PartitionSpec('model', None), 'experts': PartitionSpec('expert', 'data')}


def mesh(data, expert, model):
  axes = ('data', 'expert', 'model')
  return jax.make_mesh(
    (data, expert, model), axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes)
  )


def shard(tree, where):
  """Places a tree on a mesh: leaves by the name of their parameter, all else replicated."""

  def place(path, leaf):
    names = [getattr(k, 'key', None) for k in path]
    spec = next((SPECS[n] for n in names if n in SPECS and leaf.ndim == 2), PartitionSpec())
    return jax.device_put(leaf, NamedSharding(where, spec))

  return jax.tree_util.tree_map_with_path(place, tree)


def make_state(step=0, seed=0, where=None, scale=1):
  keys = jax.random.split(jax.random.key(seed), 3)
  params = {
    'embed': jax.random.normal(keys[0], (32 * scale, 16)),
    'layers': {'experts': jax.random.normal(keys[1], (8, 16)), 'norm': jnp.ones((16,))},
  }
  opt_state = jax.tree.map(lambda x: x + 0.1, optax.adam(1e-3).init(params))
  state = State(step=jnp.int32(step), params=params, opt_state=opt_state)
  return shard(state, where or mesh(2, 4, 1))


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def checkpoints(model_dir):
  return sorted(p.name for p in pathlib.Path(model_dir).iterdir() if 'checkpoint' in p.name)
