"""Experts outside the device: in host memory, or in a file of which a budget is kept in memory.

Only experts that a token chose are brought in, each kernel for itself; the rest of the model stays
on the device. As soon as a layer's router has decided, all that it chose is read ahead by threads
while the first expert computes. Tokens are those of the model in memory: the same arrays go through
the same products, and only where they lie differs.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import threading
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from openmoe.config import ConfigError
from openmoe.types import Array, PyTree

OFFLOADS = ('none', 'ram', 'disk')
_THREADS = 2  # that read ahead


@dataclasses.dataclass
class Traffic:
  """What went through a store.

  Attributes:
    hits, misses: kernels that were there when they were wanted, and others.
    ahead: misses that a thread had begun to read.
    read_bytes: from the stacks.
    peak_bytes: most that was held at a time.
  """

  hits: int = 0
  misses: int = 0
  ahead: int = 0
  read_bytes: int = 0
  peak_bytes: int = 0


class Store:
  """Kernels of experts by (stack, expert), the ones used last within a budget.

  Args:
    budget: bytes that are held; None holds nothing, for stacks that are in memory themselves.
  """

  def __init__(self, budget: int | None):
    self.budget, self.traffic = budget, Traffic()
    self.bytes = 0  # of all stacks
    self._stacks: list[np.ndarray] = []
    self._types: list[np.dtype] = []
    self._held: collections.OrderedDict[tuple[int, int], np.ndarray] = collections.OrderedDict()
    self._reading: dict[tuple[int, int], concurrent.futures.Future] = {}
    self._used = 0
    self._lock = threading.Lock()
    self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS, 'experts')

  def add(self, stack: np.ndarray, dtype: np.dtype) -> Offloaded:
    """A stack [e, I, ...O] that lies outside, as what stands for it among parameters.

    Raises:
      ConfigError: the budget does not hold what is in use at a time.
    """
    self._stacks.append(stack)
    self._types.append(np.dtype(dtype))
    one = stack[0].size * np.dtype(dtype).itemsize
    self.bytes += one * len(stack)
    if self.budget is not None and one * (_THREADS + 1) > self.budget:
      raise ConfigError(
        f'expert_budget={self.budget} bytes does not hold {_THREADS + 1} kernels of {one} bytes, '
        'which are read at a time; give a larger one.'
      )
    return Offloaded(self, len(self._stacks) - 1, stack.shape, jnp.dtype(dtype))

  def want(self, stack: int, experts: np.ndarray) -> None:
    """Begins to read what will be asked for next."""
    if self.budget is None:
      return
    for expert in np.unique(np.asarray(experts)).tolist():
      key = (stack, expert)
      with self._lock:
        if expert >= 0 and key not in self._held and key not in self._reading:
          self._reading[key] = self._pool.submit(self._read, key)

  def get(self, stack: int, expert: int) -> np.ndarray:
    """The kernel [I, ...O] of an expert."""
    key = (stack, int(expert))
    if self.budget is None:
      return np.asarray(self._stacks[stack][key[1]], self._types[stack])
    with self._lock:
      found = self._held.get(key)
      if found is not None:
        self._held.move_to_end(key)
        self.traffic.hits += 1
        return found
      self.traffic.misses += 1
      under_way = self._reading.get(key)
      self.traffic.ahead += under_way is not None
    return self._read(key) if under_way is None else under_way.result()

  def _read(self, key: tuple[int, int]) -> np.ndarray:
    stack, expert = key
    # A copy: of a memory-mapped file this is where the disk is read.
    found = np.array(self._stacks[stack][expert], self._types[stack])
    with self._lock:
      self._reading.pop(key, None)
      self.traffic.read_bytes += found.nbytes
      while self._held and self._used + found.nbytes > self.budget:
        self._used -= self._held.popitem(last=False)[1].nbytes
      if key not in self._held:
        self._used += found.nbytes
      self._held[key] = found
      self.traffic.peak_bytes = max(self.traffic.peak_bytes, self._used)
    return found

  def expert(self, stack: int, expert: int) -> np.ndarray:
    """As get(), past the cache."""
    return np.asarray(self._stacks[stack][expert], self._types[stack])


@flax.struct.dataclass
class Offloaded:
  """What stands for a stack [e, I, ...O] that is elsewhere. A leaf without arrays.

  Attributes:
    store, stack: where.
    shape, dtype: of the stack.
  """

  store: Any = flax.struct.field(pytree_node=False)
  stack: int = flax.struct.field(pytree_node=False)
  shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
  dtype: Any = flax.struct.field(pytree_node=False)

  def astype(self, dtype: jnp.dtype) -> Offloaded:
    assert jnp.dtype(dtype) == self.dtype, (dtype, self.dtype)
    return self

  def at_expert(self, expert: Array) -> Array:
    """[I, ...O] on the device."""
    result = jax.ShapeDtypeStruct(self.shape[1:], self.dtype)
    return jax.pure_callback(functools.partial(self.store.get, self.stack), result, expert)

  def pieces(self) -> list[np.ndarray]:
    """Every expert, for a fingerprint."""
    return [self.store.expert(self.stack, e) for e in range(self.shape[0])]


def is_offloaded(x: Any) -> bool:
  return isinstance(x, Offloaded)


def announce(weights: PyTree, expert_Nk: Array) -> None:
  """Says inside a program which experts of some leaves will be asked for; -1 for none."""
  for leaf in jax.tree.leaves(weights, is_leaf=is_offloaded):
    if is_offloaded(leaf) and leaf.store.budget is not None:
      io_callback(functools.partial(leaf.store.want, leaf.stack), None, expert_Nk)
