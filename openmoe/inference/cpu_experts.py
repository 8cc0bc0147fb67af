"""Experts for inference: few tokens read few matrices. There is no gradient.

Training holds a stack of kernels [e, I, O]. One step of decoding is bound by reading weights, so
here experts that nobody chose are passed over. On a CPU XLA copies what it slices from a stack
before it multiplies, which costs ten times the reading; so there every expert has arrays of its
own (PerExpert), and the one that is wanted is chosen by a branch (docs/LOG.md). Small experts lie
there once more, turned, for steps whose rows choose nearly all of them.

`run_experts` is what the layers of a model take in place of exchange.through_experts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.inference.int8 import FEW_ROWS, is_int8
from openmoe.inference.offload import announce, is_offloaded
from openmoe.layers.moe.exchange import Compute, ExpertPlan, bring_home, dispatch, through_experts
from openmoe.layers.moe.grouped import blocked
from openmoe.layers.moe.grouped.api import Kernel, block_layout
from openmoe.layers.moe.grouped.sorted import chosen_experts
from openmoe.types import Array, PyTree, Routing

# Tokens of a device; with more of them sorted rows waste less. Measured, docs/LOG.md.
MOST_TOKENS = 8
MOST_TOKENS_TURNED = 16


@flax.struct.dataclass
class PerExpert:
  """What stands for a stack [e, I, ...] whose slices are separate arrays.

  Attributes:
    arrays: of the experts.
    turned: optionally all of them again, for products of all: [e, ..., I], or [O, e, I] where sums.
    sums: whether what comes out is summed over experts, as of an output projection.
  """

  arrays: tuple[Array, ...]
  turned: Array | None = None
  sums: bool = flax.struct.field(default=False, pytree_node=False)

  @property
  def shape(self) -> tuple[int, ...]:
    return (len(self.arrays), *self.arrays[0].shape)

  @property
  def dtype(self) -> jnp.dtype:
    return self.arrays[0].dtype

  def astype(self, dtype: jnp.dtype) -> PerExpert:
    return jax.tree.map(lambda x: x.astype(dtype), self)

  def turn(self) -> PerExpert:
    """The same with its arrays turned as well."""
    stack = jnp.stack(self.arrays)
    return self.replace(turned=jnp.moveaxis(stack, *((2, 0) if self.sums else (1, -1))))


def is_split(x) -> bool:
  return isinstance(x, PerExpert)


def split_axes(weights: PyTree, axes: PyTree) -> PyTree:
  """Logical axes of `weights`, given those of stacks."""
  is_axes = lambda a: isinstance(a, tuple) and all(x is None or isinstance(x, str) for x in a)

  def one(axes: tuple, weight: Array | PerExpert):
    if is_offloaded(weight):
      return weight
    if is_int8(weight):
      return weight.replace(values=axes, scale=(axes[0], *axes[2:]))
    if not is_split(weight):
      return axes
    return PerExpert((axes[1:],) * len(weight.arrays), sums=weight.sums)

  return jax.tree.map(one, axes, weights, is_leaf=is_axes)


def _split(weights: PyTree) -> list[PerExpert]:
  return [leaf for leaf in jax.tree.leaves(weights, is_leaf=is_split) if is_split(leaf)]


def _by_expert(x) -> bool:
  """Whether it gives one expert's kernel by itself."""
  return is_int8(x) or is_offloaded(x)


def _is_form(x) -> bool:
  return is_split(x) or _by_expert(x)


def _expert(weights: PyTree, expert: int) -> PyTree:
  """Weights of one expert whose number is known now."""
  of = lambda w: w.arrays[expert] if is_split(w) else w.at_expert(jnp.int32(expert))
  return jax.tree.map(of, weights, is_leaf=_is_form)


def at_expert(fn: Callable, weights: PyTree, expert: Array, *args):
  """fn(weights of one expert, *args) for an expert that only the data know.

  Args:
    weights: leaves are stacks [e, ...] or PerExpert, all of one kind.
    expert: int32 scalar.
  """
  split = _split(weights)
  if not split:
    index = lambda w: jax.lax.dynamic_index_in_dim(w, expert, keepdims=False)
    of = lambda w: w.at_expert(expert) if _by_expert(w) else index(w)
    return fn(jax.tree.map(of, weights, is_leaf=_by_expert), *args)
  branches = [lambda *a, i=i: fn(_expert(weights, i), *a) for i in range(len(split[0].arrays))]
  return jax.lax.switch(expert, branches, *args)


def run_experts(
  compute: Compute, x: Array, weights: PyTree, routing: Routing, plan: ExpertPlan
) -> Array:
  """Takes the place of exchange.through_experts; with a capacity it changes nothing.

  Args:
    weights: leaves are stacks or PerExpert, all of one kind.
  """
  if routing.capacity is None:
    move = functools.partial(_move, otherwise=plan.move)
    axes = split_axes(weights, plan.weight_axes)
    plan = dataclasses.replace(plan, move=move, weight_axes=axes)
  return through_experts(compute, x, weights, routing, plan)


