"""Finding the split of a benchmark among the files that the user has.

Looked for as <data_dir>/<benchmark>/<split>.{jsonl,json,jsonl.gz,jsonl.zst,parquet,csv}, in one
file or in pieces named <split>-00000-of-00002 and so on, as published; those that TFDS has are also
read from a prepared TFDS folder, when one is set.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from openmoe.config import ConfigError
from tasks import records
from tasks.records import Record

# benchmark: (TFDS name and version, {our split: TFDS split}).
TFDS = {
  'triviaqa': ('trivia_qa/unfiltered.nocontext:1.1.0', {'validation': 'validation'}),
  'arc_challenge': ('ai2_arc/ARC-Challenge:1.0.0', {'test': 'test', 'train': 'train'}),
  'boolq': ('bool_q:1.0.0', {'validation': 'validation'}),
  'lambada': ('lambada:1.0.0', {'test': 'test'}),
}


def _plain(value: Any) -> Any:
  """What TFDS gives, with bytes decoded and arrays as lists."""
  if isinstance(value, bytes):
    return value.decode('utf-8', 'replace')
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  if hasattr(value, 'tolist'):
    return _plain(value.tolist())
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  return value


def _from_tfds(name: str, split: str) -> list[Record]:
  """[] if TFDS does not have it prepared."""
  if name not in TFDS or split not in TFDS[name][1]:
    return []
  import tensorflow as tf
  import tensorflow_datasets as tfds

  from openmoe.data.tfds_source import TfdsDocuments

  try:
    dataset = TfdsDocuments(*TFDS[name]).get_dataset(split, shuffle=False)
  except ConfigError:
    return []
  try:
    found = [_plain(record) for record in tfds.as_numpy(dataset)]
  except tf.errors.OpError as error:
    raise ConfigError(
      f'{name}: the prepared TFDS {TFDS[name][0]} cannot be read ({error.message}); prepare it '
      'again.'
    ) from error
  where = f'TFDS {TFDS[name][0]} {split} record'
  return [Record(record, f'{where} {number}') for number, record in enumerate(found, start=1)]


def _pieces(folder: pathlib.Path, split: str) -> dict[str, list[pathlib.Path]]:
  """Files of a split by ending: one, or the pieces of one, in order.

  Raises:
    ConfigError: a piece is missing.
  """
  found: dict[str, list[pathlib.Path]] = {}
  for ending in records.READERS:
    whole = folder / f'{split}{ending}'
    if whole.exists():
      found[ending] = [whole]
      continue
    pattern = re.compile(rf'{re.escape(split)}-(\d{{5}})-of-(\d{{5}}){re.escape(ending)}')
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else ()
    matches = [m for m in map(pattern.fullmatch, names) if m]
    if not matches:
      continue
    numbers, counts = [int(m.group(1)) for m in matches], {int(m.group(2)) for m in matches}
    if len(counts) > 1 or numbers != list(range(max(counts))):
      raise ConfigError(
        f'{folder} has pieces {[m.group() for m in matches]}, which are not all of one set; copy '
        'the others too.'
      )
    found[ending] = [folder / m.group() for m in matches]
  return found


def read(data_dir: str, name: str, split: str) -> list[Record]:
  """The records of a split.

  Args:
    data_dir: holds a folder per benchmark.
    name: of the benchmark, as in the catalogue.
    split: such as 'validation'.

  Raises:
    ConfigError: there is no such file, or two, or it cannot be read; naming what was looked for.
  """
  folder = pathlib.Path(data_dir) / name
  found = list(_pieces(folder, split).values())
  if len(found) > 1:
    names = ', '.join(paths[0].name for paths in found)
    raise ConfigError(f'{folder} has the {split} split twice: {names}. Leave only the right one.')
  if found:
    return [record for path in found[0] for record in records.read(path)]
  prepared = _from_tfds(name, split)
  if prepared:
    return prepared
  wanted = f'{folder / split}{{{",".join(records.READERS)}}}'
  also = f', nor a prepared TFDS {TFDS[name][0]}' if name in TFDS else ''
  raise ConfigError(
    f'{name} needs its {split} split: there is neither {wanted}{also}. Copy the published file '
    'there, or set DATA_DIR.'
  )
