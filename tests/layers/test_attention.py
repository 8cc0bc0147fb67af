"""Attention in blocks of queries is the attention that holds everything at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe.layers import dense
from openmoe.layers.dense import KVCache, attend, attend_packed, packed_mask

B, T, N, H, SCALE = 2, 70, 3, 8, 0.7


def _inputs(k: int, dtype: str):
  """Two packed rows: one with padding at its end, one with a hole, so that queries see nothing."""
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = (B, T, k, N, H), (B, T, N, H), (B, T, N, H), (B, T, k, N, H)
  q, key, value, g = (jax.random.normal(*a, dtype) for a in zip(keys, shapes, strict=True))
  segments = jnp.repeat(jnp.array([[1, 2], [1, 1]]), T // 2, 1)
  real = jnp.ones((B, T), bool).at[0, 60:].set(False).at[1, 5].set(False)
  return (q, key, value), packed_mask(segments, real), g


def _results(look, inputs, mask, g):
  def loss(q, key, value):
    out = look(q, KVCache.of(key, value), mask, q.dtype, SCALE)
    return jnp.sum((out * g).astype(jnp.float32)), out

  (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*inputs)
  return out, *grads


@pytest.mark.parametrize('block', [16, 35, 128])
@pytest.mark.parametrize(('k', 'dtype', 'atol'), [(1, 'float32', 1e-5), (2, 'float32', 1e-5)])
def test_blocks_give_values_and_gradients_of_the_whole(monkeypatch, k, dtype, atol, block):
  monkeypatch.setattr(dense, 'ATTENTION_BLOCK', block)
  inputs, mask, g = _inputs(k, dtype)
  wanted, found = (_results(f, inputs, mask, g) for f in (attend, attend_packed))
  for a, b in zip(wanted, found, strict=True):
    np.testing.assert_allclose(a, b, atol=atol)
  blind = ~np.asarray(mask.any(-1))
  assert blind[0, 60:].all() and blind.sum() == 11
  # Their gradients are not zero in the original either.
  assert np.abs(np.asarray(wanted[1])[blind]).max() > 1e-3


def test_bfloat16_rounds_as_the_whole_does(monkeypatch):
  monkeypatch.setattr(dense, 'ATTENTION_BLOCK', 16)
  inputs, mask, g = _inputs(1, 'bfloat16')
  wanted, found = (_results(f, inputs, mask, g)[0] for f in (attend, attend_packed))
  np.testing.assert_array_less(np.abs(np.float32(wanted - found)), 0.02)


def test_no_length_by_length_array_outlives_its_block():
  """The compiler's own count: a quarter and less of what the whole needs."""
  b, t, n, h = 1, 1024, 4, 16
  mask = packed_mask(jnp.ones((b, t), int), jnp.ones((b, t), bool))

  def temporaries(look) -> int:
    def loss(q, key, value):
      return look(q[:, :, None], KVCache.of(key, value), mask, jnp.float32).sum()

    shape = jax.ShapeDtypeStruct((b, t, n, h), jnp.float32)
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporaries(attend_packed) < temporaries(attend) / 2
