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


def matmul(lhs_MI: Array, rhs_eIO: Array, rows_e: Array, transpose: bool) -> Array:
  """[M, I] -> [M, O] in lhs's dtype (transposed: rhs is [e, O, I]); rows past the last are 0."""
  # Imported when used: a CPU or GPU process has no use for the TPU dialect.
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

  out_dim = rhs_eIO.shape[1] if transpose else rhs_eIO.shape[2]
  out_MO = gmm(
    lhs_MI,
    rhs_eIO,
    rows_e,
    lhs_MI.dtype,
    _tiling(lhs_MI.shape[1], out_dim),
    transpose_rhs=transpose,
    interpret=_interpret(),
  )
  # The kernel leaves rows without an expert unwritten.
  return jnp.where((jnp.arange(lhs_MI.shape[0]) < rows_e.sum())[:, None], out_MO, 0)


def transposed_matmul(lhs_MI: Array, dout_MO: Array, rows_e: Array) -> Array:
  """float32 [e, I, O]: per expert the sum over its rows of lhs^T dout; 0 without rows."""
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

  drhs_eIO = tgmm(
    lhs_MI.swapaxes(0, 1),
    dout_MO,
    rows_e,
    jnp.float32,
    _tiling(lhs_MI.shape[1], dout_MO.shape[1]),
    interpret=_interpret(),
  )
  # An expert without rows is never visited, so its block is unwritten.
  return jnp.where((rows_e > 0)[:, None, None], drhs_eIO, 0)
