"""Moves rows sorted by expert, so that nothing is dropped: the dropless dispatch.

On one device rows go into segments, one an expert. Over an expert axis they are sorted by expert
first, so that what a device gets is one run of rows; runs differ in length (exchange_rows).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.layers.moe.exchange import (
  Compute,
  ExpertPlan,
  SlotMap,
  bring_home,
  collect,
  dispatch,
)
from openmoe.layers.moe.grouped.api import Kernel, block_layout, sorted_slots
from openmoe.types import Array, PyTree, Routing


def through_segments(
  compute: Compute,
  weights: PyTree,
  x: Array,
  routing: Routing,
  plan: ExpertPlan,
  *,
  kernel: Kernel,
) -> Array:
  """Moves rows sorted by expert; see exchange.through_experts."""
  g, t, k = routing.expert_index_gtk.shape
  num_experts = routing.num_experts
  expert_Nk = chosen_experts(routing, num_experts)
  rows = x.reshape(-1, x.shape[-1])
  leave = lambda slots: dispatch(rows, slots if x.ndim == 3 else slots.by_choice())
  home = lambda rows_MO, slots: bring_home(rows_MO, routing, slots, plan.combine)

  if partitioning.partitions('expert') == 1:
    slots, segments = block_layout(expert_Nk, num_experts, kernel)
    return home(compute(weights, leave(slots), segments), slots)

  slots, counts_De = _sort_for_exchange(expert_Nk, num_experts)
  rows_Rd = leave(slots)
  local_e = num_experts // counts_De.shape[0]
  sizes_DD = counts_De.reshape(counts_De.shape[0], -1, local_e).sum(axis=-1)
  # A token has min(k, local_e) choices at most on one device: the bound when all go to one.
  max_rows = sizes_DD.shape[0] * g * t * min(k, local_e)
  arrived_Rd = exchange_rows(rows_Rd, sizes_DD, max_rows, 'expert')
  arrived_R1 = _arrived_experts(counts_De, local_e, max_rows)
  arrived, segments = block_layout(arrived_R1, local_e, kernel)
  out_MO = compute(weights, dispatch(arrived_Rd, arrived), segments)
  out_RO = collect(out_MO, arrived)[:, 0]
  return home(exchange_rows(out_RO, sizes_DD.T, rows_Rd.shape[0], 'expert'), slots)


def chosen_experts(routing: Routing, unrouted: int) -> Array:
  """int32 [N, k] expert of every choice; `unrouted` where the token is padding."""
  expert_gtk = jnp.where(routing.slot_gtk >= 0, routing.expert_index_gtk, unrouted)
  return expert_gtk.reshape(-1, expert_gtk.shape[-1])


def _sort_for_exchange(expert_Nk: Array, num_experts: int) -> tuple[SlotMap, Array]:
  """Slots of rows in expert order, and all devices' counts [D, e]."""
  counts_e = jnp.bincount(expert_Nk.reshape(-1), length=num_experts + 1)[:num_experts]
  start_e = (jnp.cumsum(counts_e) - counts_e).astype(jnp.int32)
  slots = sorted_slots(expert_Nk, num_experts, start_e, expert_Nk.size)
  return slots, partitioning.gather(counts_e[None], 'expert', dim=0)


def _arrived_experts(counts_De: Array, local_experts: int, max_rows: int) -> Array:
  """Local expert of each arrived row [R, 1]: they come by device, then by expert."""
  first = partitioning.shard_index('expert') * local_experts
  mine_De = jax.lax.dynamic_slice_in_dim(counts_De, first, local_experts, axis=1)
  ends = jnp.cumsum(mine_De.reshape(-1))
  segment_R = jnp.searchsorted(ends, jnp.arange(max_rows), side='right')
  expert_R = jnp.where(segment_R < ends.size, segment_R % local_experts, local_experts)
  return expert_R[:, None].astype(jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def exchange_rows(x_Rd: Array, sizes_DD: Array, out_rows: int, logical: str) -> Array:
  """Inside per_shard: all-to-all of row runs of different lengths.

  Args:
    x_Rd: this device's rows, grouped by the device they go to, in device order.
    sizes_DD: int32, sizes_DD[i, j] rows go from device i to device j; the same on all devices.
    out_rows: rows of the result; arrived rows come first, by sending device, the rest is 0.
    logical: axis whose devices exchange.
  """
  (axis,) = partitioning.mesh_axes(logical)
  me = jax.lax.axis_index(axis)
  before = lambda sizes: jnp.cumsum(sizes, axis=-1) - sizes
  starts_in = before(sizes_DD)  # where the run for j begins on i
  starts_out = before(sizes_DD.T).T  # where the run from i begins on j
  if partitioning.target()[0] != 'cpu':
    return jax.lax.ragged_all_to_all(
      x_Rd,
      partitioning.varying(jnp.zeros((out_rows, x_Rd.shape[1]), x_Rd.dtype)),
      starts_in[me],
      sizes_DD[me],
      starts_out[me],
      sizes_DD[:, me],
      axis_name=axis,
    )
  # XLA's CPU backend has no ragged all-to-all: gather everything and pick the same rows.
  all_DRd = jax.lax.all_gather(x_Rd, axis)
  place_R = jnp.arange(out_rows)
  ends_D = jnp.cumsum(sizes_DD[:, me])
  sender_R = jnp.minimum(jnp.searchsorted(ends_D, place_R, side='right'), ends_D.size - 1)
  row_R = place_R - starts_out[sender_R, me] + starts_in[sender_R, me]
  rows = all_DRd[sender_R, jnp.clip(row_R, 0, x_Rd.shape[0] - 1)]
  return jnp.where((place_R < ends_D[-1])[:, None], rows, 0)


def _exchange_rows_fwd(x_Rd, sizes_DD, out_rows, logical):
  return exchange_rows(x_Rd, sizes_DD, out_rows, logical), (sizes_DD, x_Rd.shape[0])


def _exchange_rows_bwd(out_rows, logical, residuals, dy_Rd):
  sizes_DD, rows = residuals
  return exchange_rows(dy_Rd, sizes_DD.T, rows, logical), None


exchange_rows.defvjp(_exchange_rows_fwd, _exchange_rows_bwd)
