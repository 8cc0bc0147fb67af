"""The sparse layer: router decides, dispatcher moves, experts compute.

Everything between the router and the combined output runs once per device (partitioning.
per_shard): a device fills buffers from its own tokens, exchanges them with the devices of its
expert axis (all-to-all), runs its own experts, and sends the outputs back. Every model shard moves
only its slice of the embedding.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.config import ConfigError, Dispatch, MoEConfig
from openmoe.layers import dispatch as dispatching
from openmoe.layers.grouped import Blocks, block_layout, grouped_matmul
from openmoe.layers.mlp import Kernel, double_swiglu
from openmoe.layers.router import Router
from openmoe.types import Array, RouterStats, Routing


@flax.struct.dataclass
class ExpertWeights:
  """One gated MLP per expert; all in the activation dtype.

  Attributes:
    wi_0_eduf: [e, d, 2, f] double-width gate.
    wi_1_edf: [e, d, f].
    wo_efd: [e, f, d].
    keep_ef: dropout of the hidden units, scaled by 1 / keep, or None. As in the original an
      expert drops the same units for all of its tokens.
  """

  wi_0_eduf: Array
  wi_1_edf: Array
  wo_efd: Array
  keep_ef: Array | None = None


WEIGHT_AXES = ExpertWeights(
  wi_0_eduf=('expert', None, None, 'expert_mlp'),
  wi_1_edf=('expert', None, 'expert_mlp'),
  wo_efd=('expert', 'expert_mlp', None),
)


def resolve_groups(num_tokens: int, group_size: int) -> int:
  """Tokens per routing group for this many tokens: group_size, or all of fewer tokens.

  Raises:
    ConfigError: group_size does not divide a larger number of tokens.
  """
  if num_tokens <= group_size:
    return num_tokens
  if num_tokens % group_size:
    raise ConfigError(
      f'{num_tokens} tokens do not divide into routing groups of group_size={group_size}; give a '
      f'batch whose tokens are a multiple, or a group_size that divides them.'
    )
  return group_size


class Experts(nn.Module):
  """Holds the stacked expert kernels; each expert is initialised on its own."""

  num_experts: int
  mlp_dim: int
  dtype: jnp.dtype
  init_scale: float
  dropout_rate: float

  @nn.compact
  def __call__(self, embed_dim: int, train: bool) -> ExpertWeights:
    e, d, f = self.num_experts, embed_dim, self.mlp_dim
    init = functools.partial(
      nn.initializers.variance_scaling, self.init_scale, 'fan_in', 'normal', 1, batch_axis=0
    )
    kernel = lambda name, *args: Kernel(*args, name=name)().astype(self.dtype)
    gate_axes = ('expert', 'embed', 'gate', 'expert_mlp')
    linear_axes, out_axes = ('expert', 'embed', 'expert_mlp'), ('expert', 'expert_mlp', 'embed')
    keep_ef = None
    if train and self.dropout_rate > 0:
      keep = jax.random.bernoulli(self.make_rng('dropout'), 1 - self.dropout_rate, (e, f))
      keep_ef = keep.astype(self.dtype) / (1 - self.dropout_rate)
    return ExpertWeights(
      wi_0_eduf=kernel('wi_0', (e, d, 2, f), gate_axes, init(out_axis=(2, 3))),
      wi_1_edf=kernel('wi_1', (e, d, f), linear_axes, init(out_axis=2)),
      wo_efd=kernel('wo', (e, f, d), out_axes, init(out_axis=2)),
      keep_ef=keep_ef,
    )


def _experts_on_buffers(buffer_erd: Array, weights: ExpertWeights) -> Array:
  """Each expert's MLP on its own buffer, [e, r, d] -> [e, r, d]."""
  gate_eruf = jnp.einsum('erd,eduf->eruf', buffer_erd, weights.wi_0_eduf)
  h_erf = double_swiglu(gate_eruf, jnp.einsum('erd,edf->erf', buffer_erd, weights.wi_1_edf))
  if weights.keep_ef is not None:
    h_erf = h_erf * weights.keep_ef[:, None]
  return jnp.einsum('erf,efd->erd', h_erf, weights.wo_efd)


