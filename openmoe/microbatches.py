"""A batch in pieces, one after the other, to bound the memory of a step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from openmoe.types import Batch, PyTree


def microbatches(batch: Batch, count: int) -> Batch:
  """[b, t] fields -> [count, b / count, t]; microbatch i takes rows i, i + count, ...

  Strided and not contiguous: every device then finds all its rows of every microbatch at home.
  """
  split = lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
  return jax.tree.map(split, batch)


def accumulate(gradients: Callable, batch: Batch, count: int) -> tuple[PyTree, dict]:
  """Gradients and observations of the whole batch from its microbatches, one at a time."""
  pieces = microbatches(batch, count)
  part = lambda i: jax.tree.map(lambda x: x[i], pieces)
  (_, aux_shape), grads_shape = jax.eval_shape(lambda: gradients(0, part(0)))
  zeros = lambda tree: jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), tree)

  def body(i, carry):
    grads, aux = carry
    (_, new_aux), new_grads = gradients(i, part(i))
    add = lambda a, b: a + b.astype(jnp.float32)
    return jax.tree.map(add, grads, new_grads), jax.tree.map(add, aux, new_aux)

  start = (zeros(grads_shape), zeros(aux_shape))
  grads, aux = jax.lax.fori_loop(0, count, body, start)
  return grads, aux
