"""Grouped matmuls by megablox, the Pallas TPU kernels that ship with jax. Unmeasured so far.

Tested on CPU in Pallas' interpret mode (tests/layers/test_grouped.py).
"""

from __future__ import annotations

import jax.numpy as jnp

from openmoe import partitioning
from openmoe.types import Array

TILE_ROWS = 128  # the number of rows must be a multiple
_TILE = 512  # of the other two dimensions; partial tiles are masked by the kernel


def _tiling(*sides: int) -> tuple[int, int, int]:
  return (TILE_ROWS, *(min(_TILE, side) for side in sides))


def _interpret() -> bool:
  return partitioning.target()[0] != 'tpu'


def matmul(lhs_mi: Array, rhs_eio: Array, rows_e: Array, transpose: bool) -> Array:
  """[m, i] -> [m, o] in lhs's dtype (transposed: rhs is [e, o, i]); rows past the last are 0."""
  # Imported when used: a CPU or GPU process has no use for the TPU dialect.
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

  out_dim = rhs_eio.shape[1] if transpose else rhs_eio.shape[2]
  out_mo = gmm(
    lhs_mi,
    rhs_eio,
    rows_e,
    lhs_mi.dtype,
    _tiling(lhs_mi.shape[1], out_dim),
    transpose_rhs=transpose,
    interpret=_interpret(),
  )
  # The kernel leaves rows without an expert unwritten.
  return jnp.where((jnp.arange(lhs_mi.shape[0]) < rows_e.sum())[:, None], out_mo, 0)


def transposed_matmul(lhs_mi: Array, dout_mo: Array, rows_e: Array) -> Array:
  """float32 [e, i, o]: per expert the sum over its rows of lhs^T dout; 0 without rows."""
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

  drhs_eio = tgmm(
    lhs_mi.swapaxes(0, 1),
    dout_mo,
    rows_e,
    jnp.float32,
    _tiling(lhs_mi.shape[1], dout_mo.shape[1]),
    interpret=_interpret(),
  )
  # An expert without rows is never visited, so its block is unwritten.
  return jnp.where((rows_e > 0)[:, None, None], drhs_eio, 0)