@dataclasses.dataclass(frozen=True)
class _Rows:
  """What one device has to compute.

  Attributes:
    compute: see exchange.Compute.
    weights: of this device.
    x: [N, I] if shared, else [N, k, I] with a row per choice.
    expert_Nk: int32; -1 for a choice that is not routed.
    weight_Nk: float32 combine weights.
    combine: whether outputs are weighted and summed over the choices.
  """

  compute: Compute
  weights: PyTree
  x: Array
  expert_Nk: Array
  weight_Nk: Array
  combine: bool

  @property
  def shared(self) -> bool:
    return self.x.ndim == 2

  def row(self, i: int) -> _Rows:
    """One token."""
    of = lambda x: x[i : i + 1]
    return dataclasses.replace(
      self, x=of(self.x), expert_Nk=of(self.expert_Nk), weight_Nk=of(self.weight_Nk)
    )

  def one(self, weights: PyTree, rows_RI: Array) -> Array:
    """Some rows through one expert, [R, I] -> [R, O]."""
    lone = lambda w: w if is_int8(w) else w[None]
    return self.compute(jax.tree.map(lone, weights, is_leaf=is_int8), rows_RI[None], None)[0]


def _move(
  compute: Compute,
  weights: PyTree,
  x: Array,
  routing: Routing,
  plan: ExpertPlan,
  *,
  otherwise: Callable[..., Array],
) -> Array:
  """Chooses how to compute; see exchange.ExpertPlan.move."""
  g, t, k = routing.expert_index_gtk.shape
  split, tokens = _split(weights), g * t
  alone = tokens == 1 and partitioning.partitions('expert') == 1
  kinds = jax.tree.leaves(weights, is_leaf=_by_expert)
  if not (split or alone or any(map(_by_expert, kinds))):
    return otherwise(compute, weights, x, routing, plan)
  rows = _Rows(
    compute,
    weights,
    x.reshape(tokens, *x.shape[2:]),
    chosen_experts(routing, -1),
    routing.combine_weights_gtk.reshape(tokens, k),
    plan.combine,
  )
  announce(weights, rows.expert_Nk)
  turned = bool(split) and all(w.turned is not None for w in split)
  # Turned experts pay where nearly all will be chosen anyway.
  if turned and 1 < tokens <= MOST_TOKENS_TURNED and tokens * k >= routing.num_experts:
    y = _all_experts(rows)
  elif alone:
    y = _one_token(rows)
  elif any(map(is_int8, kinds)) and tokens <= FEW_ROWS:
    y = jnp.concatenate([_one_token(rows.row(i)) for i in range(tokens)])
  elif tokens <= MOST_TOKENS:
    y = _several_tokens(rows)
  else:
    y = _chunks(rows, routing, plan)
  return y.reshape(g, t, *y.shape[1:])


def _one_token(rows: _Rows) -> Array:
  """One token through its k experts, one after the other."""
  k = rows.expert_Nk.shape[1]
  at = lambda x, choice: jax.lax.dynamic_index_in_dim(x, choice, axis=1, keepdims=False)

  def output(choice: Array | int) -> Array:
    row_1I = rows.x if rows.shared else at(rows.x, choice)
    expert = rows.expert_Nk[0, choice]
    y = at_expert(rows.one, rows.weights, jnp.maximum(expert, 0), row_1I)
    return jnp.where(expert >= 0, y, 0)

  like = jax.eval_shape(output, 0)
  zeros = lambda *shape: partitioning.varying(jnp.zeros((*shape, like.shape[-1]), like.dtype))
  # A loop and no list: every call of at_expert is as many programs as there are experts.
  if rows.combine:
    add = lambda j, y: y + rows.weight_Nk[:, j, None] * output(j).astype(jnp.float32)
    return jax.lax.fori_loop(0, k, add, zeros(1).astype(jnp.float32))
  put = lambda j, y: jax.lax.dynamic_update_slice_in_dim(y, output(j)[:, None], j, axis=1)
  return jax.lax.fori_loop(0, k, put, zeros(1, k))


