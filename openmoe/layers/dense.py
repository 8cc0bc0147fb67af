"""What every decoder has: norm, embedding, rotary positions, attention, gated MLP.

OpenMoE's are kept exactly, quirks included, for its checkpoints (docs/PARITY.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.types import Array

ATTENTION_BLOCK = 128  # queries; smaller products are slower than what they save
MASKED = -1e10  # the original's bias; a row with no allowed key becomes uniform, not NaN


class Kernel(nn.Module):
  """A float32 parameter named `kernel` with its logical axes; the caller casts and multiplies."""

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  init: nn.initializers.Initializer

  @nn.compact
  def __call__(self) -> Array:
    init = nn.with_logical_partitioning(self.init, self.axes)
    return self.param('kernel', init, self.shape, jnp.float32)


class RMSNorm(nn.Module):
  """y = x / rms(x) * scale over the last axis; no mean, no bias, scale initialised to one.

  The cast order is the released models': statistics in float32, the normalised value cast to
  `dtype`, then multiplied by the scale cast to `dtype` (flaxformer layer_norm.py).
  """

  dtype: jnp.dtype
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[..., d] -> [..., d] in dtype."""
    init = nn.with_logical_partitioning(nn.initializers.ones, ('embed',))
    scale_d = self.param('scale', init, (x.shape[-1],), jnp.float32)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))  # bf16 squares lose small components
    mean_square = jnp.mean(jax.lax.square(x), axis=-1, keepdims=True)
    y = (x * jax.lax.rsqrt(mean_square + self.epsilon)).astype(self.dtype)
    return y * scale_d.astype(self.dtype)


def lookup(table_vd: Array, tokens_bt: Array) -> Array:
  """Rows of a table that may be split over the mesh, [b, t, d].

  Each device looks up the tokens whose rows it holds and the pieces are summed, so neither a
  one-hot of the vocabulary nor a gathered table ever exists.
  """

  def local(table: Array, tokens: Array) -> Array:
    index = tokens - partitioning.shard_index('vocab') * table.shape[0]
    here = (index >= 0) & (index < table.shape[0])
    rows = jnp.take(table, jnp.where(here, index, 0), axis=0)
    return partitioning.all_reduce(jnp.where(here[..., None], rows, 0), 'vocab')

  if hasattr(table_vd, 'rows'):
    return table_vd.rows(tokens_bt)  # a form of inference
  rows = ('act_batch', 'act_length')
  return partitioning.per_shard(local, (('vocab', None), rows), (*rows, None), table_vd, tokens_bt)


class Embed(nn.Module):
  """Unscaled embedding, normal, returned in `dtype`. `table_vd` is float32, for tied outputs."""

  vocab_size: int
  embed_dim: int
  dtype: jnp.dtype
  init_std: float = 1.0

  def setup(self):
    init = nn.with_logical_partitioning(nn.initializers.normal(self.init_std), ('vocab', 'embed'))
    shape = (self.vocab_size, self.embed_dim)
    self.table_vd = self.param('embedding', init, shape, jnp.float32)

  def __call__(self, tokens_bt: Array) -> Array:
    """int32 [b, t] -> [b, t, d]."""
    return lookup(self.table_vd.astype(self.dtype), tokens_bt).astype(self.dtype)


def rotary_tables(
  positions_bt: Array, head_dim: int, theta: float, dtype: jnp.dtype
) -> tuple[Array, Array]:
  """sin and cos [b, t, 1, h]; angles in float32, because bf16 cannot tell positions above 256."""
  wide = jnp.promote_types(dtype, jnp.float32)
  inv_freq = theta ** (-jnp.arange(0, head_dim, 2, dtype=wide) / head_dim)
  angles = positions_bt[..., None].astype(wide) * inv_freq
  angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
  return jnp.sin(angles).astype(dtype), jnp.cos(angles).astype(dtype)


def apply_rotary(x_btnh: Array, sin: Array, cos: Array) -> Array:
  """x * cos + rotate_half(x) * sin, half-split as in GPT-NeoX, in x's dtype."""
  first, second = jnp.split(x_btnh, 2, axis=-1)
  rotated = jnp.concatenate([-second, first], axis=-1)
  return x_btnh * cos + rotated * sin


