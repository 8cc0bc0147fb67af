"""Grouped matmuls as loops over chunks of rows: the form for CPUs.

A segment (the rows of one expert) is cut into few large chunks and a short tail of small ones, so
matrix products stay large and hardly any padding is computed. All chunks of one size are one loop;
trip counts depend on the routing, shapes do not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.types import Array, PyTree

# Large chunks first. An accumulation into a weight gradient costs as much as a product of about 50
# rows, hence the large ones; the smallest is the most that an expert's last chunk can waste.
LADDER = (512, 256, 128, 64, 32, 16, 8)


@flax.struct.dataclass
class Chunks:
  """All chunks of one size.

  Attributes:
    start_C: int32 first row of each chunk.
    expert_C: int32 its expert.
    count: int32 scalar, chunks in use; the others mean nothing.
    size: rows per chunk.
  """

  start_C: Array
  expert_C: Array
  count: Array
  size: int = flax.struct.field(pytree_node=False)


def ladder(rows: int, num_experts: int) -> tuple[int, ...]:
  """Chunk sizes for this many rows: from about an average segment down to a sixteenth of it."""
  fits = [size for size in LADDER if size * num_experts <= rows] or [LADDER[-1]]
  return tuple(size for size in fits if size * 16 >= fits[0])


def chunks(start_e: Array, rows_e: Array, sizes: tuple[int, ...], max_rows: int) -> list[Chunks]:
  """Cuts segments into chunks, the largest first; every row of a segment is in one chunk.

  Segments must be multiples of the smallest size.
  """
  result, done_e = [], jnp.zeros_like(rows_e)
  last = rows_e.size - 1
  for i, size in enumerate(sizes):
    count_e = (rows_e - done_e) // size
    # Below the largest size an expert has fewer chunks than the next larger size holds.
    bound = max_rows // size if i == 0 else rows_e.size * (sizes[i - 1] // size - 1)
    end_e = jnp.cumsum(count_e)
    index_C = jnp.arange(bound, dtype=jnp.int32)
    expert_C = jnp.minimum(
      jnp.searchsorted(end_e, index_C, side='right', method='compare_all'), last
    )
    within_C = index_C - (end_e - count_e)[expert_C]
    start_C = (start_e + done_e)[expert_C] + within_C * size
    result.append(Chunks(start_C.astype(jnp.int32), expert_C.astype(jnp.int32), end_e[-1], size))
    done_e = done_e + count_e * size
  return result


def _zeros(shape: tuple[int, ...], dtype) -> Array:
  return partitioning.varying(jnp.zeros(shape, dtype))


def loop(parts: list[Chunks], body: Callable, carry):
  """carry = body(rows, put, expert, carry) for every chunk; the sizes one after the other."""
  for part in parts:

    def step(c, carry, part=part):
      start = part.start_C[c]
      rows = lambda x: jax.lax.dynamic_slice_in_dim(x, start, part.size)
      put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), start, 0)
      return body(rows, put, part.expert_C[c], carry)

    carry = jax.lax.fori_loop(0, part.count, step, carry)
  return carry


def _of(weights: PyTree, expert: Array) -> PyTree:
  """Weights of one expert from stacks [e, ...]."""
  return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, expert, keepdims=False), weights)


def _add_to(x_eIO: Array, expert: Array, part_IO: Array) -> Array:
  new = _of(x_eIO, expert) + part_IO.reshape(x_eIO.shape[1:])
  return jax.lax.dynamic_update_index_in_dim(x_eIO, new, expert, 0)


_dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
_NN, _NT, _TN = [(((i,), (j,)), ((), ())) for i, j in ((1, 0), (1, 1), (0, 0))]


def matmul(lhs_MI: Array, rhs_eIO: Array, parts: list[Chunks], transpose: bool) -> Array:
  """Each row times its expert's matrix (transposed: rhs is [e, O, I]); [M, I] -> [M, O]."""

  def body(rows, put, expert, out_MO):
    return put(out_MO, _dot(rows(lhs_MI), _of(rhs_eIO, expert), _NT if transpose else _NN))

  out_dim = rhs_eIO.shape[1] if transpose else rhs_eIO.shape[2]
  return loop(parts, body, _zeros((lhs_MI.shape[0], out_dim), lhs_MI.dtype))


