"""Kernels of experts: one stack of all, or an array for every expert.

Training holds a stack [e, i, o]. On a CPU XLA copies what it slices from a stack before it
multiplies, which costs a step of decoding ten times the reading; so there every expert has arrays
of its own, and the one that is wanted is chosen by a branch (docs/LOG.md). Small experts lie there
once more, turned, for steps whose rows choose nearly all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from openmoe.types import Array, PyTree


@flax.struct.dataclass
class PerExpert:
  """What stands for a stack [e, i, ...] whose slices are separate arrays.

  Attributes:
    arrays: of the experts.
    turned: optionally all of them again, for `times`: [e, ..., i], or [o, e, i] where sums.
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

  def reshape(self, experts: int, *shape: int) -> PerExpert:
    assert experts == len(self.arrays)
    return PerExpert(tuple(x.reshape(shape) for x in self.arrays))


Stack = Array | PerExpert
TURNED = 'kernel_turned'  # parameter


def is_split(x) -> bool:
  return isinstance(x, PerExpert)


def split_axes(weights: PyTree, axes: PyTree) -> PyTree:
  """Logical axes of `weights`, given those of stacks."""
  is_axes = lambda a: isinstance(a, tuple) and all(x is None or isinstance(x, str) for x in a)

  def one(axes: tuple, weight: Stack):
    if not is_split(weight):
      return axes
    return PerExpert((axes[1:],) * len(weight.arrays), sums=weight.sums)

  return jax.tree.map(one, axes, weights, is_leaf=is_axes)


def at_expert(fn: Callable, weights: PyTree, expert: Array, *args):
  """fn(weights of one expert, *args) for an expert that only the data know.

  Args:
    weights: leaves are stacks [e, ...] or PerExpert, all of one kind.
    expert: int32 scalar.
  """
  split = [leaf for leaf in jax.tree.leaves(weights, is_leaf=is_split) if is_split(leaf)]
  if not split:
    of = lambda w: jax.lax.dynamic_index_in_dim(w, expert, keepdims=False)
    return fn(jax.tree.map(of, weights), *args)
  pick = lambda i: jax.tree.map(lambda w: w.arrays[i], weights, is_leaf=is_split)
  branches = [lambda *a, i=i: fn(pick(i), *a) for i in range(len(split[0].arrays))]
  return jax.lax.switch(expert, branches, *args)


@flax.struct.dataclass
class ToAll:
  """Kernels of all experts for rows that they share, [e, ..., i]."""

  array: Array


@flax.struct.dataclass
class FromAll:
  """Kernels of all experts whose outputs are weighted and summed.

  Attributes:
    array: [o, e, i].
    weight_en: float32 weight of a row's output, 0 where the row did not choose the expert.
  """

  array: Array
  weight_en: Array


def times(rows_eri: Array, kernel: Array | ToAll | FromAll) -> Array:
  """Each expert's rows times its kernel, [e, r, i] -> [e, r, ...].

  ToAll takes rows [1, r, i]; FromAll gives them. Those are for few rows on a CPU: one product for
  all experts, with the kernels on the left, because XLA's library packs the right side first. The
  barriers keep it from computing activations inside products, element by element (docs/LOG.md).
  """
  barrier = jax.lax.optimization_barrier
  flat = lambda array, rows: jax.lax.dot_general(array, barrier(rows), (((1,), (1,)), ((), ())))
  match kernel:
    case ToAll(array):
      i, r = array.shape[-1], rows_eri.shape[1]
      product = barrier(flat(array.reshape(-1, i), rows_eri[0]))
      return jnp.moveaxis(product.reshape(*array.shape[:-1], r), -1, 1)
    case FromAll(array, weight_en):
      # No row of an expert that nobody chose may matter, infinite or not.
      weighted = jnp.where(weight_en[..., None] == 0, 0, weight_en[..., None] * rows_eri)
      rows = weighted.astype(rows_eri.dtype).swapaxes(0, 1).reshape(rows_eri.shape[1], -1)
      return barrier(flat(array.reshape(array.shape[0], -1), rows)).T[None]
    case _:
      return jax.lax.dot_general(rows_eri, kernel, (((2,), (1,)), ((0,), (0,))))


class ExpertKernel(nn.Module):
  """A float32 stack named `kernel`, or `kernel_0`, ... where the parameters are split by expert.

  Beside the latter `kernel_turned` may stand; see PerExpert.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  init: nn.initializers.Initializer

  @nn.compact
  def __call__(self) -> Stack:
    if not self.has_variable('params', split_name(0)):
      init = nn.with_logical_partitioning(self.init, self.axes)
      return self.param('kernel', init, self.shape, jnp.float32)
    zeros = nn.initializers.zeros  # never called: the parameters are there
    one = lambda i: self.param(split_name(i), zeros, self.shape[1:], jnp.float32)
    arrays = tuple(one(i) for i in range(self.shape[0]))
    sums, turned = self.axes[-1] == 'embed', None
    if self.has_variable('params', TURNED):
      turned = self.param(TURNED, zeros, turned_shape(self.shape, sums), jnp.float32)
    return PerExpert(arrays, turned, sums)


def turned_shape(shape: tuple[int, ...], sums: bool) -> tuple[int, ...]:
  """Of PerExpert.turned, given that of the stack."""
  return (shape[2], *shape[:2]) if sums else (shape[0], *shape[2:], shape[1])


def turn(arrays: Sequence[Array], sums: bool) -> Array:
  """PerExpert.turned from the arrays of experts."""
  stack = jnp.stack(arrays)
  return jnp.moveaxis(stack, 2, 0) if sums else jnp.moveaxis(stack, 1, -1)


def split_name(expert: int) -> str:
  return f'kernel_{expert}'
