"""Attention experts against a loop over tokens and slots; the losses of JetMoE's routers."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe.config import Dispatch, MoEConfig
from openmoe.layers.dense import KVCache
from openmoe.layers.moe.moa import MixtureOfAttention
from openmoe.layers.moe.router import route
from openmoe.losses import router_losses
from openmoe.types import RouterStats

B, T, D, N, H, E, K = 2, 10, 12, 2, 4, 4, 2
MOE = MoEConfig(
  E, top_k=K, group_size=B * T, router_order='top_k_softmax', router_loss='sum', dispatch='dropless'
)


def setup(**changes):
  layer = MixtureOfAttention(
    dataclasses.replace(MOE, **changes), N, H, jnp.float32, nn.initializers.normal(0.5), 10000.0
  )
  x = jax.random.normal(jax.random.key(0), (B, T, D))
  mask = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
  positions = jnp.broadcast_to(jnp.arange(T), (B, T))
  args = (x, None, mask, positions, False)
  params = nn.unbox(layer.init(jax.random.key(1), *args))['params']
  params['bias'] = jax.random.normal(jax.random.key(2), (D,))
  params['router']['kernel'] *= 30
  return layer, params, args


def rotate(x, position):
  half = x.shape[-1] // 2
  angle = position / 10000.0 ** (np.arange(half) / half)
  a, b = x[..., :half], x[..., half:]
  return np.concatenate([a * np.cos(angle) - b * np.sin(angle),
                         b * np.cos(angle) + a * np.sin(angle)], -1)  # fmt: skip


def loops(params, x) -> np.ndarray:
  """Token by token, slot by slot, head by head, float64."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  x = np.asarray(x, np.float64)
  y = np.zeros_like(x)
  for b in range(B):
    key = (x[b] @ p['key']['kernel']).reshape(T, N, H)
    value = (x[b] @ p['value']['kernel']).reshape(T, N, H)
    for t in range(T):
      logits = x[b, t] @ p['router']['kernel']
      chosen = np.argsort(-logits, kind='stable')[:K]
      gates = np.exp(logits[chosen] - logits[chosen].max())
      gates /= gates.sum()
      for gate, e in zip(gates, chosen, strict=True):
        query = (x[b, t] @ p['query']['kernel'][e]).reshape(N, H)
        out = np.zeros((N, H))
        for n in range(N):
          q = rotate(query[n], t)
          scores = np.array([q @ rotate(key[s, n], s) for s in range(t + 1)]) / np.sqrt(H)
          probs = np.exp(scores - scores.max())
          out[n] = (probs / probs.sum()) @ value[: t + 1, n]
        y[b, t] += gate * (out.reshape(-1) @ p['out']['kernel'][e])
      y[b, t] += p['bias']
  return y


@pytest.mark.parametrize('dispatch', list(Dispatch))
def test_against_loops(dispatch):
  layer, params, args = setup(dispatch=dispatch, capacity_factor=9.0, eval_capacity_factor=9.0)
  y, cache, stats = jax.jit(layer.apply, static_argnums=5)({'params': params}, *args)
  assert cache is None
  assert float(stats.dropped_fraction) == 0
  np.testing.assert_allclose(y, loops(params, args[0]), atol=1e-4)


def test_cached_steps_equal_the_whole_row():
  layer, params, args = setup()
  want = layer.apply({'params': params}, *args)[0]
  x, _, mask, positions, _ = args
  cache = KVCache(jnp.zeros((B, N, H, T)), jnp.zeros((B, N, T, H)))  # not k times as many heads
  step = jax.jit(lambda *a: layer.apply({'params': params}, a[0], None, *a[1:3], False, *a[3:]))
  for t in range(T):
    at = slice(t, t + 1)
    y, cache, _ = step(x[:, at], mask[:, at], positions[:, at], cache, jnp.int32(t))
    np.testing.assert_allclose(y[:, 0], want[:, t], atol=1e-5)


def test_a_dropped_choice_gives_nothing():
  """Capacity 1 an expert: everything a token with no slot gets is the bias."""
  layer, params, args = setup(dispatch='scatter', eval_capacity_factor=1e-6, min_expert_capacity=1)
  y, _, stats = layer.apply({'params': params}, *args)
  alone = np.isclose(np.asarray(y), np.asarray(params['bias']), atol=1e-6).all(-1).sum()
  assert alone == round(float(stats.tokens_left_behind) * B * T)
  assert alone >= B * T - E


def balanced_logits(tokens: int) -> jnp.ndarray:
  """Every token prefers the next two experts in turn: uniform in the mean."""
  preferred = (np.arange(tokens)[:, None] + np.arange(K)) % E
  logits = np.zeros((1, tokens, E), np.float32)
  np.put_along_axis(logits[0], preferred, 3.0, axis=1)
  return jnp.asarray(logits)


@pytest.mark.parametrize(('reduction', 'balance'), [('sum', 1.0), ('mean', K)])
def test_balance_of_a_balanced_router(reduction, balance):
  config = dataclasses.replace(MOE, router_loss=reduction)
  stats = route(balanced_logits(64), None, config, None).stats
  np.testing.assert_allclose(stats.load_balance_loss, balance, rtol=1e-6)
  np.testing.assert_allclose(stats.expert_load_e, np.full(E, 1 / E), rtol=1e-6)
  worst = route(jnp.zeros((1, 64, E)).at[..., :K].set(9.0), None, config, None).stats
  assert float(worst.load_balance_loss) > 1.9 * balance


def test_losses_of_all_routers_are_summed():
  config = dataclasses.replace(MOE, load_balance_weight=0.01, router_z_weight=0.001)
  ones, zero = jnp.ones(48), jnp.zeros(48)
  stats = RouterStats(ones, 2 * ones, *([zero] * 5))
  losses = router_losses(stats, config)
  np.testing.assert_allclose(losses['load_balance_loss'], 0.48, rtol=1e-6)
  np.testing.assert_allclose(losses['router_z_loss'], 0.096, rtol=1e-6)
  averaged = router_losses(stats, dataclasses.replace(config, router_loss='mean'))
  np.testing.assert_allclose(averaged['load_balance_loss'], 0.01, rtol=1e-6)
