"""Digests of the batches that a run trained on, to compare runs by.

  batches/process_<i>.jsonl   a line a step: {step, kind 'batch', shards: {shard: digest}}

Every process writes of the shards that it reads; a resumed run drops what lies after its start.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import jax
from etils import epath

from openmoe.checkpoint.paths import read_small
from openmoe.observe.notes import Records, decode

FOLDER = 'batches'
_LIMIT = 1 << 30  # bytes of a file


class BatchRecords:
  """Writes the digests of this process; a context manager.

  Args:
    model_dir: run directory.
    start_step: records after it are dropped.
    note: receives what was wrong with the file, as one line of text.

  Raises:
    OSError: on writing; whoever asks for this wants it whole.
  """

  def __init__(self, model_dir: str | os.PathLike, start_step: int, note: Callable[[str], None]):
    folder = epath.Path(model_dir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    name = f'process_{jax.process_index()}.jsonl'
    self._records = Records(folder, start_step, note, name)

  def write(self, step: int, digests: Mapping[str, str]) -> None:
    """Adds the digests of the batch of a step, by shard."""
    self._records.append({'step': step, 'kind': 'batch', 'shards': dict(digests)})

  def __enter__(self) -> BatchRecords:
    return self

  def __exit__(self, *unused) -> None:
    self._records.flush()


def read_batches(model_dir: str | os.PathLike) -> dict[int, dict[str, str]]:
  """Step -> digest by shard, whichever processes wrote them.

  Raises:
    ValueError: two processes have different rows of one shard.
  """
  found: dict[int, dict[str, str]] = {}
  folder = epath.Path(model_dir) / FOLDER
  paths = folder.iterdir() if folder.exists() else ()
  for path in sorted(paths, key=lambda p: p.name):
    for line in read_small(path, _LIMIT).splitlines():
      record = decode(line)
      told = record.get('shards') if record else None
      if not isinstance(told, dict):
        continue
      shards = found.setdefault(record['step'], {})
      for shard, digest in told.items():
        if shards.setdefault(shard, digest) != digest:
          raise ValueError(
            f'Step {record["step"]}: processes read different rows of shard {shard}.'
          )
  return found
