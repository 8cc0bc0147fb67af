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
  """Rotated keys [b, n, h, s] and values [b, n, s, h] of one attention layer.

  The order in which the products want them: a step of decoding then reads the cache where it lies
  (docs/LOG.md).
  """

  key: Array
  value: Array


def init_cache(batch: int, length: int, heads: int, head_dim: int, dtype: jnp.dtype) -> KVCache:
  """An empty cache of `length` slots a row."""

  def zeros(*sides: int) -> Array:
    axes = ('act_batch', 'act_heads', None, None)
    return partitioning.shard(jnp.zeros((batch, heads, *sides), dtype), axes)

  return KVCache(key=zeros(head_dim, length), value=zeros(length, head_dim))


def write_cache(cache: KVCache, key_btnh: Array, value_btnh: Array, slot: Array | int) -> KVCache:
  """Stores t new entries in every row, beginning at the same slot of all.

  One slot for all, because then the cache is updated in place; a slot of its own for every row
  would be a scatter.
  """

  def write(old: Array, new: Array, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slot, axis)

  return KVCache(
    key=write(cache.key, key_btnh.transpose(0, 2, 3, 1), axis=3),
    value=write(cache.value, value_btnh.transpose(0, 2, 1, 3), axis=2),
  )


def attend_cached(
  query_btknh: Array, cache: KVCache, mask_bts: Array, softmax_dtype: jnp.dtype, scale: float = 1.0
) -> Array:
  """softmax(scale q k + bias) v against the first s slots of a cache, [b, t, k, n, h].

  Args:
    query_btknh: k queries a token and head; its dtype is that of the products.
    mask_bts: bool, True where the query may look; its last side says how many slots there are.
    softmax_dtype: of bias and softmax.
  """
  b, t, k, n, h = query_btknh.shape
  slots = mask_bts.shape[-1]
  key, value = cache.key[..., :slots], cache.value[:, :, :slots]
  query_bnqh = query_btknh.transpose(0, 3, 1, 2, 4).reshape(b, n, t * k, h)
  logits_bnqs = jnp.einsum('bnqh,bnhs->bnqs', query_bnqh, key.astype(query_btknh.dtype)) * scale
  logits_bntks = logits_bnqs.reshape(b, n, t, k, slots).astype(softmax_dtype)
  bias = jnp.where(mask_bts[:, None, :, None], 0.0, MASKED).astype(softmax_dtype)
  probs_bnqs = jax.nn.softmax(logits_bntks + bias, axis=-1).reshape(b, n, t * k, slots)
  out_bnqh = jnp.einsum('bnqs,bnsh->bnqh', probs_bnqs.astype(value.dtype), value)
  return out_bnqh.reshape(b, n, t, k, h).transpose(0, 2, 3, 1, 4)


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
    cache_slot: Array | int | None = None,
  ) -> tuple[Array, KVCache | None]:
    """[b, t, d] -> [b, t, d] and the updated cache.

    With a cache the keys are its first s slots, which mask_bts covers; new entries go to cache_slot
    and behind it, in every row. Without one the keys are this call's own (s = t).
    """
    d, n, h = x_btd.shape[-1], self.num_heads, self.head_dim
    x_btd = x_btd.astype(self.dtype)
    query = self._heads('query', x_btd, self._query_init())
    key = self._heads('key', x_btd, self._init())
    value = self._heads('value', x_btd, self._init())
    sin, cos = rotary_tables(positions_bt, h, self.rope_theta, self.dtype)
    query, key = apply_rotary(query, sin, cos), apply_rotary(key, sin, cos)
    if self.float32_logits:
      query = query.astype(jnp.float32)
    if cache is not None:
      cache = write_cache(cache, key, value, cache_slot)
      out_btnh = attend_cached(query[:, :, None], cache, mask_bts, query.dtype)[:, :, 0]
    else:
      # One mask for all query positions, as in the original: broadcast over the query axis.
      dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,), deterministic=not train)
      out_btnh = attend(query, key.astype(query.dtype), value, mask_bts, dropout)
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
