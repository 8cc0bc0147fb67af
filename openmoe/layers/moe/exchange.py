"""Takes rows to the devices and buffers of their experts, and brings the outputs home.

Everything between the router and the combined output runs once per device (partitioning.
per_shard): a device fills buffers from its own tokens, exchanges them with the devices of its
expert axis (all-to-all), runs its own experts, and sends the outputs back.

A token may come as one row that all its choices share, or as a row for each choice; its outputs go
home weighted and summed, or one by one. The MLP experts use the first of both, attention experts
all: their queries leave one by one and come back to be summed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.config import Dispatch, MoEConfig
from openmoe.layers.moe import chosen
from openmoe.layers.moe import dispatch as dispatching
from openmoe.layers.moe.experts import split_axes
from openmoe.layers.moe.grouped.api import Kernel, Segments, block_layout
from openmoe.types import Array, PyTree, Routing

# (weights, rows, segments) -> rows. Rows are [e, r, i] buffers where segments is None, else [m, i].
# Weights and buffers may be of fewer experts than the layer has.
Compute = Callable[[PyTree, Array, Segments | None], Array]


def through_experts(
  compute: Compute,
  x: Array,
  weights: PyTree,
  routing: Routing,
  config: MoEConfig,
  capacity: int | None,
  *,
  kernel: Kernel,
  in_axes: tuple,
  weight_axes: PyTree,
  out_axes: tuple,
  combine: bool,
) -> Array:
  """Runs `compute` where the experts are, on the rows that were routed to them.

  Args:
    compute: sees one device's experts; rows of dropped choices never reach it.
    x: [g, t, d], or [g, t, k, d] with a row per choice.
    weights: of the experts, leading axis 'expert'.
    capacity: slots per expert and group; None where dispatch is dropless.
    in_axes, weight_axes, out_axes: logical axes of x, weights and result.
    combine: whether outputs are weighted and summed over the choices.

  Returns:
    float32 [g, t, o] if combine, else [g, t, k, o] in the dtype of x; 0 for dropped choices.
  """
  routing_axes = Routing(*(('act_group', None, None),) * 3, stats=None)

  def local(*pieces):
    # One cast at the door, so that the hand-written gradients inside see one type of value.
    x, weights, routing = jax.tree.map(partitioning.varying, pieces)
    if config.dispatch is Dispatch.CHOSEN and chosen.pays(routing, weights):
      return chosen.through_chosen(compute, x, weights, routing, combine)
    run = functools.partial(compute, weights)
    if config.dispatch.dropless:
      one_size = config.dispatch is Dispatch.CHOSEN
      return _through_segments(run, x, routing, config.num_experts, kernel, combine, one_size)
    return _through_buffers(run, x, routing, config, capacity, combine)

  return partitioning.per_shard(
    local,
    (in_axes, split_axes(weights, weight_axes), routing_axes),
    out_axes,
    x,
    weights,
    routing.replace(stats=None),
    typed=not kernel.untyped,
  )


def _through_buffers(run, x, routing: Routing, config: MoEConfig, capacity: int, combine: bool):
  """Capacity buffers, by one-hot masks or by slots; see through_experts."""
  e, k = config.num_experts, config.top_k
  g, t, d = *x.shape[:2], x.shape[-1]
  by_choice = dispatching.routing_by_choice(routing)
  masked = config.dispatch is Dispatch.MASK
  if masked:
    masks = functools.partial(dispatching.capacity_masks, num_experts=e, capacity=capacity)
    fill_gtec, _ = masks(routing if x.ndim == 3 else by_choice)
    buffer_erd = dispatching.mask_dispatch(x.reshape(g, -1, d), fill_gtec)
  else:
    slots = dispatching.capacity_slots(routing, e, capacity)
    fill = slots if x.ndim == 3 else slots.by_choice()
    buffer_erd = dispatching.dispatch(x.reshape(-1, d), fill).reshape(e, g * capacity, d)

  buffer_erd = partitioning.exchange(buffer_erd, 'expert', split_dim=0, concat_dim=1)
  buffer_ero = run(buffer_erd, None)
  buffer_ero = partitioning.exchange(buffer_ero, 'expert', split_dim=1, concat_dim=0)

  if masked and combine:
    return dispatching.mask_combine(buffer_ero, masks(routing)[1])
  if masked:
    rows = dispatching.mask_combine(buffer_ero, masks(by_choice)[0])
    return rows.astype(x.dtype).reshape(g, t, k, -1)
  return _home(buffer_ero.reshape(-1, buffer_ero.shape[-1]), routing, slots, combine)


def _home(buffer_mo: Array, routing: Routing, slots: dispatching.SlotMap, combine: bool) -> Array:
  g, t, k = routing.expert_index_gtk.shape
  if not combine:
    return dispatching.collect(buffer_mo, slots).reshape(g, t, k, -1)
  weights_nk = routing.combine_weights_gtk.reshape(g * t, k)
  return dispatching.combine(buffer_mo, weights_nk, slots).reshape(g, t, -1)


def _through_segments(
  run,
  x,
  routing: Routing,
  num_experts: int,
  kernel: Kernel,
  combine: bool,
  one_size: bool,
):
  """Rows sorted by expert; nothing is dropped. See through_experts and block_layout."""
  g, t, k = routing.expert_index_gtk.shape
  routed_gtk = routing.slot_gtk >= 0
  expert_nk = jnp.where(routed_gtk, routing.expert_index_gtk, num_experts).reshape(g * t, k)
  rows = x.reshape(-1, x.shape[-1])
  leave = lambda slots: dispatching.dispatch(rows, slots if x.ndim == 3 else slots.by_choice())

  if partitioning.partitions('expert') == 1:
    slots, segments = block_layout(expert_nk, num_experts, kernel, one_size)
    return _home(run(leave(slots), segments), routing, slots, combine)

  slots, counts_me = _sort_for_exchange(expert_nk, num_experts)
  rows_rd = leave(slots)
  local_e = num_experts // counts_me.shape[0]
  sizes_mm = counts_me.reshape(counts_me.shape[0], -1, local_e).sum(axis=-1)
  # A token has min(k, local_e) choices at most on one device: the bound when all go to one.
  max_rows = sizes_mm.shape[0] * g * t * min(k, local_e)
  arrived_rd = partitioning.exchange_rows(rows_rd, sizes_mm, max_rows, 'expert')
  arrived_r1 = _arrived_experts(counts_me, local_e, max_rows)
  arrived, segments = block_layout(arrived_r1, local_e, kernel, one_size)
  out_mo = run(dispatching.dispatch(arrived_rd, arrived), segments)
  out_ro = dispatching.collect(out_mo, arrived)[:, 0]
  home_ro = partitioning.exchange_rows(out_ro, sizes_mm.T, rows_rd.shape[0], 'expert')
  return _home(home_ro, routing, slots, combine)


def _sort_for_exchange(expert_nk: Array, num_experts: int) -> tuple[dispatching.SlotMap, Array]:
  """Slots of rows in expert order, and all devices' counts [m, e]."""
  counts_e = jnp.bincount(expert_nk.reshape(-1), length=num_experts + 1)[:num_experts]
  start_e = (jnp.cumsum(counts_e) - counts_e).astype(jnp.int32)
  slots = dispatching.sorted_slots(expert_nk, num_experts, start_e, expert_nk.size)
  return slots, partitioning.gather(counts_e[None], 'expert', dim=0)


def _arrived_experts(counts_me: Array, local_experts: int, max_rows: int) -> Array:
  """Local expert of each arrived row [r, 1]: they come by device, then by expert."""
  first = partitioning.shard_index('expert') * local_experts
  mine_me = jax.lax.dynamic_slice_in_dim(counts_me, first, local_experts, axis=1)
  ends = jnp.cumsum(mine_me.reshape(-1))
  segment_r = jnp.searchsorted(ends, jnp.arange(max_rows), side='right')
  expert_r = jnp.where(segment_r < ends.size, segment_r % local_experts, local_experts)
  return expert_r[:, None].astype(jnp.int32)


def gathered(rows: Array) -> Array:
  """Inside compute: whole embeddings from the slices of the model shards."""
  return partitioning.gather(rows, 'act_embed_slice', dim=rows.ndim - 1)


def scattered(rows: Array) -> Array:
  """Inside compute: sums partial outputs over the model shards, each keeping its slice."""
  return partitioning.reduce_scatter(rows, 'act_embed_slice', dim=rows.ndim - 1)
