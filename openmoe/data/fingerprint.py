"""Which files a stage's data are read from, as a later start can tell whether they still are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

import seqio

from openmoe.checkpoint.paths import Unreadable, is_remote, open_regular
from openmoe.config import DataConfig
from openmoe.data import seqio_private, shard

_BLOCK = 1 << 16  # bytes of the beginning and the end of a file that its digest covers
_MOST = 2000  # files that are listed one by one


def data_files(config: DataConfig) -> dict[str, str]:
  """Path -> 'size:digest' of every file that the tasks of a stage read; '' of those not looked at.

  The digest covers a block at the beginning and one at the end. Files in an object store are only
  named, as looking at thousands would take minutes; of more files than _MOST one line says all.
  """
  found = {}
  for task in shard.tasks_of(config):
    source = seqio_private.cached_source(task, config.split) if config.use_cached else task.source
    if isinstance(source, seqio.TfdsDataSource):
      found[f'{source.tfds_dataset.name} (TFDS)'] = ''  # name and version say what is in it
      continue
    for path in source.list_shards(config.split):
      found[os.fspath(path)] = '' if is_remote(path) else _fingerprint(path)
  if len(found) <= _MOST:
    return found
  whole = hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:16]
  return {f'{len(found)} files': whole}


def _fingerprint(path: str) -> str:
  try:
    with open_regular(path) as file:
      size = os.fstat(file.fileno()).st_size
      digest = hashlib.sha256(file.read(_BLOCK))
      file.seek(max(0, size - _BLOCK))
      digest.update(file.read(_BLOCK))
  except (OSError, Unreadable):
    return ''  # a name that is no file: the reader of the data says what is wrong with it
  return f'{size}:{digest.hexdigest()[:16]}'


def changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
  """A phrase per file that was removed, added or changed.

  >>> changed_files({'a': '1:x', 'b': '1:y', 'd': ''}, {'a': '2:x', 'c': '1:z', 'd': '3:w'})
  ['a has changed (1 bytes there, 2 here)', 'b is gone', 'c is new']
  """
  size = lambda told: told.partition(':')[0]
  phrases = []
  for name in sorted(before.keys() | now.keys()):
    if name not in now:
      phrases.append(f'{name} is gone')
    elif name not in before:
      phrases.append(f'{name} is new')
    elif before[name] != now[name] and before[name] and now[name]:
      sizes = f'{size(before[name])} bytes there, {size(now[name])} here'
      phrases.append(f'{name} has changed ({sizes})')
  return phrases