def _experts_on_blocks(rows_md: Array, weights: ExpertWeights, blocks: Blocks) -> Array:
  """Each block's expert MLP on the block's rows, [m, d] -> [m, d]."""
  e, d, _, f = weights.wi_0_eduf.shape
  gate_muf = grouped_matmul(rows_md, weights.wi_0_eduf.reshape(e, d, 2 * f), blocks)
  gate_muf = gate_muf.reshape(-1, 2, f)
  h_mf = double_swiglu(gate_muf, grouped_matmul(rows_md, weights.wi_1_edf, blocks))
  if weights.keep_ef is not None:
    h_mf = h_mf * weights.keep_ef[jnp.repeat(blocks.expert_b, blocks.size)]
  return grouped_matmul(h_mf, weights.wo_efd, blocks)


def _with_capacity(
  x_gtd: Array, routing: Routing, weights: ExpertWeights, config: MoEConfig, capacity: int
) -> Array:
  """One device's tokens through capacity buffers, float32 [g, t, d / model]."""
  g, t, d = x_gtd.shape
  e = config.num_experts
  if config.dispatch is Dispatch.MASK:
    mask_gtec, weights_gtec = dispatching.capacity_masks(routing, e, capacity)
    buffer_erd = dispatching.mask_dispatch(x_gtd, mask_gtec)
  else:
    slots = dispatching.capacity_slots(routing, e, capacity)
    buffer_erd = dispatching.dispatch(x_gtd.reshape(g * t, d), slots).reshape(e, g * capacity, d)

  buffer_erd = partitioning.exchange(buffer_erd, 'expert', split_dim=0, concat_dim=1)
  buffer_erd = partitioning.gather(buffer_erd, 'act_embed_slice', dim=2)
  buffer_erd = _experts_on_buffers(buffer_erd, weights)
  buffer_erd = partitioning.reduce_scatter(buffer_erd, 'act_embed_slice', dim=2)
  buffer_erd = partitioning.exchange(buffer_erd, 'expert', split_dim=1, concat_dim=0)

  if config.dispatch is Dispatch.MASK:
    return dispatching.mask_combine(buffer_erd, weights_gtec)
  weights_nk = routing.combine_weights_gtk.reshape(g * t, -1)
  return dispatching.combine(buffer_erd.reshape(-1, d), weights_nk, slots).reshape(g, t, d)


def _dropless(x_gtd: Array, routing: Routing, weights: ExpertWeights, config: MoEConfig) -> Array:
  """One device's tokens, sorted by expert; nothing is dropped. float32 [g, t, d / model]."""
  g, t, d = x_gtd.shape
  e, k = config.num_experts, config.top_k
  routed_gtk = routing.slot_gtk >= 0
  expert_nk = jnp.where(routed_gtk, routing.expert_index_gtk, e).reshape(g * t, k)
  weights_nk = routing.combine_weights_gtk.reshape(g * t, k)
  x_nd = x_gtd.reshape(g * t, d)

  def compute(rows_md: Array, blocks: Blocks) -> Array:
    rows_md = partitioning.gather(rows_md, 'act_embed_slice', dim=1)
    rows_md = _experts_on_blocks(rows_md, weights, blocks)
    return partitioning.reduce_scatter(rows_md, 'act_embed_slice', dim=1)

  if partitioning.partitions('expert') == 1:
    slots, blocks = block_layout(expert_nk, e)
    out_md = compute(dispatching.dispatch(x_nd, slots), blocks)
    return dispatching.combine(out_md, weights_nk, slots).reshape(g, t, d)

  rows_rd, slots, counts_me = _sort_for_exchange(x_nd, expert_nk, e)
  local_e = e // counts_me.shape[0]
  sizes_mm = counts_me.reshape(counts_me.shape[0], -1, local_e).sum(axis=-1)
  # A token has min(k, local_e) choices at most on one device: the bound when all go to one.
  max_rows = sizes_mm.shape[0] * x_nd.shape[0] * min(k, local_e)
  arrived_rd = partitioning.exchange_rows(rows_rd, sizes_mm, max_rows, 'expert')
  arrived_slots, blocks = block_layout(_arrived_experts(counts_me, local_e, max_rows), local_e)
  out_md = compute(dispatching.dispatch(arrived_rd, arrived_slots), blocks)
  # Going home is a combine of one choice with weight 1.
  ones = partitioning.varying(jnp.ones((max_rows, 1), jnp.float32))
  out_rd = dispatching.combine(out_md, ones, arrived_slots).astype(x_gtd.dtype)
  home_rd = partitioning.exchange_rows(out_rd, sizes_mm.T, rows_rd.shape[0], 'expert')
  return dispatching.combine(home_rd, weights_nk, slots).reshape(g, t, d)