def packed_mask(segment_ids_bt: Array, real_bt: Array) -> Array:
  """bool [b, t, s]: causal, inside one segment, real tokens only. Prefixes are causal too."""
  t = segment_ids_bt.shape[1]
  causal_ts = jnp.tril(jnp.ones((t, t), bool))
  same_bts = segment_ids_bt[:, :, None] == segment_ids_bt[:, None, :]
  return causal_ts & same_bts & real_bt[:, :, None] & real_bt[:, None, :]


@flax.struct.dataclass
class KVCache:
  """Rotated keys [b, n, h, s] and values [b, n, s, h] of a layer, as the products want them."""

  key: Array
  value: Array

  @classmethod
  def of(cls, key_bsnh: Array, value_bsnh: Array) -> KVCache:
    return cls(key=key_bsnh.transpose(0, 2, 3, 1), value=value_bsnh.transpose(0, 2, 1, 3))

  def written(self, new: KVCache, slot: Array | int) -> KVCache:
    """The cache with new entries from one slot on, the same in every row: an update in place."""
    write = jax.lax.dynamic_update_slice_in_dim
    key = write(self.key, new.key.astype(self.key.dtype), slot, axis=3)
    return KVCache(key, write(self.value, new.value.astype(self.value.dtype), slot, axis=2))


def attend(
  query_btknh: Array,
  keys: KVCache,
  mask_bts: Array,
  softmax_dtype: jnp.dtype,
  scale: float = 1.0,
  probs_dropout: Callable[[Array], Array] = lambda probs: probs,
) -> Array:
  """softmax(scale q k + bias) v against the first s keys, [b, t, k, n, h].

  Args:
    query_btknh: k queries a token and head; its dtype is that of the products.
    mask_bts: bool, True where the query may look; its last side says how many keys there are.
    softmax_dtype: of bias and softmax.
    probs_dropout: applied to the probabilities [b, n, t, k, s].
  """
  b, t, k, n, h = query_btknh.shape
  s = mask_bts.shape[-1]
  key, value = keys.key[..., :s], keys.value[:, :, :s]
  query_bnQh = query_btknh.transpose(0, 3, 1, 2, 4).reshape(b, n, t * k, h)
  logits_bnQs = jnp.einsum('bnqh,bnhs->bnqs', query_bnQh, key.astype(query_btknh.dtype)) * scale
  logits_bntks = logits_bnQs.reshape(b, n, t, k, s).astype(softmax_dtype)
  bias = jnp.where(mask_bts[:, None, :, None], 0.0, MASKED).astype(softmax_dtype)
  probs_bntks = probs_dropout(jax.nn.softmax(logits_bntks + bias, axis=-1))
  probs_bnQs = probs_bntks.reshape(b, n, t * k, s).astype(value.dtype)
  out_bnQh = jnp.einsum('bnqs,bnsh->bnqh', probs_bnQs, value)
  return out_bnQh.reshape(b, n, t, k, h).transpose(0, 2, 3, 1, 4)


