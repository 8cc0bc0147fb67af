"""Multi-head causal self-attention of OpenMoE, with an optional key-value cache.

There is no 1/sqrt(head_dim) at run time: the released models fold it into the query initialiser.
heads * head_dim is free of embed_dim (3072 against 2048 in the 8B).
"""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.layers.mlp import Kernel
from openmoe.layers.rotary import apply_rotary, rotary_tables
from openmoe.types import Array

MASKED = -1e10  # the original's bias; a row with no allowed key becomes uniform, not NaN


@flax.struct.dataclass
class KVCache:
  """Rotated keys and values of one attention layer, both [b, s, n, h]."""

  key: Array
  value: Array


def init_cache(batch: int, length: int, heads: int, head_dim: int, dtype: jnp.dtype) -> KVCache:
  zeros = jnp.zeros((batch, length, heads, head_dim), dtype)
  return KVCache(key=zeros, value=zeros)


def write_cache(cache: KVCache, key_btnh: Array, value_btnh: Array, slot_b: Array) -> KVCache:
  """Stores t new entries per row, beginning at slot_b [b] of that row."""
  write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at, 0, 0)))
  return KVCache(
    key=write(cache.key, key_btnh.astype(cache.key.dtype), slot_b),
    value=write(cache.value, value_btnh.astype(cache.value.dtype), slot_b),
  )


def attend(
  query_btnh: Array, key_bsnh: Array, value_bsnh: Array, mask_bts: Array, probs_dropout
) -> Array:
  """softmax(q k + bias) v, [b, t, n, h]; logits and softmax in the dtype of the query.

  Args:
    mask_bts: bool, True where the query may look.
    probs_dropout: applied to the [b, n, t, s] probabilities.
  """
  logits_bnts = jnp.einsum('btnh,bsnh->bnts', query_btnh, key_bsnh)
  bias = jnp.where(mask_bts[:, None], 0.0, MASKED).astype(logits_bnts.dtype)
  probs_bnts = probs_dropout(jax.nn.softmax(logits_bnts + bias, axis=-1))
  return jnp.einsum('bnts,bsnh->btnh', probs_bnts.astype(value_bsnh.dtype), value_bsnh)


class Attention(nn.Module):
  """Causal self-attention with rotary positions; kernels stored 2-D, column = head * h + dim."""

  num_heads: int
  head_dim: int
  dtype: jnp.dtype
  init_scale: float
  rope_theta: float
  float32_logits: bool = False
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(
    self,
    x_btd: Array,
    mask_bts: Array,
    positions_bt: Array,
    train: bool,
    cache: KVCache | None = None,
    cache_slot_b: Array | None = None,
  ) -> tuple[Array, KVCache | None]:
    """[b, t, d] -> [b, t, d] and the updated cache.

    With a cache the keys are the cache's s slots and mask_bts covers them; new entries go to
    cache_slot_b. Without one the keys are this call's own (s = t).
    """
    d, n, h = x_btd.shape[-1], self.num_heads, self.head_dim
    x_btd = x_btd.astype(self.dtype)
    query = self._heads('query', x_btd, self._query_init())
    key = self._heads('key', x_btd, self._init())
    value = self._heads('value', x_btd, self._init())
    sin, cos = rotary_tables(positions_bt, h, self.rope_theta, self.dtype)
    query, key = apply_rotary(query, sin, cos), apply_rotary(key, sin, cos)
    if cache is not None:
      cache = write_cache(cache, key, value, cache_slot_b)
      key, value = cache.key.astype(self.dtype), cache.value.astype(self.dtype)
    if self.float32_logits:
      query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    # One mask for all query positions, as in the original: broadcast over the query axis.
    dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,), deterministic=not train)
    out_btnh = attend(query, key, value, mask_bts, dropout)
    out = Kernel((n * h, d), ('heads', 'embed'), self._init(), name='out')()
    y_btd = out_btnh.reshape(*x_btd.shape[:2], n * h) @ out.astype(self.dtype)
    return y_btd, cache

  def _heads(self, name: str, x_btd: Array, init) -> Array:
    n, h = self.num_heads, self.head_dim
    kernel = Kernel((x_btd.shape[-1], n * h), ('embed', 'heads'), init, name=name)()
    y = (x_btd @ kernel.astype(self.dtype)).reshape(*x_btd.shape[:2], n, h)
    return partitioning.shard(y, ('act_batch', 'act_length', 'act_heads', None))

  def _init(self):
    return nn.initializers.variance_scaling(self.init_scale, 'fan_in', 'normal')

  def _query_init(self):
    # The original divides by sqrt(h) rounded to the activation dtype (11.3125 for h = 128).
    depth = jnp.sqrt(self.head_dim).astype(self.dtype).astype(jnp.float32)
    return lambda *args: self._init()(*args) / depth
