"""Takes rows to the devices and buffers of their experts, and brings the outputs home.

Everything between the router and the combined output runs once per device (partitioning.
per_shard): a device fills buffers from its own tokens, exchanges them with the devices of its
expert axis (all-to-all), runs its own experts, and sends the outputs back.

Tokens and buffer slots know each other by a SlotMap: for every (token, choice) the slot it goes
to, for every slot the (token, choice) it came from. With both maps at hand values and gradients
are gathers, never a scatter of activations. Capacity buffers are laid out here; masks.py and
grouped/ are the two other ways to move rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.types import Array, PyTree, Routing


@flax.struct.dataclass
class SlotMap:
  """A partial one-to-one map between the N * k (token, choice) rows and M buffer slots.

  Attributes:
    slot_Nk: int32 slot of each row; M for a row that is dropped.
    row_M: int32 row (token * k + choice) of each slot; N * k for an empty slot.
  """

  slot_Nk: Array
  row_M: Array

  def by_choice(self) -> SlotMap:
    """The same map for N * k rows with one choice each: every choice brings a row of its own."""
    return SlotMap(slot_Nk=self.slot_Nk.reshape(-1, 1), row_M=self.row_M)


def slot_map(slot_Nk: Array, num_slots: int) -> SlotMap:
  """Completes a SlotMap from its forward half; only these small integers are ever scattered."""
  rows = slot_Nk.size
  empty = jnp.full((num_slots,), rows, jnp.int32)
  row_M = empty.at[slot_Nk.reshape(-1)].set(jnp.arange(rows, dtype=jnp.int32), mode='drop')
  return SlotMap(slot_Nk=slot_Nk, row_M=row_M)


def take(x: Array, index: Array) -> Array:
  """x[index] with zeros where the index is out of range."""
  return jnp.take(x, index, axis=0, mode='fill', fill_value=0)


@jax.custom_vjp
def dispatch(x_Nd: Array, slots: SlotMap) -> Array:
  """[N, d] -> buffers [M, d]; empty slots are zero rows."""
  return take(x_Nd, slots.row_M // slots.slot_Nk.shape[1])


def _dispatch_fwd(x_Nd, slots):
  return dispatch(x_Nd, slots), slots


def _dispatch_bwd(slots, dbuffer_Md):
  # Summed in float32 as the einsum's accumulator would be.
  parts = (take(dbuffer_Md, slot_N).astype(jnp.float32) for slot_N in slots.slot_Nk.T)
  return sum(parts).astype(dbuffer_Md.dtype), None


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def combine(buffer_Md: Array, weights_Nk: Array, slots: SlotMap) -> Array:
  """Weighted sum over the k choices of each token, float32 [N, d]; dropped choices give 0."""
  parts = (
    weight_N[:, None] * take(buffer_Md, slot_N).astype(jnp.float32)
    for weight_N, slot_N in zip(weights_Nk.T, slots.slot_Nk.T, strict=True)
  )
  return sum(parts)


def _combine_fwd(buffer_Md, weights_Nk, slots):
  return combine(buffer_Md, weights_Nk, slots), (buffer_Md, weights_Nk, slots)


def _combine_bwd(residuals, dy_Nd):
  buffer_Md, weights_Nk, slots = residuals
  weight_M = take(weights_Nk.reshape(-1), slots.row_M)
  dbuffer_Md = weight_M[:, None] * take(dy_Nd, slots.row_M // weights_Nk.shape[1])
  dweights_Nk = jnp.stack(
    [jnp.sum(take(buffer_Md, slot_N) * dy_Nd, axis=-1) for slot_N in slots.slot_Nk.T], axis=1
  )
  return dbuffer_Md.astype(buffer_Md.dtype), dweights_Nk.astype(weights_Nk.dtype), None


combine.defvjp(_combine_fwd, _combine_bwd)


@jax.custom_vjp
def collect(buffer_Md: Array, slots: SlotMap) -> Array:
  """The buffer row of every choice, [N, k, d], neither weighted nor summed; 0 where dropped."""
  return take(buffer_Md, slots.slot_Nk)


def _collect_fwd(buffer_Md, slots):
  return collect(buffer_Md, slots), slots


def _collect_bwd(slots, drows_Nkd):
  return take(drows_Nkd.reshape(-1, drows_Nkd.shape[-1]), slots.row_M), None


collect.defvjp(_collect_fwd, _collect_bwd)


class Segments(Protocol):
  """Rows of several experts in one array [M, I], in place of a buffer [e, R, I] for each."""

  def matmul(self, rows: Array, kernel_eIO: Array) -> Array:
    """Each row times the kernel of its expert, [M, I] -> [M, O]."""

  def mlp(self, rows: Array, weights: PyTree, activation: Callable) -> Array:
    """Each row through the gated MLP of its expert, [M, d] -> [M, d]; see ExpertWeights."""


# (weights, rows, segments) -> rows. Rows are buffers [e, R, I] where segments is None, else [M, I].
# Weights and buffers may be of fewer experts than the layer has.
Compute = Callable[[PyTree, Array, Segments | None], Array]


@dataclasses.dataclass(frozen=True)
class ExpertPlan:
  """How the rows of one layer reach its experts, decided once; layer.make_plan makes it.

  A token may come as one row that all its choices share, or as a row for each choice; its outputs
  go home weighted and summed, or one by one. MLP experts use the first of both, attention experts
  all: their queries leave one by one and come back to be summed.

  Attributes:
    move: (compute, weights, x, routing, plan) -> y on one device: see through_slots.
    in_axes, weight_axes, out_axes: logical axes of x, weights and result. Where 'act_embed_slice'
      is among them, a model shard moves its slice of the embedding alone: compute gets whole rows
      and gives partial sums.
    combine: whether outputs are weighted and summed over the choices.
    typed: see partitioning.per_shard.
  """

  move: Callable[..., Array]
  in_axes: tuple
  weight_axes: PyTree
  out_axes: tuple
  combine: bool = True
  typed: bool = True


def through_experts(
  compute: Compute, x: Array, weights: PyTree, routing: Routing, plan: ExpertPlan
) -> Array:
  """Runs `compute` where the experts are, on the rows that were routed to them.

  Args:
    compute: sees one device's experts; rows of dropped choices never reach it.
    x: [g, t, d], or [g, t, k, d] with a row per choice.
    weights: of the experts, leading axis 'expert'.

  Returns:
    float32 [g, t, O] where the plan combines, else [g, t, k, O] in the dtype of x; 0 for dropped
    choices.
  """
  axes = ('act_group', None, None)
  routing = routing.replace(stats=None)
  routing_axes = routing.replace(expert_index_gtk=axes, combine_weights_gtk=axes, slot_gtk=axes)

  def on_whole_rows(weights: PyTree, rows: Array, segments: Segments | None) -> Array:
    if 'act_embed_slice' in plan.in_axes:
      rows = partitioning.gather(rows, 'act_embed_slice', dim=rows.ndim - 1)
    rows = compute(weights, rows, segments)
    if 'act_embed_slice' in plan.out_axes:
      rows = partitioning.reduce_scatter(rows, 'act_embed_slice', dim=rows.ndim - 1)
    return rows

  def local(*pieces):
    # One cast at the door, so that the hand-written gradients inside see one type of value.
    x, weights, routing = jax.tree.map(partitioning.varying, pieces)
    return plan.move(on_whole_rows, weights, x, routing, plan)

  in_axes = (plan.in_axes, plan.weight_axes, routing_axes)
  return partitioning.per_shard(
    local, in_axes, plan.out_axes, x, weights, routing, typed=plan.typed
  )


def capacity_slots(routing: Routing, num_experts: int) -> SlotMap:
  """Slots of capacity buffers laid out [e, g, c]; choices beyond the capacity are dropped."""
  capacity, (g, t, k) = routing.capacity, routing.slot_gtk.shape
  group_g11 = jnp.arange(g, dtype=jnp.int32)[:, None, None]
  num_slots = num_experts * g * capacity
  flat_gtk = (routing.expert_index_gtk * g + group_g11) * capacity + routing.slot_gtk
  served_gtk = (routing.slot_gtk >= 0) & (routing.slot_gtk < capacity)
  return slot_map(jnp.where(served_gtk, flat_gtk, num_slots).reshape(g * t, k), num_slots)


def through_slots(
  compute: Compute, weights: PyTree, x: Array, routing: Routing, plan: ExpertPlan
) -> Array:
  """Moves rows by capacity buffers that are filled by index; see through_experts."""
  slots = capacity_slots(routing, routing.num_experts)
  fill = slots if x.ndim == 3 else slots.by_choice()
  buffer_Md = dispatch(x.reshape(-1, x.shape[-1]), fill)
  buffer_eRd = buffer_Md.reshape(routing.num_experts, -1, x.shape[-1])
  buffer_eRO = on_experts(compute, weights, buffer_eRd)
  return bring_home(buffer_eRO.reshape(-1, buffer_eRO.shape[-1]), routing, slots, plan.combine)


def on_experts(compute: Compute, weights: PyTree, buffer_eRd: Array) -> Array:
  """Buffers of all experts to the devices that hold these, through them and back, [e, R, O]."""
  buffer_eRd = partitioning.exchange(buffer_eRd, 'expert', split_dim=0, concat_dim=1)
  buffer_eRO = compute(weights, buffer_eRd, None)
  return partitioning.exchange(buffer_eRO, 'expert', split_dim=1, concat_dim=0)


def bring_home(buffer_MO: Array, routing: Routing, slots: SlotMap, combined: bool) -> Array:
  """Outputs from slots to tokens: float32 [g, t, O] if combined, else [g, t, k, O]."""
  g, t, k = routing.expert_index_gtk.shape
  if not combined:
    return collect(buffer_MO, slots).reshape(g, t, k, -1)
  weights_Nk = routing.combine_weights_gtk.reshape(g * t, k)
  return combine(buffer_MO, weights_Nk, slots).reshape(g, t, -1)


def times(rows: Array, kernel_eIO: Array, segments: Segments | None) -> Array:
  """Each expert's rows times its kernel; rows as of Compute."""
  if segments is not None:
    return segments.matmul(rows, kernel_eIO)
  if hasattr(kernel_eIO, 'batched'):
    return kernel_eIO.batched(rows)  # a form of inference
  return jax.lax.dot_general(rows, kernel_eIO, (((2,), (1,)), ((0,), (0,))))
