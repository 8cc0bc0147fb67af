"""Dispatchers move tokens: `dispatch` fills expert buffers, `combine` brings the outputs home.

Two forms. The mask form multiplies with one-hot [g, t, e, c] tensors; it is the reference, and
what the released models were trained with. The slot form keeps, for every (token, choice), the
buffer slot it goes to, and for every slot the (token, choice) it came from; with both maps at
hand, values and gradients are gathers, never a scatter of activations. Capacity buffers and the
sorted layout of the dropless path are two ways of numbering slots.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from openmoe.types import Array, Routing


@flax.struct.dataclass
class SlotMap:
  """A partial one-to-one map between the n * k (token, choice) rows and m buffer slots.

  Attributes:
    slot_nk: int32 slot of each row; m for a row that is dropped.
    row_m: int32 row (token * k + choice) of each slot; n * k for an empty slot.
  """

  slot_nk: Array
  row_m: Array

  def by_choice(self) -> SlotMap:
    """The same map for n * k rows with one choice each: every choice brings a row of its own."""
    return SlotMap(slot_nk=self.slot_nk.reshape(-1, 1), row_m=self.row_m)


def routing_by_choice(routing: Routing) -> Routing:
  """The routing of n * k tokens with one choice each; slots stay as they were assigned."""
  split = lambda x_gtk: x_gtk.reshape(x_gtk.shape[0], -1, 1)
  return Routing(
    expert_index_gtk=split(routing.expert_index_gtk),
    combine_weights_gtk=split(routing.combine_weights_gtk),
    slot_gtk=split(routing.slot_gtk),
    stats=routing.stats,
  )


def slot_map(slot_nk: Array, num_slots: int) -> SlotMap:
  """Completes a SlotMap from its forward half; only these small integers are ever scattered."""
  rows = slot_nk.size
  empty = jnp.full((num_slots,), rows, jnp.int32)
  row_m = empty.at[slot_nk.reshape(-1)].set(jnp.arange(rows, dtype=jnp.int32), mode='drop')
  return SlotMap(slot_nk=slot_nk, row_m=row_m)


def _take(x: Array, index: Array) -> Array:
  """x[index] with zeros where the index is out of range."""
  return jnp.take(x, index, axis=0, mode='fill', fill_value=0)


@jax.custom_vjp
def dispatch(x_nd: Array, slots: SlotMap) -> Array:
  """[n, d] -> buffers [m, d]; empty slots are zero rows."""
  return _take(x_nd, slots.row_m // slots.slot_nk.shape[1])


def _dispatch_fwd(x_nd, slots):
  return dispatch(x_nd, slots), slots


def _dispatch_bwd(slots, dbuffer_md):
  # Summed in float32 as the einsum's accumulator would be.
  parts = (_take(dbuffer_md, slot_n).astype(jnp.float32) for slot_n in slots.slot_nk.T)
  return sum(parts).astype(dbuffer_md.dtype), None


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def combine(buffer_md: Array, weights_nk: Array, slots: SlotMap) -> Array:
  """Weighted sum over the k choices of each token, float32 [n, d]; dropped choices give 0."""
  parts = (
    weight_n[:, None] * _take(buffer_md, slot_n).astype(jnp.float32)
    for weight_n, slot_n in zip(weights_nk.T, slots.slot_nk.T, strict=True)
  )
  return sum(parts)


def _combine_fwd(buffer_md, weights_nk, slots):
  return combine(buffer_md, weights_nk, slots), (buffer_md, weights_nk, slots)


def _combine_bwd(residuals, dy_nd):
  buffer_md, weights_nk, slots = residuals
  weight_m = _take(weights_nk.reshape(-1), slots.row_m)
  dbuffer_md = weight_m[:, None] * _take(dy_nd, slots.row_m // weights_nk.shape[1])
  dweights_nk = jnp.stack(
    [jnp.sum(_take(buffer_md, slot_n) * dy_nd, axis=-1) for slot_n in slots.slot_nk.T], axis=1
  )
  return dbuffer_md.astype(buffer_md.dtype), dweights_nk.astype(weights_nk.dtype), None


combine.defvjp(_combine_fwd, _combine_bwd)


@jax.custom_vjp
def collect(buffer_md: Array, slots: SlotMap) -> Array:
  """The buffer row of every choice, [n, k, d], neither weighted nor summed; 0 where dropped."""
  return _take(buffer_md, slots.slot_nk)


def _collect_fwd(buffer_md, slots):
  return collect(buffer_md, slots), slots


def _collect_bwd(slots, drows_nkd):
  return _take(drows_nkd.reshape(-1, drows_nkd.shape[-1]), slots.row_m), None


collect.defvjp(_collect_fwd, _collect_bwd)


def capacity_slots(routing: Routing, num_experts: int, capacity: int) -> SlotMap:
  """Slots of capacity buffers laid out [e, g, c]; choices beyond the capacity are dropped."""
  g, t, k = routing.slot_gtk.shape
  group_g11 = jnp.arange(g, dtype=jnp.int32)[:, None, None]
  num_slots = num_experts * g * capacity
  flat_gtk = (routing.expert_index_gtk * g + group_g11) * capacity + routing.slot_gtk
  served_gtk = (routing.slot_gtk >= 0) & (routing.slot_gtk < capacity)
  return slot_map(jnp.where(served_gtk, flat_gtk, num_slots).reshape(g * t, k), num_slots)


def capacity_masks(routing: Routing, num_experts: int, capacity: int) -> tuple[Array, Array]:
  """One-hot dispatch mask and its weighted twin, float32 [g, t, e, c]."""
  # one_hot gives a zero row for slots outside [0, capacity): those choices are dropped.
  slot_gtkc = jax.nn.one_hot(routing.slot_gtk, capacity, dtype=jnp.float32)
  expert_gtke = jax.nn.one_hot(routing.expert_index_gtk, num_experts, dtype=jnp.float32)
  mask_gtec = jnp.einsum('gtke,gtkc->gtec', expert_gtke, slot_gtkc)
  weights = routing.combine_weights_gtk
  return mask_gtec, jnp.einsum('gtk,gtke,gtkc->gtec', weights, expert_gtke, slot_gtkc)


def mask_dispatch(x_gtd: Array, mask_gtec: Array) -> Array:
  """[g, t, d] -> [e, g * c, d] by one-hot einsum."""
  buffer_egcd = jnp.einsum('gtd,gtec->egcd', x_gtd, mask_gtec.astype(x_gtd.dtype))
  e, g, c, d = buffer_egcd.shape
  return buffer_egcd.reshape(e, g * c, d)


def mask_combine(buffer_erd: Array, weights_gtec: Array) -> Array:
  """[e, g * c, d] -> float32 [g, t, d]."""
  g, _, e, c = weights_gtec.shape
  buffer_egcd = buffer_erd.reshape(e, g, c, -1)
  return jnp.einsum('egcd,gtec->gtd', buffer_egcd, weights_gtec, preferred_element_type=jnp.float32)


def sorted_slots(expert_nk: Array, num_experts: int, start_e: Array, num_slots: int) -> SlotMap:
  """Slots in expert order: the i-th row of expert e goes to start_e[e] + i.

  Args:
    expert_nk: int32; num_experts marks a row that is not routed.
    start_e: int32 [num_experts] first slot of each expert's segment.
  """
  expert_r = expert_nk.reshape(-1)
  order_r = jnp.argsort(expert_r, stable=True)
  sorted_r = expert_r[order_r]
  experts_e = jnp.arange(num_experts, dtype=sorted_r.dtype)
  first_e = jnp.sum(expert_r[:, None] < experts_e, axis=0, dtype=jnp.int32)
  rank_r = jnp.arange(expert_r.size, dtype=jnp.int32) - _take(first_e, sorted_r)
  slot_r = jnp.where(sorted_r < num_experts, _take(start_e, sorted_r) + rank_r, num_slots)
  slot_nk = jnp.zeros_like(expert_r).at[order_r].set(slot_r).reshape(expert_nk.shape)
  return slot_map(slot_nk, num_slots)