def _several_tokens(rows: _Rows) -> Array:
  """Every expert that a token chose, for all tokens at once; the others are passed over."""
  like = _one_output(rows, rows.x if rows.shared else rows.x[:, 0])
  n, k = rows.expert_Nk.shape
  shape = (n, like.shape[-1]) if rows.combine else (n, k, like.shape[-1])
  y = partitioning.varying(jnp.zeros(shape, jnp.float32 if rows.combine else like.dtype))
  ys = []
  for expert in range(_count(rows.weights)):
    chosen_Nk = rows.expert_Nk == expert

    def output(chosen_Nk=chosen_Nk, expert=expert) -> Array:
      x_NI = rows.x
      if not rows.shared:
        x_NI = jnp.sum(jnp.where(chosen_Nk[..., None], rows.x, 0), axis=1)
      y_NO = rows.one(_expert(rows.weights, expert), x_NI)
      if rows.combine:
        weight_N = jnp.sum(jnp.where(chosen_Nk, rows.weight_Nk, 0), axis=1)
        return weight_N[:, None] * y_NO.astype(jnp.float32)
      return jnp.where(chosen_Nk[..., None], y_NO[:, None], 0).astype(y.dtype)

    ys.append(jax.lax.cond(jnp.any(chosen_Nk), output, lambda: y))
  return functools.reduce(jnp.add, ys)


def _count(weights: PyTree) -> int:
  """How many experts there are."""
  return jax.tree.leaves(weights, is_leaf=_is_form)[0].shape[0]


def _one_output(rows: _Rows, x_RI: Array) -> jax.ShapeDtypeStruct:
  """Shape of an expert's output for some rows."""
  return jax.eval_shape(lambda: rows.one(_expert(rows.weights, 0), x_RI))


def _all_experts(rows: _Rows) -> Array:
  """Every expert for all tokens, in one product each."""
  experts = _split(rows.weights)[0].shape[0]
  chosen_eNk = rows.expert_Nk == jnp.arange(experts)[:, None, None]
  weight_eN = jnp.sum(jnp.where(chosen_eNk, rows.weight_Nk, 0), axis=2)
  if rows.shared:
    x_eNI = rows.x[None]
  else:
    x_eNI = jnp.sum(jnp.where(chosen_eNk[..., None], rows.x, 0), axis=2)
  y_eNO = rows.compute(rows.weights, x_eNI, _Turned(weight_eN))
  if rows.combine:
    return y_eNO[0].astype(jnp.float32)
  return jnp.sum(jnp.where(chosen_eNk[..., None], y_eNO[:, :, None], 0), axis=0)


@dataclasses.dataclass(frozen=True)
class _Turned:
  """exchange.Segments by turned kernels, for few rows on a CPU: one product for all experts.

  Rows are [1, N, I] or [e, N, I]; outputs of kernels that sum are [1, N, O]. The kernels stand on
  the left, because XLA's library packs the right side first. The barriers keep it from computing
  activations inside products, element by element (docs/LOG.md).

  Attributes:
    weight_eN: float32 weight of a row's output, 0 where the row did not choose the expert.
  """

  weight_eN: Array

  def matmul(self, rows_eNI: Array, kernel: PerExpert) -> Array:
    turned, barrier = kernel.turned, jax.lax.optimization_barrier
    flat = lambda array, rows: jax.lax.dot_general(array, barrier(rows), (((1,), (1,)), ((), ())))
    if not kernel.sums:
      product = barrier(flat(turned.reshape(-1, turned.shape[-1]), rows_eNI[0]))
      return jnp.moveaxis(product.reshape(*turned.shape[:-1], -1), -1, 1)
    # No row of an expert that nobody chose may matter, infinite or not.
    weight_eN1 = self.weight_eN[..., None]
    weighted = jnp.where(weight_eN1 == 0, 0, weight_eN1 * rows_eNI).astype(rows_eNI.dtype)
    rows_NQ = weighted.swapaxes(0, 1).reshape(rows_eNI.shape[1], -1)
    return barrier(flat(turned.reshape(turned.shape[0], -1), rows_NQ)).T[None]

  def mlp(self, rows_1Nd: Array, weights: PyTree, activation: Callable) -> Array:
    linear = None if weights.wi_1_edf is None else self.matmul(rows_1Nd, weights.wi_1_edf)
    h_eNf = activation(self.matmul(rows_1Nd, weights.wi_0_eduf), linear)
    return self.matmul(h_eNf, weights.wo_efd)


def _chunks(rows: _Rows, routing: Routing, plan: ExpertPlan) -> Array:
  """Many tokens, sorted by expert, in chunks of one expert each; see grouped.blocked."""
  experts = routing.num_experts
  # One size of chunks: every size is as many programs as there are experts.
  expert_Nk = chosen_experts(routing, experts)
  slots, segments = block_layout(expert_Nk, experts, Kernel.BLOCKED, one_size=True)
  x_Rd = rows.x.reshape(-1, rows.x.shape[-1])
  buffer_MI = dispatch(x_Rd, slots if rows.shared else slots.by_choice())

  def body(piece, put, expert, out_MO):
    return put(out_MO, at_expert(rows.one, rows.weights, expert, piece(buffer_MI)))

  like = _one_output(rows, buffer_MI)
  out_MO = partitioning.varying(jnp.zeros(like.shape, buffer_MI.dtype))
  y = bring_home(blocked.loop(segments.parts, body, out_MO), routing, slots, plan.combine)
  return y.reshape(-1, *y.shape[2:])
