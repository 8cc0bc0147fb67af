"""Upcycled models compute what the dense one computed, whatever the gates, and learn from there."""

import dataclasses

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convert.upcycle import dense_config, logit_difference, upcycle
from openmoe.config import ConfigError, ModelConfig, MoEConfig
from openmoe.models import abstract_params, build_model, empty_batch
from openmoe.train_step import loss_fn
from openmoe.types import Batch

V, T = 48, 16
OPENMOE = ModelConfig(
  'up', V, 4, 16, 24, 2, 4, 2, MoEConfig(4, group_size=2 * T), dtype='float32', init_scale=1.0
)
JETMOE = ModelConfig(
  'up', V, 2, 16, 24, 2, 4, 2,
  MoEConfig(4, group_size=2 * T, dispatch='dropless', router_order='top_k_softmax',
            router_loss='sum', router_init_std=0.5),
  dtype='float32', architecture='jetmoe', init_std=0.2,
)  # fmt: skip


def dense_params(config: ModelConfig):
  params = nn.unbox(
    build_model(dense_config(config)).init(jax.random.key(0), empty_batch(1, 8), False)
  )['params']
  # Norms and biases as training leaves them: not 1 and 0.
  keys = iter(jax.random.split(jax.random.key(1), 100))
  return jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape) if x.ndim < 4 else x, params
  )


@pytest.mark.parametrize('config', [OPENMOE, JETMOE], ids=['openmoe', 'jetmoe'])
def test_logits_stay(config):
  dense = dense_params(config)
  params = upcycle(dense, config, seed=0)
  assert logit_difference(dense, params, config) <= 1e-5
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  experts = next(x for path, x in flat.items() if path.endswith('moe/experts/wi_0/kernel'))
  assert np.asarray(experts).std() > 0.05
  np.testing.assert_array_equal(experts[:, 0], experts[:, 3])
  routers = [x for path, x in flat.items() if path.endswith('router/kernel')]
  assert all(np.asarray(x).std() > 0 for x in routers)


def test_noise_sets_copies_apart_and_openmoe_stays_exact():
  dense = dense_params(OPENMOE)
  params = upcycle(dense, OPENMOE, seed=0, noise=0.2)
  assert logit_difference(dense, params, OPENMOE) <= 1e-5
  wi_0 = params['decoder']['sparse']['moe']['experts']['wi_0']['kernel']
  relative = np.std(wi_0[:, 0] - wi_0[:, 1]) / np.std(wi_0[:, 0])
  assert 0.2 < relative < 0.35  # sqrt(2) * 0.2
  dense = dense_params(JETMOE)
  assert logit_difference(dense, upcycle(dense, JETMOE, 0, noise=0.2), JETMOE) > 1e-3


def test_openmoe_is_exact_with_drops_too():
  """The mixture adds 0, so capacity cannot hurt: the training path with the released factor."""
  dense = dense_params(OPENMOE)
  tokens = np.random.default_rng(0).integers(1, V, (2, T)).astype(np.int32)
  positions = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
  ones = np.ones_like(tokens)
  batch = Batch(*map(jnp.asarray, (tokens, tokens, ones * 1.0, ones, positions)))
  out = build_model(OPENMOE).apply({'params': upcycle(dense, OPENMOE, 0)}, batch, True)
  assert float(out.router_stats.dropped_fraction.max()) > 0.1
  want = build_model(dense_config(OPENMOE)).apply({'params': dense}, batch, True)
  np.testing.assert_allclose(out.logits(), want.logits(), atol=1e-5)


@pytest.mark.parametrize('config', [OPENMOE, JETMOE], ids=['openmoe', 'jetmoe'])
def test_the_loss_falls_from_there(config):
  params = jax.tree.map(jnp.asarray, upcycle(dense_params(config), config, seed=0))
  tokens = np.random.default_rng(0).integers(1, V, (2, T)).astype(np.int32)
  positions = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
  ones = np.ones_like(tokens)
  inputs = np.pad(tokens[:, :-1], ((0, 0), (1, 0)))
  batch = Batch(*map(jnp.asarray, (inputs, tokens, ones * 1.0, ones, positions)))
  model, optimizer = build_model(config), optax.adam(3e-3)

  @jax.jit
  def step(params, state):
    args = (batch, jnp.float32(tokens.size), jax.random.key(0), model, config, True)
    (value, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, *args)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  state, losses, start = optimizer.init(params), [], params
  for _ in range(12):
    params, state, value = step(params, state)
    losses.append(float(value))
  assert losses[-1] < losses[0] - 0.3
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, start)
  assert all(x > 0 for x in jax.tree.leaves(moved)), moved  # routers and zero kernels as well


def test_another_size_is_refused():
  wrong = dense_params(dataclasses.replace(OPENMOE, mlp_dim=32))
  with pytest.raises(ConfigError, match=r'wi_0/kernel is .* in the dense checkpoint'):
    upcycle(wrong, OPENMOE, 0)
  with pytest.raises(ConfigError, match='has no experts'):
    dense_config(dense_config(OPENMOE))


@pytest.mark.parametrize('config', [OPENMOE, JETMOE], ids=['openmoe', 'jetmoe'])
def test_a_bias_of_choices_begins_at_zero(config):
  moe = dataclasses.replace(config.moe, balance_loss='loss_free')
  config = dataclasses.replace(config, moe=moe)
  shapes = lambda tree: {
    path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(tree, sep='/').items()
  }
  dense = jax.tree.map(lambda x: np.ones(x.shape), abstract_params(dense_config(config))[0])
  params = upcycle(dense, config, seed=0)
  assert shapes(params) == shapes(abstract_params(config)[0])
  biases = [
    x
    for path, x in flax.traverse_util.flatten_dict(params, sep='/').items()
    if path.endswith('router/bias')
  ]
  assert biases and not any(x.any() for x in biases)
