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
    """int32 [M] expert of each row; rows behind the last segment get the last expert."""
    ends_e = self.start_e + self.rows_e
    expert_M = jnp.searchsorted(ends_e, jnp.arange(rows, dtype=jnp.int32), side='right')
    return jnp.minimum(expert_M, ends_e.size - 1)

  def matmul(self, lhs_MI: Array, rhs_eIO: Array) -> Array:
    """See grouped_matmul."""
    return grouped_matmul(lhs_MI, rhs_eIO, self)

  def mlp(self, x_Md: Array, weights: PyTree, activation: Callable) -> Array:
    """See grouped_mlp; weights are layer.ExpertWeights."""
    e, d = weights.wi_0_eduf.shape[:2]
    wi_0_edF = weights.wi_0_eduf.reshape(e, d, -1)
    rest = (weights.wi_1_edf, weights.wo_efd, weights.keep_ef)
    return grouped_mlp(x_Md, wi_0_edF, *rest, self, activation)


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


def sorted_slots(expert_Nk: Array, num_experts: int, start_e: Array, num_slots: int) -> SlotMap:
  """Slots in expert order: the i-th row of expert e goes to start_e[e] + i.

  Args:
    expert_Nk: int32; num_experts marks a row that is not routed.
    start_e: int32 [num_experts] first slot of each expert's segment.
  """
  expert_R = expert_Nk.reshape(-1)
  order_R = jnp.argsort(expert_R, stable=True)
  sorted_R = expert_R[order_R]
  experts_e = jnp.arange(num_experts, dtype=sorted_R.dtype)
  first_e = jnp.sum(expert_R[:, None] < experts_e, axis=0, dtype=jnp.int32)
  rank_R = jnp.arange(expert_R.size, dtype=jnp.int32) - take(first_e, sorted_R)
  slot_R = jnp.where(sorted_R < num_experts, take(start_e, sorted_R) + rank_R, num_slots)
  slot_Nk = jnp.zeros_like(expert_R).at[order_R].set(slot_R).reshape(expert_Nk.shape)
  return slot_map(slot_Nk, num_slots)


