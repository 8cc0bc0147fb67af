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


def matmul(lhs_mi: Array, rhs_eio: Array, rows_e: Array, transpose: bool) -> Array:
  """[m, i] -> [m, o] in lhs's dtype (transposed: rhs is [e, o, i]); rows past the last are 0."""
  from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

  out_mo = ragged_dot(
    lhs_mi, rhs_eio, group_sizes=rows_e, transpose_rhs=transpose, **_blocks(_BLOCK_K)
  )
  return jnp.where((jnp.arange(lhs_mi.shape[0]) < rows_e.sum())[:, None], out_mo, 0)


def transposed_matmul(lhs_mi: Array, dout_mo: Array, rows_e: Array) -> Array:
  """[e, i, o] in lhs's dtype: per expert the sum over its rows of lhs^T dout."""
  from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

  return transposed_ragged_dot(lhs_mi, dout_mo, group_sizes=rows_e, **_blocks(_BLOCK_K))


def _rounds(start_e: Array, rows_e: Array, total: int):
  """(rows of an expert in a round, number of rounds, round -> [e, c] row numbers).

  Numbers of rows that an expert does not have are `total`, out of bounds.
  """
  room = max(8, -(-int(_ROOM * total / rows_e.size) // 8) * 8)
  count = -(-jnp.max(rows_e) // room)

  def rows_of(r):
    within_c = r * room + jnp.arange(room, dtype=jnp.int32)
    return jnp.where(within_c < rows_e[:, None], start_e[:, None] + within_c, total)

  return room, count, rows_of


def _rows(x: Array, index_ec: Array) -> Array:
  return jnp.take(x, index_ec, axis=0, mode='fill', fill_value=0)


def padded_matmul(
  lhs_mi: Array, rhs_eio: Array, start_e: Array, rows_e: Array, transpose: bool
) -> Array:
  """As `matmul`, by batched matmuls; at perfect balance one round with a quarter of padding."""
  _, count, rows_of = _rounds(start_e, rows_e, lhs_mi.shape[0])
  form = 'eci,eoi->eco' if transpose else 'eci,eio->eco'

  def body(r, out_mo):
    index_ec = rows_of(r)
    out_eco = jnp.einsum(form, _rows(lhs_mi, index_ec), rhs_eio).astype(out_mo.dtype)
    return out_mo.at[index_ec].set(out_eco, mode='drop', unique_indices=False)

  out_dim = rhs_eio.shape[1] if transpose else rhs_eio.shape[2]
  out_mo = partitioning.varying(jnp.zeros((lhs_mi.shape[0], out_dim), lhs_mi.dtype))
  return jax.lax.fori_loop(0, count, body, out_mo)


def padded_transposed_matmul(lhs_mi: Array, dout_mo: Array, start_e: Array, rows_e: Array) -> Array:
  """float32 [e, i, o]; see `padded_matmul`."""
  _, count, rows_of = _rounds(start_e, rows_e, lhs_mi.shape[0])

  def body(r, drhs_eio):
    lhs_eci, dout_eco = _rows(lhs_mi, rows_of(r)), _rows(dout_mo, rows_of(r))
    return drhs_eio + jnp.einsum(
      'eci,eco->eio', lhs_eci, dout_eco, preferred_element_type=jnp.float32
    )

  shape = (rows_e.size, lhs_mi.shape[1], dout_mo.shape[1])
  drhs_eio = partitioning.varying(jnp.zeros(shape, jnp.float32))
  return jax.lax.fori_loop(0, count, body, drhs_eio)
