"""Mixture of attention heads (JetMoE): experts hold query and output projections.

A router picks k experts for a token. Each makes queries of its own, all attend to one shared set of
keys and values, and the same expert projects its attention output; gates come after that. So a
token has k x n query heads, slot-major, and head j of every slot meets key-value head j.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.config import MoEConfig
from openmoe.layers.attention import MASKED, KVCache, attend_cached, write_cache
from openmoe.layers.mlp import Kernel
from openmoe.layers.moe.exchange import gathered, scattered, through_experts
from openmoe.layers.moe.experts import ExpertKernel, Stack, times
from openmoe.layers.moe.grouped.api import Segments, choose_kernel, grouped_matmul
from openmoe.layers.moe.layer import output_bias, route_groups
from openmoe.layers.rotary import apply_rotary, rotary_tables
from openmoe.types import Array, RouterStats


def attend_slots(
  query_btknh: Array, key_bsnh: Array, value_bsnh: Array, mask_bts: Array, probs_dropout
) -> Array:
  """softmax(q k / sqrt(h) + bias) v for the heads of all slots, [b, t, k, n, h].

  Keys and values are broadcast over the slots by the einsum; the original tiles them k times.
  Softmax in float32: as its eager attention has it.
  """
  scale = query_btknh.shape[-1] ** -0.5
  logits_bknts = jnp.einsum('btknh,bsnh->bknts', query_btknh, key_bsnh) * scale
  bias_bts = jnp.where(mask_bts, 0.0, MASKED)[:, None, None]
  probs_bknts = jax.nn.softmax(logits_bknts.astype(jnp.float32) + bias_bts, axis=-1)
  probs_bknts = probs_dropout(probs_bknts).astype(value_bsnh.dtype)
  return jnp.einsum('bknts,bsnh->btknh', probs_bknts, value_bsnh)


def _grouped(rows: Array, kernel_eio: Stack, segments: Segments | None) -> Array:
  if segments is None:
    return times(rows, kernel_eio)
  return grouped_matmul(rows, kernel_eio, segments)


def _queries(kernel_edh: Stack, rows: Array, segments: Segments | None) -> Array:
  """Whole embeddings in, this model shard's heads out."""
  return _grouped(gathered(rows), kernel_edh, segments)


def _outputs(kernel_ehd: Stack, rows: Array, segments: Segments | None) -> Array:
  """This model shard's heads in, its slice of the embedding out."""
  return scattered(_grouped(rows, kernel_ehd, segments))


class MixtureOfAttention(nn.Module):
  """Causal self-attention whose query and output projections are routed; keys and values are not.

  A dropped choice asks nothing and gives nothing: its query and its output are 0.

  Attributes:
    num_heads: key-value heads, and query heads of one expert.
    kernel_init: of all kernels.
  """

  config: MoEConfig
  num_heads: int
  head_dim: int
  dtype: jnp.dtype
  kernel_init: Callable
  rope_theta: float
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(
    self,
    x_btd: Array,
    valid_bt: Array | None,
    mask_bts: Array,
    positions_bt: Array,
    train: bool,
    cache: KVCache | None = None,
    cache_slot: Array | int | None = None,
  ) -> tuple[Array, KVCache | None, RouterStats]:
    """[b, t, d] -> float32 [b, t, d], the updated cache and the router's statistics.

    The cache holds n key-value heads, whatever k is. Arguments as of attention.Attention.
    """
    b, t, d = x_btd.shape
    k, n, h = self.config.top_k, self.num_heads, self.head_dim
    x_gtd, routing, capacity = route_groups(x_btd, valid_bt, self.config, train)
    moved = {
      'routing': routing,
      'config': self.config,
      'capacity': capacity,
      'kernel': choose_kernel(self.dtype, d, n * h),
    }
    embed_axes = ('act_group', None, 'act_embed_slice')
    heads_axes = ('act_group', None, None, 'act_heads')

    query_gtkh = through_experts(
      _queries,
      x_gtd.astype(self.dtype),
      self._expert_kernel('query', (d, n * h), ('embed', 'heads')),
      in_axes=embed_axes,
      weight_axes=('expert', None, 'heads'),
      out_axes=heads_axes,
      combine=False,
      **moved,
    )
    query = self._placed(query_gtkh.reshape(b, t, k, n, h))
    key, value = (self._shared_heads(name, x_btd) for name in ('key', 'value'))
    sin, cos = rotary_tables(positions_bt, h, self.rope_theta, self.dtype)
    query, key = apply_rotary(query, sin[:, :, None], cos[:, :, None]), apply_rotary(key, sin, cos)
    if cache is not None:
      cache = write_cache(cache, key, value, cache_slot)
      out_btknh = attend_cached(query, cache, mask_bts, jnp.float32, h**-0.5)
    else:
      dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,), deterministic=not train)
      out_btknh = attend_slots(query, key, value, mask_bts, dropout)

    y_gtd = through_experts(
      _outputs,
      out_btknh.reshape(*x_gtd.shape[:2], k, n * h),
      self._expert_kernel('out', (n * h, d), ('heads', 'embed')),
      in_axes=heads_axes,
      weight_axes=('expert', 'heads', None),
      out_axes=embed_axes,
      combine=True,
      **moved,
    )
    return y_gtd.reshape(b, t, d) + output_bias(self, d), cache, routing.stats

  def _expert_kernel(self, name: str, shape: tuple[int, int], axes: tuple[str, str]) -> Stack:
    shape, axes = (self.config.num_experts, *shape), ('expert', *axes)
    return ExpertKernel(shape, axes, self.kernel_init, name=name)().astype(self.dtype)

  def _shared_heads(self, name: str, x_btd: Array) -> Array:
    n, h = self.num_heads, self.head_dim
    kernel = Kernel((x_btd.shape[-1], n * h), ('embed', 'heads'), self.kernel_init, name=name)()
    y = x_btd.astype(self.dtype) @ kernel.astype(self.dtype)
    return self._placed(y.reshape(*x_btd.shape[:2], n, h))

  def _placed(self, heads: Array) -> Array:
    middle = (None,) * (heads.ndim - 4)
    axes = ('act_batch', 'act_length', *middle, 'act_heads', None)
    return partitioning.shard(heads, axes)
