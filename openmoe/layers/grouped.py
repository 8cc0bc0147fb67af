"""Grouped matmul: consecutive blocks of rows, each multiplied with its own expert's matrix.

Rows sorted by expert are laid out in segments padded to a multiple of the block, so every block
has one expert; a loop over the blocks in use does the work and nothing else. `lax.ragged_dot` is
not used: on CPU and GPU it expands to all experts for every row, and on TPU its weight gradient
does (docs/LOG.md).
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.layers.dispatch import SlotMap, sorted_slots
from openmoe.types import Array

BLOCK_SIZES = (128, 64, 32, 16, 8)


@flax.struct.dataclass
class Blocks:
  """Which expert each block of rows belongs to.

  Attributes:
    expert_b: int32 expert of each block; only the first num_used mean anything.
    num_used: int32 scalar.
    size: rows per block.
  """

  expert_b: Array
  num_used: Array
  size: int = flax.struct.field(pytree_node=False)


def block_size(rows: int, num_experts: int) -> int:
  """Largest block that leaves an average expert at least two, so padding stays near 25 %."""
  fits = [size for size in BLOCK_SIZES if size * 2 * num_experts <= rows]
  return fits[0] if fits else BLOCK_SIZES[-1]


def block_layout(expert_nk: Array, num_experts: int) -> tuple[SlotMap, Blocks]:
  """Places every routed row into blocks of one expert each; nothing is dropped.

  Args:
    expert_nk: int32; num_experts marks a row that is not routed.
  """
  size = block_size(expert_nk.size, num_experts)
  # Every expert wastes less than one block, whatever the distribution.
  num_blocks = expert_nk.size // size + num_experts
  counts_e = jnp.bincount(expert_nk.reshape(-1), length=num_experts + 1)[:num_experts]
  blocks_e = -(-counts_e // size)
  ends_e = jnp.cumsum(blocks_e)
  start_e = ((ends_e - blocks_e) * size).astype(jnp.int32)
  slots = sorted_slots(expert_nk, num_experts, start_e, num_blocks * size)
  expert_b = jnp.searchsorted(ends_e, jnp.arange(num_blocks), side='right')
  expert_b = jnp.minimum(expert_b, num_experts - 1).astype(jnp.int32)
  return slots, Blocks(expert_b=expert_b, num_used=ends_e[-1].astype(jnp.int32), size=size)


def _matmul(lhs_mi: Array, rhs_eio: Array, blocks: Blocks, transpose: bool) -> Array:
  """lhs block times its expert's matrix (transposed: rhs is [e, o, i]); [m, i] -> [m, o]."""
  out_dim = rhs_eio.shape[1] if transpose else rhs_eio.shape[2]
  contract = ((1,), (1,)) if transpose else ((1,), (0,))

  def body(b, out_mo):
    lhs = jax.lax.dynamic_slice_in_dim(lhs_mi, b * blocks.size, blocks.size)
    rhs = jax.lax.dynamic_index_in_dim(rhs_eio, blocks.expert_b[b], keepdims=False)
    out = jax.lax.dot_general(lhs, rhs, (contract, ((), ())))
    return jax.lax.dynamic_update_slice_in_dim(out_mo, out, b * blocks.size, 0)

  out_mo = partitioning.varying(jnp.zeros((lhs_mi.shape[0], out_dim), lhs_mi.dtype))
  return jax.lax.fori_loop(0, blocks.num_used, body, out_mo)


def _transposed_matmul(lhs_mi: Array, dout_mo: Array, blocks: Blocks, num_experts: int) -> Array:
  """Per expert the sum over its blocks of lhs^T dout, float32 [e, i, o]; 0 for unused experts."""

  def body(b, drhs_eio):
    lhs = jax.lax.dynamic_slice_in_dim(lhs_mi, b * blocks.size, blocks.size)
    dout = jax.lax.dynamic_slice_in_dim(dout_mo, b * blocks.size, blocks.size)
    part = jax.lax.dot_general(
      lhs, dout, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    expert = blocks.expert_b[b]
    old = jax.lax.dynamic_index_in_dim(drhs_eio, expert, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(drhs_eio, old + part, expert, 0)

  shape = (num_experts, lhs_mi.shape[1], dout_mo.shape[1])
  drhs_eio = partitioning.varying(jnp.zeros(shape, jnp.float32))
  return jax.lax.fori_loop(0, blocks.num_used, body, drhs_eio)


@jax.custom_vjp
def grouped_matmul(lhs_mi: Array, rhs_eio: Array, blocks: Blocks) -> Array:
  """[m, i] x [e, i, o] -> [m, o] in lhs's dtype; rows of unused blocks are zero."""
  return _matmul(lhs_mi, rhs_eio, blocks, transpose=False)


def _grouped_fwd(lhs_mi, rhs_eio, blocks):
  return grouped_matmul(lhs_mi, rhs_eio, blocks), (lhs_mi, rhs_eio, blocks)


def _grouped_bwd(residuals, dout_mo):
  lhs_mi, rhs_eio, blocks = residuals
  dlhs_mi = _matmul(dout_mo, rhs_eio, blocks, transpose=True)
  drhs_eio = _transposed_matmul(lhs_mi, dout_mo, blocks, rhs_eio.shape[0])
  return dlhs_mi, drhs_eio.astype(rhs_eio.dtype), None


grouped_matmul.defvjp(_grouped_fwd, _grouped_bwd)
