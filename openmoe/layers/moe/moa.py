"""Mixture of attention heads (JetMoE): experts hold query and output projections.

A router picks k experts for a token. Each makes queries of its own, all attend to one shared set of
keys and values, and the same expert projects its attention output; gates come after that. So a
token has k x n query heads, slot-major, and head j of every slot meets key-value head j.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.config import MoEConfig
from openmoe.layers.dense import (
  Kernel,
  KVCache,
  apply_rotary,
  attend,
  attend_packed,
  rotary_tables,
)
from openmoe.layers.moe.exchange import through_experts, times
from openmoe.layers.moe.layer import ExpertKernel, make_plan, output_bias, route_groups
from openmoe.types import Array, RouterStats


def _project(kernel_eIO: Array, rows: Array, segments) -> Array:
  """One device's part of a projection; see exchange.Compute."""
  return times(rows, kernel_eIO, segments)


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
  run_experts: Callable[..., Array] = through_experts

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

    The cache holds n key-value heads, whatever k is. Arguments as of dense.Attention.
    """
    b, t, d = x_btd.shape
    k, n, h = self.config.top_k, self.num_heads, self.head_dim
    x_gtd, routing = route_groups(x_btd, valid_bt, self.config, train)
    embed_axes = ('act_group', None, 'act_embed_slice')
    heads_axes = ('act_group', None, None, 'act_heads')

    query_eIO = self._expert_kernel('query', (d, n * h), ('embed', 'heads'))
    query_axes = ('expert', None, 'heads')
    asks = make_plan(
      self.config.dispatch,
      query_eIO,
      query_axes,
      in_axes=embed_axes,
      weight_axes=query_axes,
      out_axes=heads_axes,
      combine=False,
    )
    query_gtkO = self.run_experts(_project, x_gtd.astype(self.dtype), query_eIO, routing, asks)
    query = self._placed(query_gtkO.reshape(b, t, k, n, h))
    key, value = (self._shared_heads(name, x_btd) for name in ('key', 'value'))
    sin, cos = rotary_tables(positions_bt, h, self.rope_theta, self.dtype)
    query, key = apply_rotary(query, sin[:, :, None], cos[:, :, None]), apply_rotary(key, sin, cos)
    keys = KVCache.of(key, value)
    if cache is not None:
      keys = cache = cache.written(keys, cache_slot)
    # Softmax in float32, as the original's eager attention has it.
    look = attend_packed
    if cache is not None or (train and self.dropout_rate):
      dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(2,), deterministic=not train)
      look = functools.partial(attend, probs_dropout=dropout)
    out_btknh = look(query, keys, mask_bts, jnp.float32, h**-0.5)

    out_eIO = self._expert_kernel('out', (n * h, d), ('heads', 'embed'))
    answers = dataclasses.replace(
      asks,
      in_axes=heads_axes,
      weight_axes=('expert', 'heads', None),
      out_axes=embed_axes,
      combine=True,
    )
    out_gtkI = out_btknh.reshape(*x_gtd.shape[:2], k, n * h)
    y_gtd = self.run_experts(_project, out_gtkI, out_eIO, routing, answers)
    return y_gtd.reshape(b, t, d) + output_bias(self, d), cache, routing.stats

  def _expert_kernel(self, name: str, shape: tuple[int, int], axes: tuple[str, str]) -> Array:
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
