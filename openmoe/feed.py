"""From the rows this process reads to arrays that are global over the mesh.

A process reads the logical shards of the stream whose rows its devices need; where a model axis
spans processes, several read the same shard, and only the first of them saves its position.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from openmoe.config import ConfigError, DataConfig
from openmoe.data.stages import StagedStream
from openmoe.data.stream import evaluation_batches, padding_batch
from openmoe.partitioning import batch_sharding
from openmoe.programme import Programme
from openmoe.types import Array, Batch


def _shards_of_rows(config: DataConfig, rows: slice) -> range:
  each = config.batch_size // config.num_shards
  start = rows.start or 0
  stop = config.batch_size if rows.stop is None else rows.stop
  return range(start // each, -(-stop // each))


def shard_owners(mesh: jax.sharding.Mesh, config: DataConfig) -> dict[int, list[int]]:
  """Logical shard -> sorted indices of the processes whose devices need its rows.

  Raises:
    ConfigError: the mesh cannot split the rows.
  """
  pieces = mesh.shape['data'] * mesh.shape['expert']
  if config.batch_size % pieces:
    raise ConfigError(
      f'batch_size={config.batch_size} of split {config.split!r} does not divide over data x '
      f'expert = {pieces} devices; use a multiple of {pieces}.'
    )
  owners: dict[int, set[int]] = {shard: set() for shard in range(config.num_shards)}
  shape = (config.batch_size, config.row_length)
  for device, (rows, _) in batch_sharding(mesh).devices_indices_map(shape).items():
    for shard in _shards_of_rows(config, rows):
      owners[shard].add(device.process_index)
  return {shard: sorted(processes) for shard, processes in owners.items()}


class Feed:
  """Iterator over global batches on the mesh; a context manager.

  Attributes:
    last: the local numpy rows of the newest batch, for error reports.
  """

  def __init__(self, mesh: jax.sharding.Mesh, programme: Programme, step: int = 0):
    """Opens the stage of global step `step`, whose data begin there unless restore() follows."""
    self._mesh = mesh
    self._owners: tuple[DataConfig, dict[int, list[int]]] | None = None
    self._stream = StagedStream(programme, self._shards, step)
    self.last: Batch | None = None

  def _shards(self, config: DataConfig) -> list[int]:
    """Logical shards that this process reads."""
    if self._owners is None or self._owners[0] is not config:
      self._owners = config, shard_owners(self._mesh, config)  # once a stage
    me = jax.process_index()
    return [shard for shard, processes in self._owners[1].items() if me in processes]

  def __enter__(self) -> Feed:
    return self

  def __exit__(self, *unused) -> None:
    self._stream.close()

  def __iter__(self) -> Iterator[Batch]:
    """Starts reading ahead; compile while it does."""
    iter(self._stream)
    return self

  def __next__(self) -> Batch:
    """The next global batch.

    Raises:
      StopIteration: finite data have ended, in all processes after the same step.
    """
    ends = self._stream.ends
    local = next(self._stream, None)
    if ends and jax.process_count() > 1:
      more = multihost_utils.process_allgather(np.array([local is not None]))
      if local is None and np.any(more):
        local = self._stream.pad()
    if local is None:
      raise StopIteration
    self.last = local
    config = self._stream.data
    return place(self._mesh, config, self._shards(config), self.last)

  def ready(self, seconds: float) -> bool:
    """Whether the next batch is there, waited for so long at most; see ShardedStream.ready."""
    return self._stream.ready(seconds)

  def digests(self) -> dict[str, str]:
    """A digest of the newest batch's rows by logical shard, of the shards that this process reads.

    The same on any mesh and any number of processes.
    """
    config = self._stream.data
    each = config.batch_size // config.num_shards
    fields = [np.asarray(getattr(self.last, f.name)) for f in dataclasses.fields(Batch)]
    digest = lambda rows: hashlib.sha256(b''.join(f[rows].tobytes() for f in fields)).hexdigest()
    return {
      str(shard): digest(slice(i * each, (i + 1) * each))[:32]
      for i, shard in enumerate(self._shards(config))
    }

  def state(self, seconds: float = 60.0) -> dict[str, bytes]:
    """Stream positions that this process saves, by shard; see ShardedStream.state."""
    shards, entries = self._shards(self._stream.data), self._stream.state(seconds)
    return {
      name: entries[name]
      for name, shard in zip(entries, shards, strict=True)
      if self._owners[1][shard][0] == jax.process_index()
    }

  def restore(self, entries: Mapping[str, bytes]) -> None:
    self._stream.restore(entries)


def evaluation_feed(mesh: jax.sharding.Mesh, config: DataConfig, num_batches: int) -> list[Batch]:
  """The same global batches every time, on the mesh: as many as the split holds, on any hosts.

  Raises:
    ConfigError: the split gives no batch at all.
  """
  owners, me = shard_owners(mesh, config), jax.process_index()
  mine = [shard for shard, processes in owners.items() if me in processes]
  local = list(evaluation_batches(config, num_batches, mine))
  count = int(np.max(multihost_utils.process_allgather(np.array(len(local)))))
  if num_batches and not count:
    raise ConfigError(
      f'Split {config.split!r} of {config.mixture_or_task_name} gave no batch; give it more data.'
    )
  local += [padding_batch(config, len(mine))] * (count - len(local))
  return [place(mesh, config, mine, batch) for batch in local]


def place(mesh: jax.sharding.Mesh, config: DataConfig, shards: list[int], local: Batch) -> Batch:
  """Local rows, in shard order, as global [b, t] arrays."""
  each = config.batch_size // config.num_shards
  where = {shard: i * each for i, shard in enumerate(shards)}
  sharding = batch_sharding(mesh)

  def globalise(rows: np.ndarray) -> Array:
    def piece(index: tuple[slice, ...]) -> np.ndarray:
      wanted = _shards_of_rows(config, index[0])
      first = wanted[0]
      block = np.concatenate([rows[where[s] : where[s] + each] for s in wanted])
      start, stop, _ = index[0].indices(config.batch_size)
      return block[start - first * each : stop - first * each]

    return jax.make_array_from_callback((config.batch_size, rows.shape[1]), sharding, piece)

  return jax.tree.map(globalise, local)