def attend_packed(
  query_btknh: Array, keys: KVCache, mask_bts: Array, softmax_dtype: jnp.dtype, scale: float = 1.0
) -> Array:
  """`attend` of whole rows to themselves under a causal mask; [t, s] is never held.

  At most eight blocks of queries, each against the keys up to its own end: nearly half of the work
  falls away. The backward pass computes a block again, so no probabilities are kept.
  """
  t = query_btknh.shape[1]
  size = max(ATTENTION_BLOCK, -(-t // 8))
  look = jax.checkpoint(lambda *args: attend(*args, softmax_dtype, scale), prevent_cse=False)
  if t <= size:
    return look(query_btknh, keys, mask_bts)
  blocks = [slice(start, min(start + size, t)) for start in range(0, t, size)]
  outs = [look(query_btknh[:, i], keys, mask_bts[:, i, : i.stop]) for i in blocks]
  # A query that may look nowhere weighs all keys alike: the values' mean, and softmax's gradient.
  mean_bn1v = keys.value.mean(2, keepdims=True)
  apart_bnsv = jax.lax.stop_gradient(keys.value - mean_bn1v)
  slope_bnhv = jnp.einsum('bnhs,bnsv->bnhv', keys.key, apart_bnsv) * (scale / t)
  change = jnp.einsum('btknh,bnhv->btknv', query_btknh, slope_bnhv.astype(query_btknh.dtype))
  mean = mean_bn1v.transpose(0, 2, 1, 3)[:, :, None] + change - jax.lax.stop_gradient(change)
  sees = mask_bts.any(-1)[:, :, None, None, None]
  return jnp.where(sees, jnp.concatenate(outs, axis=1), mean.astype(outs[0].dtype))


class Attention(nn.Module):
  """Causal self-attention of OpenMoE; kernels stored 2-D, column = head * h + dim.

  There is no 1/sqrt(head_dim) at run time: the released models fold it into the query initialiser.
  heads * head_dim is free of embed_dim (3072 against 2048 in the 8B).
  """

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
    keys = KVCache.of(key, value)
    if cache is not None:
      keys = cache = cache.written(keys, cache_slot)
    look = attend_packed
    if cache is not None or (train and self.dropout_rate):
      # One mask for all query positions, as in the original.
      dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(2,), deterministic=not train)
      look = functools.partial(attend, probs_dropout=dropout)
    out = look(query[:, :, None], keys, mask_bts, query.dtype)
    out_kernel = Kernel((n * h, d), ('heads', 'embed'), self._init(), name='out')()
    return out.reshape(*x_btd.shape[:2], n * h) @ out_kernel.astype(self.dtype), cache

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


def double_swiglu(gate: Array, linear: Array) -> Array:
  """(a * silu(b)) * linear, with a, b = gate[..., 0, :], gate[..., 1, :]; [..., 2, f] -> [..., f].

  A plain SwiGLU has one gate; the released models have this one (flaxformer dense.py, activations
  'swiglu' and 'linear'). Mending it would orphan every checkpoint.
  """
  return gate[..., 0, :] * nn.silu(gate[..., 1, :]) * linear


class Gating(NamedTuple):
  """A gated MLP's hidden layer."""

  activation: Callable[[Array, Array | None], Array]  # (gate [..., 2, f], linear) -> [..., f]
  has_linear: bool  # whether there is a kernel wi_1 for the linear factor [..., f]


DOUBLE_SWIGLU = Gating(double_swiglu, has_linear=True)


class Mlp(nn.Module):
  """Dense MLP with double-width wi_0; no biases. Returns `dtype`.

  wi_0 is stored [d, 2, f] (the original: [d, 2f], halves side by side), so that splitting f over
  the model axis leaves both halves of a unit on one device.
  """

  mlp_dim: int
  dtype: jnp.dtype
  init_scale: float
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(self, x_btd: Array, train: bool) -> Array:
    """[b, t, d] -> [b, t, d]."""
    d, f = x_btd.shape[-1], self.mlp_dim
    init = functools.partial(
      nn.initializers.variance_scaling, self.init_scale, 'fan_in', 'truncated_normal', in_axis=0
    )
    kernel = lambda name, *args: Kernel(*args, name=name)().astype(self.dtype)
    wi_0_duf = kernel('wi_0', (d, 2, f), ('embed', 'gate', 'mlp'), init(out_axis=(1, 2)))
    wi_1_df = kernel('wi_1', (d, f), ('embed', 'mlp'), init(out_axis=1))
    wo_fd = kernel('wo', (f, d), ('mlp', 'embed'), init(out_axis=1))
    x_btd = x_btd.astype(self.dtype)
    itself = hasattr(wi_0_duf, 'batched')  # a form of inference, which knows how to multiply
    gate = x_btd @ wi_0_duf if itself else jnp.einsum('btd,duf->btuf', x_btd, wi_0_duf)
    h_btf = double_swiglu(gate, x_btd @ wi_1_df)
    h_btf = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(h_btf, deterministic=not train)
    h_btf = partitioning.shard(h_btf, ('act_batch', 'act_length', 'act_mlp'))
    return h_btf @ wo_fd
