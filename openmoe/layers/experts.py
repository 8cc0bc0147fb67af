"""Kernels of experts: one stack of all, or an array for every expert.

Training holds a stack [e, i, o]. On a CPU XLA copies what it slices from a stack before it
multiplies, which costs a step of decoding ten times the reading; so there every expert has arrays
of its own, and the one that is wanted is chosen by a branch (docs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from openmoe.types import Array, PyTree


@flax.struct.dataclass
class PerExpert:
  """What stands for a stack [e, ...] whose slices are separate arrays."""

  arrays: tuple[Array, ...]

  @property
  def shape(self) -> tuple[int, ...]:
    return (len(self.arrays), *self.arrays[0].shape)

  @property
  def dtype(self) -> jnp.dtype:
    return self.arrays[0].dtype

  def astype(self, dtype: jnp.dtype) -> PerExpert:
    return PerExpert(tuple(x.astype(dtype) for x in self.arrays))

  def reshape(self, experts: int, *shape: int) -> PerExpert:
    assert experts == len(self.arrays)
    return PerExpert(tuple(x.reshape(shape) for x in self.arrays))


Stack = Array | PerExpert


def _is_split(x) -> bool:
  return isinstance(x, PerExpert)


def split_axes(weights: PyTree, axes: PyTree) -> PyTree:
  """Logical axes of `weights`, given those of stacks."""
  is_axes = lambda a: isinstance(a, tuple) and all(x is None or isinstance(x, str) for x in a)

  def one(axes: tuple, weight: Stack):
    return PerExpert((axes[1:],) * len(weight.arrays)) if _is_split(weight) else axes

  return jax.tree.map(one, axes, weights, is_leaf=is_axes)


def at_expert(fn: Callable, weights: PyTree, expert: Array, *args):
  """fn(weights of one expert, *args) for an expert that only the data know.

  Args:
    weights: leaves are stacks [e, ...] or PerExpert, all of one kind.
    expert: int32 scalar.
  """
  split = [leaf for leaf in jax.tree.leaves(weights, is_leaf=_is_split) if _is_split(leaf)]
  if not split:
    of = lambda w: jax.lax.dynamic_index_in_dim(w, expert, keepdims=False)
    return fn(jax.tree.map(of, weights), *args)
  pick = lambda i: jax.tree.map(lambda w: w.arrays[i], weights, is_leaf=_is_split)
  branches = [lambda *a, i=i: fn(pick(i), *a) for i in range(len(split[0].arrays))]
  return jax.lax.switch(expert, branches, *args)


class ExpertKernel(nn.Module):
  """A float32 stack named `kernel`, or `kernel_0`, ... where the parameters are split by expert."""

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
    return PerExpert(tuple(one(i) for i in range(self.shape[0])))


def split_name(expert: int) -> str:
  return f'kernel_{expert}'
