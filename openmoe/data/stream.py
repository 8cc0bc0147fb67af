"""The resumable global stream of batches.

The global batch at a step is the rows of `num_shards` logical shards, in shard order, whoever owns
them; so it is the same on any number of hosts and after any restart. A host iterates over the
shards it owns and saves one entry per shard; another division of the hosts reads the same entries.

Rows are read ahead in a background thread. A saved position holds what was read ahead as well, so
it is exact at the last batch that was yielded and replays nothing.
"""

from __future__ import annotations

import atexit
import collections
import dataclasses
import functools
import itertools
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence

from absl import logging

from openmoe.config import ConfigError, DataConfig
from openmoe.data import features
from openmoe.data.features import Row
from openmoe.data.shard import Shard, shard_name
from openmoe.types import Batch

# Batches read ahead.
_AHEAD = 4
# Seconds that closing waits for a read that is under way. A mount that hangs may never answer.
_PATIENCE = 10.0


def _check_shards(config: DataConfig, shard_ids: Sequence[int]) -> list[int]:
  ids = list(shard_ids)
  if not ids or sorted(set(ids)) != ids or ids[0] < 0 or ids[-1] >= config.num_shards:
    raise ConfigError(
      f'shard_ids={ids} must be increasing numbers in 0..{config.num_shards - 1} (num_shards).'
    )
  return ids


# Mixtures whose reading thread could not be ended in this process.
abandoned: list[str] = []


class ShardedStream:
  """Iterator over the numpy Batches of some logical shards; a context manager.

  A Batch holds batch_size / num_shards rows of each shard, in shard order.
  """

  def __init__(self, config: DataConfig, shard_ids: Sequence[int], wanted: str | int | None = None):
    """Opens the shards' pipelines; reading starts with the first batch.

    Args:
      wanted: a document whose examples are marked, see Shard.

    Raises:
      ConfigError: unknown mixture (nearest names shown), missing split, data or vocabulary.
    """
    self._config = config
    self._ids = _check_shards(config, shard_ids)
    self._rows_each = config.batch_size // config.num_shards
    self._shards = [Shard(config, shard, wanted) for shard in self._ids]
    self._ready: collections.deque[list[list[Row]]] = collections.deque()
    self._error: BaseException | None = None
    self._closed = False
    self._thread: threading.Thread | None = None
    # _working is held while rows move from the shards to _ready: whoever holds it sees both whole.
    self._working = threading.Lock()
    self._changed = threading.Condition()
    self.last_rows: list[Row] = []
    self._since = 0  # batches given since a position was taken or restored
    # A stream nobody closed must not read on while the interpreter is taken down.
    self._at_exit = functools.partial(_close, weakref.ref(self))
    atexit.register(self._at_exit)

  def __enter__(self) -> ShardedStream:
    return self

  def __exit__(self, *unused) -> None:
    self.close()

  def __iter__(self) -> ShardedStream:
    """Starts reading ahead; compile while it does."""
    self._start()
    return self

  def _start(self) -> None:
    if self._closed:
      raise RuntimeError('The stream is closed.')
    if self._thread is None:
      self._thread = threading.Thread(target=self._produce, name='data-stream', daemon=True)
      self._thread.start()

  def _read_batch(self) -> list[list[Row]] | None:
    """Rows of one batch by shard, or None when the data has ended for all of them."""
    rows = []
    for reader in self._shards:
      of_shard = []
      for _ in range(self._rows_each):
        if self._closed:
          return None  # nobody takes it; a batch of many shards may be long in coming
        of_shard.append(reader.next_row())
      rows.append(of_shard)
    if all(row is None for of_shard in rows for row in of_shard):
      return None
    # A shard that ended before the others pads with empty rows, which carry no loss.
    return [[row or () for row in of_shard] for of_shard in rows]

  def _produce(self) -> None:
    error: BaseException | None = None
    while error is None:
      with self._changed:
        self._changed.wait_for(lambda: self._closed or len(self._ready) < _AHEAD)
        if self._closed:
          return
      with self._working:
        try:
          rows = self._read_batch()
        except Exception as found:  # noqa: BLE001 (the consumer raises it)
          error = found
        else:
          if rows is None:
            error = StopIteration()
          else:
            with self._changed:
              self._ready.append(rows)
              self._changed.notify_all()
    with self._changed:
      self._error = error
      self._changed.notify_all()

  def __next__(self) -> Batch:
    """The next batch; numpy fields of shape [len(shard_ids) * rows per shard, row_length].

    Raises:
      StopIteration: at the end of a finite dataset.
      ConfigError, OSError...: whatever stopped the reading thread.
    """
    self._start()
    with self._changed:
      # In pieces, so that a second Ctrl-C gets through.
      while not self._changed.wait_for(self._has_answer, timeout=1.0):
        continue
      if not self._ready:
        if isinstance(self._error, StopIteration):
          raise StopIteration
        raise self._error
      rows = self._ready.popleft()
      self._changed.notify_all()
    self._since += 1
    self.last_rows = [row for of_shard in rows for row in of_shard]
    return features.batch_rows(self.last_rows, self._config.task_feature_lengths)

  def _has_answer(self) -> bool:
    return bool(self._ready) or self._error is not None

  def ready(self, seconds: float) -> bool:
    """Whether next() would answer at once, waiting for that so long at most.

    A run looks here between the signals it has to notice: data may be stuck for ever.
    """
    self._start()
    with self._changed:
      return self._changed.wait_for(self._has_answer, timeout=seconds)

  def state(self, seconds: float = 60.0) -> dict[str, bytes]:
    """The position after the last batch yielded: one opaque entry per owned shard.

    Args:
      seconds: how long to wait for a read that is under way.

    Where the read does not end, the position is the one before and how many rows came since.

    Raises:
      whatever stopped the reading thread.
    """
    if self._closed:
      raise RuntimeError('The stream is closed.')
    if not self._working.acquire(timeout=seconds):
      rows = self._since * self._rows_each
      return {shard.name: shard.known_state(rows) for shard in self._shards}
    try:
      if self._error is not None and not isinstance(self._error, StopIteration):
        raise self._error
      entries = {}
      for index, shard in enumerate(self._shards):
        pending = [row for rows in self._ready for row in rows[index]]
        entries[shard.name] = shard.state(pending)
      self._since = 0
      return entries
    finally:
      self._working.release()

  def restore(self, entries: Mapping[str, bytes]) -> None:
    """Continues where state() was taken; entries may come from several hosts' states.

    Only before the first batch is taken and before iter().

    Raises:
      ConfigError: a shard's entry is missing or belongs to another stream.
    """
    if self._thread is not None:
      raise RuntimeError('restore() must come before iter() and the first batch.')
    for number, shard in zip(self._ids, self._shards, strict=True):
      if shard.name not in entries:
        raise ConfigError(
          f'The saved data position has no {shard_name(number, self._config.num_shards)}, only '
          f'{sorted(entries)}: num_shards must stay what the run began with.'
        )
      shard.restore(entries[shard.name])
    self._since = 0

  def close(self) -> None:
    """Stops the reading thread; may be called twice.

    A read that does not end is left behind with its thread, and counts in `abandoned`: Python
    cannot end it, so the process must leave by os._exit.
    """
    with self._changed:
      self._closed = True
      self._changed.notify_all()
    atexit.unregister(self._at_exit)
    if self._thread is not None:
      self._thread.join(_PATIENCE)
      if self._thread.is_alive():
        abandoned.append(self._config.mixture_or_task_name)
        logging.warning('A read of %s does not end; it is left behind.', abandoned[-1])
        return
      self._thread = None
    for shard in self._shards:
      shard.close()