def transposed_matmul(lhs_MI: Array, dout_MO: Array, parts: list[Chunks], num_experts: int):
  """Per expert the sum over its rows of lhs^T dout, float32 [e, I, O]; 0 without rows."""

  def body(rows, put, expert, drhs_eIO):
    return _add_to(drhs_eIO, expert, _dot(rows(lhs_MI), rows(dout_MO), _TN))

  shape = (num_experts, lhs_MI.shape[1], dout_MO.shape[1])
  return loop(parts, body, _zeros(shape, jnp.float32))


def _hidden(gate_MF: Array, linear_Mf: Array | None, keep_f: Array | None, activation: Callable):
  """Hidden units of some rows from the products with wi_0 ([M, F]) and wi_1 ([M, f])."""
  h_Mf = activation(gate_MF.reshape(gate_MF.shape[0], 2, -1), linear_Mf)
  return h_Mf if keep_f is None else h_Mf * keep_f


def mlp(x_Md: Array, weights, parts: list[Chunks], activation: Callable, save: bool):
  """A gated MLP per expert, one pass over the rows: a chunk stays in cache for all its products.

  Args:
    weights: (wi_0 [e, d, F], wi_1 [e, d, f] or None, wo [e, f, d], keep [e, f] or None).
    activation: (gate [..., 2, f], linear [..., f] or None) -> [..., f].
    save: also return the products with wi_0 and wi_1, which the backward pass wants.

  Returns:
    [M, d], or ([M, d], [M, F], [M, f] or None).
  """
  wi_0, wi_1, wo, _ = weights
  buffer = lambda like: None if like is None else _zeros((x_Md.shape[0], like.shape[2]), x_Md.dtype)

  def one(weights, x):
    wi_0, wi_1, wo, keep = weights
    product = lambda w: None if w is None else _dot(x, w, _NN).astype(x.dtype)
    pre = product(wi_0), product(wi_1)
    out = _dot(_hidden(*pre, keep, activation), wo, _NN)
    return (out, *pre) if save else (out,)

  def body(rows, put, expert, carry):
    new = one(_of(weights, expert), rows(x_Md))
    return tuple(None if n is None else put(old, n) for old, n in zip(carry, new, strict=True))

  carry = loop(parts, body, (buffer(wo), buffer(wi_0), buffer(wi_1)) if save else (buffer(wo),))
  return carry if save else carry[0]


def mlp_gradients(x_Md: Array, weights, gate_MF, linear_Mf, dout_Md, parts, activation: Callable):
  """Gradients for x and for (wi_0, wi_1, wo), the latter float32; see `mlp`."""
  wi_0, wi_1, wo, keep = weights
  zeros = lambda w: None if w is None else _zeros(w.shape, jnp.float32)

  def body(rows, put, expert, carry):
    dx_Md, dwi_0, dwi_1, dwo = carry
    of = lambda w: None if w is None else _of(w, expert)
    hidden = lambda gate, linear: _hidden(gate, linear, of(keep), activation)
    pre = tuple(None if p is None else rows(p) for p in (gate_MF, linear_Mf))
    h, pull = jax.vjp(hidden, *pre)
    x, dout = rows(x_Md), rows(dout_Md)
    dwo = _add_to(dwo, expert, _dot(h, dout, _TN))
    dgate, dlinear = pull(_dot(dout, of(wo), _NT).astype(h.dtype))
    dx = _dot(dgate, of(wi_0), _NT)
    dwi_0 = _add_to(dwi_0, expert, _dot(x, dgate, _TN))
    if wi_1 is not None:
      dx += _dot(dlinear, of(wi_1), _NT)
      dwi_1 = _add_to(dwi_1, expert, _dot(x, dlinear, _TN))
    return put(dx_Md, dx), dwi_0, dwi_1, dwo

  start = (_zeros(x_Md.shape, x_Md.dtype), zeros(wi_0), zeros(wi_1), zeros(wo))
  dx_Md, *dweights = loop(parts, body, start)
  return dx_Md, tuple(dweights)
