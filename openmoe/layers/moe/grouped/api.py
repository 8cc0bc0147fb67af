"""Grouped matmul: rows sorted by expert, each multiplied with its own expert's matrix.

This file lays rows out in segments of one expert, and is the one place that chooses the kernel for
the platform and the shapes; gradients are written by hand here, once for all kernels.
`lax.ragged_dot` is not used: on CPU and GPU it expands to all experts for every row, and on TPU its
weight gradient does (docs/LOG.md).
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from openmoe.layers.moe.exchange import SlotMap, slot_map, take
from openmoe.layers.moe.grouped import blocked, gpu, tpu
from openmoe.types import Array, PyTree


class Kernel(enum.Enum):
  """Who multiplies. All give the same numbers to rounding."""

  BLOCKED = 'blocked'  # loops over chunks of rows: CPU
  MEGABLOX = 'megablox'  # the Pallas kernels that ship with jax: TPU; unmeasured
  MOSAIC_GPU = 'mosaic_gpu'  # the Pallas kernels that ship with jax: Hopper GPUs; unmeasured
  PADDED = 'padded'  # batched matmuls over padded experts: other GPUs and shapes; unmeasured

  @property
  def untyped(self) -> bool:
    """Whether it must run in partitioning.per_shard(typed=False)."""
    return self in (Kernel.MEGABLOX, Kernel.MOSAIC_GPU)


@flax.struct.dataclass
class Segments:
  """Where the rows of each expert lie.

  Attributes:
    start_e: int32 first row of each expert's segment; segments are in order and do not overlap.
    rows_e: int32 rows of each segment, padding included.
    parts: the same segments in chunks, for Kernel.BLOCKED.
    kernel: who multiplies.
  """

  start_e: Array
  rows_e: Array
  parts: tuple[blocked.Chunks, ...]
  kernel: Kernel = flax.struct.field(pytree_node=False)

  def expert_of_rows(self, rows: int) -> Array:
    """int32 [m] expert of each row; rows behind the last segment get the last expert."""
    ends_e = self.start_e + self.rows_e
    expert_m = jnp.searchsorted(ends_e, jnp.arange(rows, dtype=jnp.int32), side='right')
    return jnp.minimum(expert_m, ends_e.size - 1)

  def matmul(self, lhs_mi: Array, rhs_eio: Array) -> Array:
    """See grouped_matmul."""
    return grouped_matmul(lhs_mi, rhs_eio, self)

  def mlp(self, x_md: Array, weights: PyTree, activation: Callable) -> Array:
    """See grouped_mlp; weights are layer.ExpertWeights."""
    e, d = weights.wi_0_eduf.shape[:2]
    wi_0_edp = weights.wi_0_eduf.reshape(e, d, -1)
    rest = (weights.wi_1_edf, weights.wo_efd, weights.keep_ef)
    return grouped_mlp(x_md, wi_0_edp, *rest, self, activation)


def choose_kernel(platform: str, device_kind: str, dtype: jnp.dtype, *sides: int) -> Kernel:
  """The kernel for one device, for experts whose matrices have these sides there.

  >>> choose_kernel('gpu', 'NVIDIA H100 80GB HBM3', jnp.bfloat16, 2048, 5632)
  <Kernel.MOSAIC_GPU: 'mosaic_gpu'>
  >>> choose_kernel('gpu', 'NVIDIA H100 80GB HBM3', jnp.bfloat16, 2048, 5632 // 8)
  <Kernel.PADDED: 'padded'>
  """
  match platform:
    case 'tpu':
      return Kernel.MEGABLOX
    case 'gpu' | 'cuda' | 'rocm':
      return Kernel.MOSAIC_GPU if gpu.supports(device_kind, dtype, sides) else Kernel.PADDED
    case _:
      return Kernel.BLOCKED


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
  rank_r = jnp.arange(expert_r.size, dtype=jnp.int32) - take(first_e, sorted_r)
  slot_r = jnp.where(sorted_r < num_experts, take(start_e, sorted_r) + rank_r, num_slots)
  slot_nk = jnp.zeros_like(expert_r).at[order_r].set(slot_r).reshape(expert_nk.shape)
  return slot_map(slot_nk, num_slots)


def block_layout(
  expert_nk: Array,
  num_experts: int,
  kernel: Kernel = Kernel.BLOCKED,
  one_size: bool = False,
) -> tuple[SlotMap, Segments]:
  """Places every routed row into its expert's segment; nothing is dropped.

  Args:
    expert_nk: int32; num_experts marks a row that is not routed.
    one_size: for Kernel.BLOCKED, chunks of one size: a smaller program, some more padding.
  """
  rows, in_chunks = expert_nk.size, kernel is Kernel.BLOCKED
  sizes = blocked.ladder(rows, num_experts)
  if one_size:
    # An average segment, half of one where that is large: padding against repeated packing.
    sizes = (sizes[0] if sizes[0] <= 32 else sizes[0] // 2,)
  align = sizes[-1] if in_chunks else 1
  # Every expert wastes less than one alignment; the kernels of accelerators want whole tiles.
  unit = align if in_chunks else tpu.TILE_ROWS
  num_slots = -(-(rows + num_experts * (align - 1)) // unit) * unit
  counts_e = jnp.bincount(expert_nk.reshape(-1), length=num_experts + 1)[:num_experts]
  rows_e = (-(-counts_e // align) * align).astype(jnp.int32)
  start_e = (jnp.cumsum(rows_e) - rows_e).astype(jnp.int32)
  slots = sorted_slots(expert_nk, num_experts, start_e, num_slots)
  parts = ()
  if in_chunks:
    parts = tuple(blocked.chunks(start_e, rows_e, sizes, num_slots))
  return slots, Segments(start_e, rows_e, parts, kernel)


def _matmul(lhs_mi: Array, rhs_eio: Array, segments: Segments, transpose: bool) -> Array:
  match segments.kernel:
    case Kernel.BLOCKED:
      return blocked.matmul(lhs_mi, rhs_eio, segments.parts, transpose)
    case Kernel.MEGABLOX:
      return tpu.matmul(lhs_mi, rhs_eio, segments.rows_e, transpose)
    case Kernel.MOSAIC_GPU:
      return gpu.matmul(lhs_mi, rhs_eio, segments.rows_e, transpose)
    case Kernel.PADDED:
      return gpu.padded_matmul(lhs_mi, rhs_eio, segments.start_e, segments.rows_e, transpose)


def _transposed_matmul(lhs_mi: Array, dout_mo: Array, segments: Segments) -> Array:
  """Per expert the sum over its rows of lhs^T dout, [e, i, o]; 0 for experts without rows."""
  start_e, rows_e = segments.start_e, segments.rows_e
  match segments.kernel:
    case Kernel.BLOCKED:
      return blocked.transposed_matmul(lhs_mi, dout_mo, segments.parts, rows_e.size)
    case Kernel.MEGABLOX:
      return tpu.transposed_matmul(lhs_mi, dout_mo, rows_e)
    case Kernel.MOSAIC_GPU:
      return gpu.transposed_matmul(lhs_mi, dout_mo, rows_e)
    case Kernel.PADDED:
      return gpu.padded_transposed_matmul(lhs_mi, dout_mo, start_e, rows_e)


@jax.custom_vjp
def grouped_matmul(lhs_mi: Array, rhs_eio: Array, segments: Segments) -> Array:
  """[m, i] x [e, i, o] -> [m, o] in lhs's dtype; rows outside the segments are zero."""
  return _matmul(lhs_mi, rhs_eio, segments, transpose=False)


def _grouped_fwd(lhs_mi, rhs_eio, segments):
  return grouped_matmul(lhs_mi, rhs_eio, segments), (lhs_mi, rhs_eio, segments)


def _grouped_bwd(residuals, dout_mo):
  lhs_mi, rhs_eio, segments = residuals
  dlhs_mi = _matmul(dout_mo, rhs_eio, segments, transpose=True)
  drhs_eio = _transposed_matmul(lhs_mi, dout_mo, segments)
  return dlhs_mi, drhs_eio.astype(rhs_eio.dtype), None


grouped_matmul.defvjp(_grouped_fwd, _grouped_bwd)


def grouped_mlp(
  x_md: Array,
  wi_0_edp: Array,
  wi_1_edf: Array | None,
  wo_efd: Array,
  keep_ef: Array | None,
  segments: Segments,
  activation: Callable,
) -> Array:
  """Each row through its expert's gated MLP, [m, d] -> [m, d].

  Args:
    wi_0_edp: [e, d, 2f], the two halves of the gate side by side.
    wi_1_edf: None for gates without a linear factor of their own.
    keep_ef: multiplies the hidden units; has no gradient.
    activation: (gate [..., 2, f], linear [..., f] or None) -> [..., f].
  """
  weights = (wi_0_edp, wi_1_edf, wo_efd, keep_ef)
  if segments.kernel is Kernel.BLOCKED:
    return _blocked_mlp(x_md, weights, segments.parts, activation)
  gate_mp = grouped_matmul(x_md, wi_0_edp, segments)
  linear_mf = None if wi_1_edf is None else grouped_matmul(x_md, wi_1_edf, segments)
  h_mf = activation(gate_mp.reshape(x_md.shape[0], 2, -1), linear_mf)
  if keep_ef is not None:
    h_mf = h_mf * keep_ef[segments.expert_of_rows(x_md.shape[0])]
  return grouped_matmul(h_mf, wo_efd, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked_mlp(x_md, weights, parts, activation):
  return blocked.mlp(x_md, weights, parts, activation, save=False)


def _blocked_mlp_fwd(x_md, weights, parts, activation):
  out_md, *pre = blocked.mlp(x_md, weights, parts, activation, save=True)
  return out_md, (x_md, weights, parts, *pre)


def _blocked_mlp_bwd(activation, residuals, dout_md):
  x_md, weights, parts, gate_mp, linear_mf = residuals
  dx_md, grads = blocked.mlp_gradients(
    x_md, weights, gate_mp, linear_mf, dout_md, parts, activation
  )
  cast = lambda g, w: None if w is None else g.astype(w.dtype)
  dweights = (*map(cast, grads, weights[:3]), None)
  return dx_md, dweights, None


_blocked_mlp.defvjp(_blocked_mlp_fwd, _blocked_mlp_bwd)