def _close(stream: weakref.ref[ShardedStream]) -> None:
  alive = stream()
  if alive is not None:
    alive.close()


def evaluation_batches(
  config: DataConfig, num_batches: int, shard_ids: Sequence[int] | None = None
) -> Iterator[Batch]:
  """The first num_batches batches of one pass over config.split: the same ones every time.

  Args:
    config: shuffle should be off; num_epochs None is read as 1.
    num_batches: at most so many; a split that ends early gives fewer, the last padded with empty
      rows.
    shard_ids: shards of this host; None is all. Its shards may end before another host's: see
      padding_batch().

  Raises:
    ConfigError: if the split gives no batch at all, or as ShardedStream.
  """
  once = dataclasses.replace(config, num_epochs=config.num_epochs or 1)
  ids = range(config.num_shards) if shard_ids is None else shard_ids
  found = 0
  with ShardedStream(once, ids) as stream:
    for batch in itertools.islice(stream, num_batches):
      found += 1
      yield batch
  if num_batches and not found and shard_ids is None:
    raise ConfigError(
      f'Split {config.split!r} of {config.mixture_or_task_name} gave no batch; give it more data.'
    )


def padding_batch(config: DataConfig, num_shards: int) -> Batch:
  """What a host whose shards have ended gives while another's go on: rows without loss."""
  rows = [()] * (config.batch_size // config.num_shards * num_shards)
  return features.batch_rows(rows, config.task_feature_lengths)