def block_layout(
  expert_Nk: Array,
  num_experts: int,
  kernel: Kernel = Kernel.BLOCKED,
  one_size: bool = False,
) -> tuple[SlotMap, Segments]:
  """Places every routed row into its expert's segment; nothing is dropped.

  Args:
    expert_Nk: int32; num_experts marks a row that is not routed.
    one_size: for Kernel.BLOCKED, chunks of one size: a smaller program, some more padding.
  """
  rows, in_chunks = expert_Nk.size, kernel is Kernel.BLOCKED
  sizes = blocked.ladder(rows, num_experts)
  if one_size:
    # An average segment, half of one where that is large: padding against repeated packing.
    sizes = (sizes[0] if sizes[0] <= 32 else sizes[0] // 2,)
  align = sizes[-1] if in_chunks else 1
  # Every expert wastes less than one alignment; the kernels of accelerators want whole tiles.
  unit = align if in_chunks else tpu.TILE_ROWS
  num_slots = -(-(rows + num_experts * (align - 1)) // unit) * unit
  counts_e = jnp.bincount(expert_Nk.reshape(-1), length=num_experts + 1)[:num_experts]
  rows_e = (-(-counts_e // align) * align).astype(jnp.int32)
  start_e = (jnp.cumsum(rows_e) - rows_e).astype(jnp.int32)
  slots = sorted_slots(expert_Nk, num_experts, start_e, num_slots)
  parts = ()
  if in_chunks:
    parts = tuple(blocked.chunks(start_e, rows_e, sizes, num_slots))
  return slots, Segments(start_e, rows_e, parts, kernel)


def _matmul(lhs_MI: Array, rhs_eIO: Array, segments: Segments, transpose: bool) -> Array:
  match segments.kernel:
    case Kernel.BLOCKED:
      return blocked.matmul(lhs_MI, rhs_eIO, segments.parts, transpose)
    case Kernel.MEGABLOX:
      return tpu.matmul(lhs_MI, rhs_eIO, segments.rows_e, transpose)
    case Kernel.MOSAIC_GPU:
      return gpu.matmul(lhs_MI, rhs_eIO, segments.rows_e, transpose)
    case Kernel.PADDED:
      return gpu.padded_matmul(lhs_MI, rhs_eIO, segments.start_e, segments.rows_e, transpose)


def _transposed_matmul(lhs_MI: Array, dout_MO: Array, segments: Segments) -> Array:
  """Per expert the sum over its rows of lhs^T dout, [e, I, O]; 0 for experts without rows."""
  start_e, rows_e = segments.start_e, segments.rows_e
  match segments.kernel:
    case Kernel.BLOCKED:
      return blocked.transposed_matmul(lhs_MI, dout_MO, segments.parts, rows_e.size)
    case Kernel.MEGABLOX:
      return tpu.transposed_matmul(lhs_MI, dout_MO, rows_e)
    case Kernel.MOSAIC_GPU:
      return gpu.transposed_matmul(lhs_MI, dout_MO, rows_e)
    case Kernel.PADDED:
      return gpu.padded_transposed_matmul(lhs_MI, dout_MO, start_e, rows_e)


@jax.custom_vjp
def grouped_matmul(lhs_MI: Array, rhs_eIO: Array, segments: Segments) -> Array:
  """[M, I] x [e, I, O] -> [M, O] in lhs's dtype; rows outside the segments are zero."""
  return _matmul(lhs_MI, rhs_eIO, segments, transpose=False)


def _grouped_fwd(lhs_MI, rhs_eIO, segments):
  return grouped_matmul(lhs_MI, rhs_eIO, segments), (lhs_MI, rhs_eIO, segments)


def _grouped_bwd(residuals, dout_MO):
  lhs_MI, rhs_eIO, segments = residuals
  dlhs_MI = _matmul(dout_MO, rhs_eIO, segments, transpose=True)
  drhs_eIO = _transposed_matmul(lhs_MI, dout_MO, segments)
  return dlhs_MI, drhs_eIO.astype(rhs_eIO.dtype), None


grouped_matmul.defvjp(_grouped_fwd, _grouped_bwd)


def grouped_mlp(
  x_Md: Array,
  wi_0_edF: Array,
  wi_1_edf: Array | None,
  wo_efd: Array,
  keep_ef: Array | None,
  segments: Segments,
  activation: Callable,
) -> Array:
  """Each row through its expert's gated MLP, [M, d] -> [M, d].

  Args:
    wi_0_edF: [e, d, F], the two halves of the gate side by side.
    wi_1_edf: None for gates without a linear factor of their own.
    keep_ef: multiplies the hidden units; has no gradient.
    activation: (gate [..., 2, f], linear [..., f] or None) -> [..., f].
  """
  weights = (wi_0_edF, wi_1_edf, wo_efd, keep_ef)
  if segments.kernel is Kernel.BLOCKED:
    return _blocked_mlp(x_Md, weights, segments.parts, activation)
  gate_MF = grouped_matmul(x_Md, wi_0_edF, segments)
  linear_Mf = None if wi_1_edf is None else grouped_matmul(x_Md, wi_1_edf, segments)
  h_Mf = activation(gate_MF.reshape(x_Md.shape[0], 2, -1), linear_Mf)
  if keep_ef is not None:
    h_Mf = h_Mf * keep_ef[segments.expert_of_rows(x_Md.shape[0])]
  return grouped_matmul(h_Mf, wo_efd, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked_mlp(x_Md, weights, parts, activation):
  return blocked.mlp(x_Md, weights, parts, activation, save=False)


def _blocked_mlp_fwd(x_Md, weights, parts, activation):
  out_Md, *pre = blocked.mlp(x_Md, weights, parts, activation, save=True)
  return out_Md, (x_Md, weights, parts, *pre)


def _blocked_mlp_bwd(activation, residuals, dout_Md):
  x_Md, weights, parts, gate_MF, linear_Mf = residuals
  dx_Md, grads = blocked.mlp_gradients(
    x_Md, weights, gate_MF, linear_Mf, dout_Md, parts, activation
  )
  cast = lambda g, w: None if w is None else g.astype(w.dtype)
  dweights = (*map(cast, grads, weights[:3]), None)
  return dx_Md, dweights, None


_blocked_mlp.defvjp(_blocked_mlp_fwd, _blocked_mlp_bwd)