def _sort_for_exchange(x_nd: Array, expert_nk: Array, num_experts: int):
  """Rows in expert order [n * k, d], their SlotMap, and all devices' counts [m, e]."""
  counts_e = jnp.bincount(expert_nk.reshape(-1), length=num_experts + 1)[:num_experts]
  start_e = (jnp.cumsum(counts_e) - counts_e).astype(jnp.int32)
  slots = dispatching.sorted_slots(expert_nk, num_experts, start_e, expert_nk.size)
  counts_me = partitioning.gather(counts_e[None], 'expert', dim=0)
  return dispatching.dispatch(x_nd, slots), slots, counts_me


def _arrived_experts(counts_me: Array, local_experts: int, max_rows: int) -> Array:
  """Local expert of each arrived row [r, 1]: they come by device, then by expert."""
  first = partitioning.shard_index('expert') * local_experts
  mine_me = jax.lax.dynamic_slice_in_dim(counts_me, first, local_experts, axis=1)
  ends = jnp.cumsum(mine_me.reshape(-1))
  segment_r = jnp.searchsorted(ends, jnp.arange(max_rows), side='right')
  expert_r = jnp.where(segment_r < ends.size, segment_r % local_experts, local_experts)
  return expert_r[:, None].astype(jnp.int32)


class MoeLayer(nn.Module):
  """Mixture of gated MLPs. Dropped tokens get 0: the residual carries them."""

  config: MoEConfig
  mlp_dim: int
  dtype: jnp.dtype
  init_scale: float
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(
    self, x_btd: Array, valid_bt: Array | None, train: bool
  ) -> tuple[Array, RouterStats]:
    """[b, t, d] -> float32 [b, t, d] and the router's losses and statistics.

    The output is float32 because the float32 combine weights promote it; from here on the
    residual stream of the model is float32 too.
    """
    b, t, d = x_btd.shape
    size = resolve_groups(b * t, self.config.group_size)
    x_gtd = x_btd.reshape(-1, size, d)
    x_gtd = partitioning.shard(x_gtd, ('act_group', None, 'act_embed'))
    valid_gt = None if valid_bt is None else valid_bt.reshape(-1, size)
    routing, capacity = Router(self.config, name='router')(x_gtd, valid_gt, train)
    weights = Experts(
      self.config.num_experts,
      self.mlp_dim,
      self.dtype,
      self.init_scale,
      self.dropout_rate,
      name='experts',
    )(d, train)
    y_gtd = apply_experts(x_gtd.astype(self.dtype), routing, weights, self.config, capacity)
    return y_gtd.reshape(b, t, d), routing.stats


def apply_experts(
  x_gtd: Array, routing: Routing, weights: ExpertWeights, config: MoEConfig, capacity: int | None
) -> Array:
  """Moves tokens to their experts and back, float32 [g, t, d]; per device under a mesh."""
  act_axes = ('act_group', None, 'act_embed_slice')
  routing_axes = Routing(*(('act_group', None, None),) * 3, stats=None)
  keep_axes = None if weights.keep_ef is None else ('expert', 'expert_mlp')

  def local(*pieces):
    # One cast at the door, so that the hand-written gradients inside see one type of value.
    x_gtd, routing, weights = jax.tree.map(partitioning.varying, pieces)
    if config.dispatch is Dispatch.DROPLESS:
      return _dropless(x_gtd, routing, weights, config)
    return _with_capacity(x_gtd, routing, weights, config, capacity)

  return partitioning.per_shard(
    local,
    (act_axes, routing_axes, WEIGHT_AXES.replace(keep_ef=keep_axes)),
    act_axes,
    x_gtd,
    routing.replace(stats=None),
    weights,
  )
