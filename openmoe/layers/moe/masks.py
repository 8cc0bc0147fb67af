"""Moves rows by one-hot [g, t, e, c] einsums: the reference, what the released models trained with.

The same slots and drops as exchange.through_slots, at a cost that grows with the capacity.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from openmoe.layers.moe.exchange import Compute, ExpertPlan, on_experts
from openmoe.types import Array, PyTree, Routing


def routing_by_choice(routing: Routing) -> Routing:
  """The routing of N * k tokens with one choice each; slots stay as they were assigned."""
  split = lambda x_gtk: x_gtk.reshape(x_gtk.shape[0], -1, 1)
  return routing.replace(
    expert_index_gtk=split(routing.expert_index_gtk),
    combine_weights_gtk=split(routing.combine_weights_gtk),
    slot_gtk=split(routing.slot_gtk),
  )


def capacity_masks(routing: Routing) -> tuple[Array, Array]:
  """One-hot dispatch mask and its weighted twin, float32 [g, t, e, c]."""
  # one_hot gives a zero row for slots outside [0, capacity): those choices are dropped.
  slot_gtkc = jax.nn.one_hot(routing.slot_gtk, routing.capacity, dtype=jnp.float32)
  expert_gtke = jax.nn.one_hot(routing.expert_index_gtk, routing.num_experts, dtype=jnp.float32)
  mask_gtec = jnp.einsum('gtke,gtkc->gtec', expert_gtke, slot_gtkc)
  weights = routing.combine_weights_gtk
  return mask_gtec, jnp.einsum('gtk,gtke,gtkc->gtec', weights, expert_gtke, slot_gtkc)


def mask_dispatch(x_gtd: Array, mask_gtec: Array) -> Array:
  """[g, t, d] -> [e, g * c, d] by one-hot einsum."""
  buffer_egcd = jnp.einsum('gtd,gtec->egcd', x_gtd, mask_gtec.astype(x_gtd.dtype))
  e, g, c, d = buffer_egcd.shape
  return buffer_egcd.reshape(e, g * c, d)


def mask_combine(buffer_eRd: Array, weights_gtec: Array) -> Array:
  """[e, g * c, d] -> float32 [g, t, d]."""
  g, _, e, c = weights_gtec.shape
  buffer_egcd = buffer_eRd.reshape(e, g, c, -1)
  return jnp.einsum('egcd,gtec->gtd', buffer_egcd, weights_gtec, preferred_element_type=jnp.float32)


def through_masks(
  compute: Compute, weights: PyTree, x: Array, routing: Routing, plan: ExpertPlan
) -> Array:
  """Moves rows by capacity buffers that are filled by einsum; see exchange.through_experts."""
  g, t, k = routing.expert_index_gtk.shape
  fill_gtec, _ = capacity_masks(routing if x.ndim == 3 else routing_by_choice(routing))
  buffer_eRO = on_experts(compute, weights, mask_dispatch(x.reshape(g, -1, x.shape[-1]), fill_gtec))
  if plan.combine:
    return mask_combine(buffer_eRO, capacity_masks(routing)[1])
  rows = mask_combine(buffer_eRO, capacity_masks(routing_by_choice(routing))[0])
  return rows.astype(x.dtype).reshape(g, t, k, -1)
