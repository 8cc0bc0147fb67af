"""Every dispatch against loops, values and gradients, with drops; sharded against unsharded."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe import partitioning
from openmoe.config import ConfigError, Dispatch, MeshConfig, MoEConfig
from openmoe.layers.moe.grouped.api import block_layout, grouped_matmul
from openmoe.layers.moe.layer import MoeLayer, resolve_groups, scaled_init
from openmoe.layers.moe.router import expert_capacity
from tests.layers import naive

G, T, D, F, E, K = 8, 32, 16, 24, 8, 2
MESHES = ((8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 8, 1))


def config(dispatch: Dispatch) -> MoEConfig:
  return MoEConfig(E, top_k=K, group_size=T, dispatch=dispatch)


def setup(dispatch: Dispatch, **changes):
  moe = dataclasses.replace(config(dispatch), **changes)
  layer = MoeLayer(moe, F, jnp.float32, scaled_init(1.0))
  x = jax.random.normal(jax.random.key(0), (G, T, D))
  params = nn.unbox(layer.init(jax.random.key(1), x, None, False))['params']
  # A router that prefers some experts, so that capacity overflows.
  params['router']['kernel'] = params['router']['kernel'] * 20
  return layer, params, x


def arrays(params):
  experts = params['experts']
  names = ('wi_0', 'wi_1', 'wo')
  return [params['router']['kernel'], *(experts[name]['kernel'] for name in names)]


def capacity_of(dispatch: Dispatch) -> int | None:
  return None if dispatch is Dispatch.DROPLESS else expert_capacity(T, E, 1.25)


@pytest.mark.parametrize('dispatch', list(Dispatch))
def test_values_against_loops(dispatch):
  layer, params, x = setup(dispatch)
  y, stats = layer.apply({'params': params}, x, None, True)
  weights = [np.asarray(a, np.float64) for a in arrays(params)]
  want = naive.moe(np.asarray(x, np.float64), *weights, K, capacity_of(dispatch))
  np.testing.assert_allclose(y, want, atol=2e-5)
  assert y.dtype == jnp.float32
  assert (float(stats.dropped_fraction) > 0.3) != (dispatch is Dispatch.DROPLESS)


@pytest.mark.parametrize('dispatch', list(Dispatch))
def test_gradients_against_differences_of_loops(dispatch):
  """Directional derivatives of the loops in float64, one per parameter and for the input.

  The step is small enough that no choice flips: routing is piecewise constant.
  """
  layer, params, x = setup(dispatch)
  probe = np.asarray(jax.random.normal(jax.random.key(2), x.shape), np.float64)

  def loss(params, x):
    return jnp.sum(layer.apply({'params': params}, x, None, True)[0] * probe)

  dparams, dx = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
  values = [np.asarray(a, np.float64) for a in (x, *arrays(params))]
  rng, step = np.random.default_rng(0), 1e-6
  for i, grad in enumerate([dx, *arrays(dparams)]):
    direction = rng.normal(size=grad.shape)
    ends = []
    for sign in (1, -1):
      moved = list(values)
      moved[i] = values[i] + sign * step * direction
      ends.append(np.sum(naive.moe(*moved, K, capacity_of(dispatch)) * probe))
    want = (ends[0] - ends[1]) / (2 * step)
    got = np.sum(np.asarray(grad, np.float64) * direction)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-3)


def test_dispatches_agree_where_nothing_is_dropped():
  results = []
  for dispatch in Dispatch:
    layer, params, x = setup(dispatch, capacity_factor=16.0)
    results.append(layer.apply({'params': params}, x, None, True)[0])
  for other in results[1:]:
    np.testing.assert_allclose(other, results[0], atol=1e-5)


@pytest.mark.parametrize('dispatch', list(Dispatch))
def test_ignored_padding_changes_nothing_for_the_others(dispatch):
  layer, params, x = setup(dispatch, ignore_padding=True)
  valid = jnp.arange(T) < T // 2
  valid = jnp.broadcast_to(valid, (G, T))
  x = x * valid[..., None]
  y, stats = layer.apply({'params': params}, x, valid, False)
  assert float(jnp.abs(y[:, T // 2 :]).max()) == 0.0
  noisy = jnp.where(valid[..., None], x, 3.0)
  y_noisy, noisy_stats = layer.apply({'params': params}, noisy, valid, False)
  np.testing.assert_array_equal(y[:, : T // 2], y_noisy[:, : T // 2])
  np.testing.assert_array_equal(stats.expert_load_e, noisy_stats.expert_load_e)


def test_empty_experts_get_zero_gradients():
  layer, params, x = setup(Dispatch.DROPLESS)
  kernel = jnp.zeros((D, E)).at[:, 3].set(1.0).at[:, 5].set(0.5)
  params['router']['kernel'] = kernel
  x = jnp.abs(x)  # every token chooses experts 3 and 5
  loss = lambda p: jnp.sum(layer.apply({'params': p}, x, None, True)[0] ** 2)
  grads = jax.jit(jax.grad(loss))(params)
  used = jnp.abs(grads['experts']['wo']['kernel']).sum((1, 2)) > 0
  assert used.tolist() == [e in (3, 5) for e in range(E)]
  assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_grouped_matmul_against_loops():
  rng = np.random.default_rng(0)
  expert = rng.integers(0, 5, size=(40, 1))  # of 6: the last expert is empty; 5 marks unrouted
  expert[expert == 4] = 6
  lhs = rng.normal(size=(40, 3)).astype(np.float32)
  rhs = rng.normal(size=(6, 3, 7)).astype(np.float32)
  slots, blocks = block_layout(jnp.asarray(expert, jnp.int32), 6)
  padded = np.zeros((slots.row_M.size, 3), np.float32)
  for row, slot in enumerate(np.asarray(slots.slot_Nk)[:, 0]):
    if slot < len(padded):
      padded[slot] = lhs[row]
  out = np.asarray(grouped_matmul(jnp.asarray(padded), jnp.asarray(rhs), blocks))
  for row, slot in enumerate(np.asarray(slots.slot_Nk)[:, 0]):
    if expert[row, 0] < 6:
      np.testing.assert_allclose(out[slot], lhs[row] @ rhs[expert[row, 0]], rtol=1e-5)
    else:
      assert slot == len(padded)


@pytest.mark.parametrize('shape', MESHES, ids=str)
@pytest.mark.parametrize('dispatch', list(Dispatch))
def test_sharded_equals_unsharded(dispatch, shape):
  layer, params, x = setup(dispatch)

  def loss(params, x):
    y, stats = layer.apply({'params': params}, x, None, True)
    return jnp.sum(jnp.square(y)) + stats.load_balance_loss + stats.router_z_loss, (y, stats)

  grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  want = jax.jit(grad)(params, x)
  mesh = partitioning.make_mesh(MeshConfig(shape[1], shape[2]))
  assert tuple(mesh.shape.values()) == shape
  with jax.set_mesh(mesh):
    got = jax.jit(grad)(params, jax.device_put(x, partitioning.batch_sharding(mesh)))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    b = np.asarray(b)
    np.testing.assert_allclose(np.asarray(a), b, atol=2e-5 * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize('dispatch', [Dispatch.MASK, Dispatch.SCATTER])
def test_experts_are_exchanged_by_all_to_all_alone(dispatch):
  """Forward and backward: four all-to-alls, and no token matrix gathered on any device."""
  layer, params, x = setup(dispatch)
  loss = lambda params, x: jnp.sum(layer.apply({'params': params}, x, None, True)[0] ** 2)
  mesh = partitioning.make_mesh(MeshConfig(num_expert_partitions=8))
  with jax.set_mesh(mesh):
    x = jax.device_put(x, partitioning.batch_sharding(mesh))
    spec = jax.sharding.PartitionSpec
    experts = jax.tree.map(
      lambda a: jax.device_put(a, jax.sharding.NamedSharding(mesh, spec('expert'))),
      params['experts'],
    )
    params = {**params, 'experts': experts}
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile().as_text()
  assert text.count(' all-to-all(') == 4
  assert ' all-gather(' not in text


def test_groups_must_divide_the_tokens():
  assert resolve_groups(24, 64) == 24
  with pytest.raises(ConfigError, match='group_size=64'):
    resolve_groups(100, 64)
