"""Grouped matmuls for NVIDIA GPUs. They compile here; no GPU has run or measured them so far.

On Hopper the Pallas kernels that ship with jax (Mosaic GPU); elsewhere, and for shapes those cannot
take, batched matmuls over padded experts, in as many rounds as the fullest expert needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.types import Array

_BLOCK, _BLOCK_K = 128, 64
_HOPPER = ('H100', 'H200', 'H800', 'H20', 'GH200')  # compute capability 9.0
_ROOM = 1.25  # rows of a round, as a multiple of an average expert's


def supports(device_kind: str, dtype: jnp.dtype, sides: Sequence[int]) -> bool:
  """Whether the Hopper kernels take matrices with these sides on this kind of device."""
  hopper = any(name in device_kind for name in _HOPPER)
  half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
  return hopper and half and all(side % _BLOCK == 0 for side in sides)


def _blocks(block_k: int) -> dict[str, int]:
  return {
    'block_m': _BLOCK,
    'block_n': _BLOCK,
    'block_k': block_k,
    'max_concurrent_steps': 4,
    'grid_block_n': 1,
  }


def matmul(lhs_MI: Array, rhs_eIO: Array, rows_e: Array, transpose: bool) -> Array:
  """[M, I] -> [M, O] in lhs's dtype (transposed: rhs is [e, O, I]); rows past the last are 0."""
  from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

  out_MO = ragged_dot(
    lhs_MI, rhs_eIO, group_sizes=rows_e, transpose_rhs=transpose, **_blocks(_BLOCK_K)
  )
  return jnp.where((jnp.arange(lhs_MI.shape[0]) < rows_e.sum())[:, None], out_MO, 0)


def transposed_matmul(lhs_MI: Array, dout_MO: Array, rows_e: Array) -> Array:
  """[e, I, O] in lhs's dtype: per expert the sum over its rows of lhs^T dout."""
  from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

  return transposed_ragged_dot(lhs_MI, dout_MO, group_sizes=rows_e, **_blocks(_BLOCK_K))


def _rounds(start_e: Array, rows_e: Array, total: int):
  """(rows of an expert in a round, number of rounds, round -> [e, R] row numbers).

  Numbers of rows that an expert does not have are `total`, out of bounds.
  """
  room = max(8, -(-int(_ROOM * total / rows_e.size) // 8) * 8)
  count = -(-jnp.max(rows_e) // room)

  def rows_of(r):
    within_R = r * room + jnp.arange(room, dtype=jnp.int32)
    return jnp.where(within_R < rows_e[:, None], start_e[:, None] + within_R, total)

  return room, count, rows_of


def _rows(x: Array, index_eR: Array) -> Array:
  return jnp.take(x, index_eR, axis=0, mode='fill', fill_value=0)


def padded_matmul(
  lhs_MI: Array, rhs_eIO: Array, start_e: Array, rows_e: Array, transpose: bool
) -> Array:
  """As `matmul`, by batched matmuls; at perfect balance one round with a quarter of padding."""
  _, count, rows_of = _rounds(start_e, rows_e, lhs_MI.shape[0])
  form = 'eRI,eOI->eRO' if transpose else 'eRI,eIO->eRO'

  def body(r, out_MO):
    index_eR = rows_of(r)
    out_eRO = jnp.einsum(form, _rows(lhs_MI, index_eR), rhs_eIO).astype(out_MO.dtype)
    return out_MO.at[index_eR].set(out_eRO, mode='drop', unique_indices=False)

  out_dim = rhs_eIO.shape[1] if transpose else rhs_eIO.shape[2]
  out_MO = partitioning.varying(jnp.zeros((lhs_MI.shape[0], out_dim), lhs_MI.dtype))
  return jax.lax.fori_loop(0, count, body, out_MO)


def padded_transposed_matmul(lhs_MI: Array, dout_MO: Array, start_e: Array, rows_e: Array) -> Array:
  """float32 [e, I, O]; see `padded_matmul`."""
  _, count, rows_of = _rounds(start_e, rows_e, lhs_MI.shape[0])

  def body(r, drhs_eIO):
    lhs_eRI, dout_eRO = _rows(lhs_MI, rows_of(r)), _rows(dout_MO, rows_of(r))
    return drhs_eIO + jnp.einsum(
      'eRI,eRO->eIO', lhs_eRI, dout_eRO, preferred_element_type=jnp.float32
    )

  shape = (rows_e.size, lhs_MI.shape[1], dout_MO.shape[1])
  drhs_eIO = partitioning.varying(jnp.zeros(shape, jnp.float32))
  return jax.lax.fori_loop(0, count, body, drhs_eIO)
