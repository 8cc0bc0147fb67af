"""Arrays as an item of a checkpoint, whose bytes are digested by the process that wrote them.

orbax gives every process a folder of its own for its parts of the arrays. When they are written,
still in the background and before anything is committed, the process describes them in a file
beside; the manifest takes these over, so that no process reads back what others wrote.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from openmoe.checkpoint import manifest
from openmoe.types import PyTree

LARGEST_CHUNK = 256 << 20  # bytes of a parameter that are compressed together
LEAST_SLICE = 16 << 20  # bytes that a device writes of an array that others hold as well


def tell_once() -> None:
  """Leaves tracebacks of orbax out of the logs: what it raises is told by whoever called it.

  It logs them itself, and asyncio logs those of writes that nobody waits for after another failed.
  """
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).addFilter(_is_not_of_orbax)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
  if not record.exc_info:
    return True
  frames = traceback.extract_tb(record.exc_info[2])
  places = [record.pathname, *(frame.filename for frame in frames)]
  return not any(f'{os.sep}orbax{os.sep}' in place for place in places)


class ArraysHandler(ocp.StandardCheckpointHandler):
  """orbax's own handler and format; adds the digests of what this process wrote."""

  @classmethod
  def typestr(cls) -> str:
    """The name that checkpoints carry: what is written is orbax's."""
    return ocp.StandardCheckpointHandler.typestr()

  async def async_save(self, directory, item=None, save_args=None, args=None):
    futures = await super().async_save(directory, item, save_args, args)
    return [_Digested(futures or [], epath.Path(getattr(directory, 'path', directory)))]


class _Digested:
  """A future of orbax's: the writes of this process and then their digests."""

  def __init__(self, writes: Sequence[Any], directory: epath.Path):
    self._writes = writes
    self._directory = directory
    self._done = False

  def result(self, timeout: float | None = None) -> None:
    deadline = None if timeout is None else time.monotonic() + timeout
    for write in self._writes:
      write.result(None if deadline is None else max(0.0, deadline - time.monotonic()))
    if not self._done:
      manifest.describe_own(self._directory, jax.process_index())
      self._done = True

  def cancel(self) -> None:
    for write in self._writes:
      write.cancel()


def registry(*items: str) -> ocp.handlers.DefaultCheckpointHandlerRegistry:
  """Lets these items of a checkpoint be saved and restored by ArraysHandler.

  Given to the manager and not to orbax's global table, where orbax's own handler has the name.
  """
  _write_small_arrays_whole()
  found = ocp.handlers.DefaultCheckpointHandlerRegistry()
  for item in items:
    handler = ArraysHandler()
    found.add(item, ocp.args.StandardSave, handler)
    found.add(item, ocp.args.StandardRestore, handler)
  return found


def _write_small_arrays_whole() -> None:
  """Lets orbax share out the writing of an array among its replicas only where that pays.

  By itself it cuts every array into a slice a replica, by a program for each place: some 570
  compilations at the first save of a small model on eight devices. The field is private, because
  the handler that takes it as an argument wants others of orbax's private classes.
  """
  ocp.type_handlers.get_type_handler(jax.Array)._min_slice_bytes_for_replica_parallel = LEAST_SLICE


def with_sharding(abstract: PyTree) -> PyTree:
  """Gives leaves without a sharding this process's first device, as a plain jit would."""
  single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def place(leaf):
    sharding = getattr(leaf, 'sharding', None) or single
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(place, abstract)


def save_args(tree: PyTree) -> PyTree:
  """Chunks of at most LARGEST_CHUNK, split along the leading axes first.

  Those are the stacked layers and the experts, so that a converter reads one of them without
  decoding all; by itself orbax makes one chunk of everything a device holds.
  """

  def one(leaf: jax.Array) -> ocp.SaveArgs:
    lead, size = 0, leaf.nbytes
    while size > LARGEST_CHUNK and lead < min(2, leaf.ndim - 2):
      size //= leaf.shape[lead]
      lead += 1
    if not lead and size <= LARGEST_CHUNK:
      return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=LARGEST_CHUNK, shard_axes=tuple(range(lead)))

  return jax.tree.map(one, tree)
