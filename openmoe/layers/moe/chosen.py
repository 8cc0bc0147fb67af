"""Experts for a handful of tokens, as when decoding: only the matrices of chosen experts are read.

One step of decoding is bound by reading weights, so experts that nobody chose are passed over;
where nearly all are chosen anyway, small ones are computed in one product. There is no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.layers.moe.experts import FromAll, PerExpert, ToAll, at_expert, is_split
from openmoe.types import Array, PyTree, Routing

# Tokens of a device; with more of them sorted rows waste less. Measured, docs/LOG.md.
MOST_TOKENS = 8
MOST_TOKENS_TURNED = 16


def pays(routing: Routing, weights: PyTree) -> bool:
  """Whether to compute this way here; weights are those of one device."""
  g, t, _ = routing.expert_index_gtk.shape
  if partitioning.partitions('expert') > 1:
    return False
  if _all_pay(routing, weights):
    return True
  return g * t == 1 or (g * t <= MOST_TOKENS and bool(_split(weights)))


def _split(weights: PyTree) -> list[PerExpert]:
  return [leaf for leaf in jax.tree.leaves(weights, is_leaf=is_split) if is_split(leaf)]


def through_chosen(
  compute: Callable, x: Array, weights: PyTree, routing: Routing, combine: bool
) -> Array:
  """As transport.through_experts, on one device.

  Args:
    compute: see transport.Compute; gets one expert's weights and a buffer of rows.
    x: [g, t, d], or [g, t, k, d] with a row per choice.
  """
  g, t, k = routing.expert_index_gtk.shape
  expert_nk = jnp.where(routing.slot_gtk >= 0, routing.expert_index_gtk, -1).reshape(g * t, k)
  weight_nk = routing.combine_weights_gtk.reshape(g * t, k)
  rows = x.reshape(g * t, *x.shape[2:])

  def one(weights: PyTree, rows_ni: Array) -> Array:
    return compute(jax.tree.map(lambda w: w[None], weights), rows_ni[None], None)[0]

  rest = rows, expert_nk, weight_nk, weights, combine, x.ndim == 3
  if _all_pay(routing, weights):
    y = _all_experts(compute, *rest)
  else:
    y = (_one_token if g * t == 1 else _several_tokens)(one, *rest)
  return y.reshape(g, t, -1) if combine else y.reshape(g, t, k, -1)


def _one_token(one, rows, expert_1k, weight_1k, weights, combine: bool, shared: bool) -> Array:
  """Its k experts one after the other."""
  k = expert_1k.shape[1]

  def output(choice: Array | int) -> Array:
    row_1i = rows if shared else jax.lax.dynamic_index_in_dim(rows, choice, axis=1, keepdims=False)
    expert = expert_1k[0, choice]
    return jnp.where(expert >= 0, at_expert(one, weights, jnp.maximum(expert, 0), row_1i), 0)

  like = jax.eval_shape(output, 0)
  zeros = lambda *shape: partitioning.varying(jnp.zeros((*shape, like.shape[-1]), like.dtype))
  # A loop and no list: every call of at_expert is as many programs as there are experts.
  if combine:
    add = lambda j, y: y + weight_1k[:, j, None] * output(j).astype(jnp.float32)
    return jax.lax.fori_loop(0, k, add, zeros(1).astype(jnp.float32))
  put = lambda j, y: jax.lax.dynamic_update_slice_in_dim(y, output(j)[:, None], j, axis=1)
  return jax.lax.fori_loop(0, k, put, zeros(1, k))


def _several_tokens(one, rows, expert_nk, weight_nk, weights, combine: bool, shared: bool) -> Array:
  """Every expert that a token chose, for all tokens at once; the others are passed over."""
  n = expert_nk.shape[0]
  like = jax.eval_shape(lambda: one_output(one, rows, weights, shared))
  shape = (n, like.shape[-1]) if combine else (*expert_nk.shape, like.shape[-1])
  y = partitioning.varying(jnp.zeros(shape, jnp.float32 if combine else like.dtype))
  ys = []
  for expert in range(_split(weights)[0].shape[0]):
    chosen_nk = expert_nk == expert

    def output(chosen_nk=chosen_nk, expert=expert) -> Array:
      mine = jax.tree.map(lambda w: w.arrays[expert], weights, is_leaf=is_split)
      x_ni = rows if shared else jnp.sum(jnp.where(chosen_nk[..., None], rows, 0), axis=1)
      y_no = one(mine, x_ni)
      if combine:
        weight_n = jnp.sum(jnp.where(chosen_nk, weight_nk, 0), axis=1)
        return weight_n[:, None] * y_no.astype(jnp.float32)
      return jnp.where(chosen_nk[..., None], y_no[:, None], 0).astype(y.dtype)

    ys.append(jax.lax.cond(jnp.any(chosen_nk), output, lambda: y))
  return functools.reduce(jnp.add, ys)


def _all_pay(routing: Routing, weights: PyTree) -> bool:
  """Whether nearly all experts will be chosen anyway, and lie turned."""
  g, t, k = routing.expert_index_gtk.shape
  split = _split(weights)
  turned = bool(split) and all(w.turned is not None for w in split)
  return turned and 1 < g * t <= MOST_TOKENS_TURNED and g * t * k >= split[0].shape[0]


def _all_experts(compute, rows, expert_nk, weight_nk, weights, combine: bool, shared: bool):
  """Every expert for all tokens, in one product each; see experts.times."""
  experts = _split(weights)[0].shape[0]
  chosen_enk = expert_nk == jnp.arange(experts)[:, None, None]
  weight_en = jnp.sum(jnp.where(chosen_enk, weight_nk, 0), axis=2)
  all_of = lambda w: FromAll(w.turned, weight_en) if w.sums else ToAll(w.turned)
  kernels = jax.tree.map(lambda w: all_of(w) if is_split(w) else w, weights, is_leaf=is_split)
  if shared:
    rows_eni = rows[None]
  else:
    rows_eni = jnp.sum(jnp.where(chosen_enk[..., None], rows, 0), axis=2)
  y_eno = compute(kernels, rows_eni, None)
  if combine:
    return y_eno[0].astype(jnp.float32)
  return jnp.sum(jnp.where(chosen_enk[..., None], y_eno[:, :, None], 0), axis=0)


def one_output(one, rows: Array, weights: PyTree, shared: bool) -> Array:
  """For the shape of an expert's output."""
  first = jax.tree.map(lambda w: w.arrays[0], weights, is_leaf=is_split)
  return one(first, rows if shared else rows[:, 0])
