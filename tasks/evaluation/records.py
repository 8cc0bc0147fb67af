"""Reading benchmarks from files that the user has.

Looked for as <data_dir>/<benchmark>/<split>.{jsonl,json,jsonl.gz,parquet,csv}, in the columns of
their usual publication (each module names them); those that TFDS has are also read
from a prepared TFDS folder, when one is set.
"""

from __future__ import annotations

import csv
import gzip
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyarrow.parquet

from openmoe.config import ConfigError

Record = Mapping[str, Any]

# benchmark: (TFDS name and version, {our split: TFDS split}).
TFDS = {
  'triviaqa': ('trivia_qa/unfiltered.nocontext:1.1.0', {'validation': 'validation'}),
  'arc_challenge': ('ai2_arc/ARC-Challenge:1.0.0', {'test': 'test', 'train': 'train'}),
  'boolq': ('bool_q:1.0.0', {'validation': 'validation'}),
  'lambada': ('lambada:1.0.0', {'test': 'test'}),
}


def _lines(lines: Iterable[str], path: pathlib.Path) -> list[Record]:
  records = []
  for number, line in enumerate(lines, start=1):
    if line.strip():
      try:
        records.append(json.loads(line))
      except json.JSONDecodeError as error:
        raise ConfigError(
          f'{path} line {number} is no JSON ({error}); the file may be cut off: copy it again.'
        ) from error
  return records


def _json(path: pathlib.Path) -> list[Record]:
  with path.open(encoding='utf-8') as file:
    try:
      content = json.load(file)
    except json.JSONDecodeError as error:
      raise ConfigError(f'{path} is no whole JSON ({error}); copy it again.') from error
  return content['data'] if isinstance(content, dict) and 'data' in content else content


def _jsonl(path: pathlib.Path) -> list[Record]:
  with path.open(encoding='utf-8') as file:
    return _lines(file, path)


def _jsonl_gz(path: pathlib.Path) -> list[Record]:
  with gzip.open(path, 'rt', encoding='utf-8') as file:
    return _lines(file, path)


def _csv(path: pathlib.Path) -> list[Record]:
  with path.open(encoding='utf-8', newline='') as file:
    return list(csv.DictReader(file))


def _parquet(path: pathlib.Path) -> list[Record]:
  return pyarrow.parquet.read_table(path).to_pylist()


_READERS: dict[str, Callable[[pathlib.Path], list[Record]]] = {
  '.jsonl': _jsonl,
  '.json': _json,
  '.jsonl.gz': _jsonl_gz,
  '.parquet': _parquet,
  '.csv': _csv,
}


def _plain(value: Any) -> Any:
  """What TFDS gives, with bytes decoded and arrays as lists."""
  if isinstance(value, bytes):
    return value.decode()
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
  import tensorflow_datasets as tfds

  from openmoe.data.tfds_source import TfdsDocuments

  try:
    dataset = TfdsDocuments(*TFDS[name]).get_dataset(split, shuffle=False)
  except ConfigError:
    return []
  return [_plain(record) for record in tfds.as_numpy(dataset)]


def read_file(path: pathlib.Path) -> list[Record]:
  """The records of a file of any known kind.

  Raises:
    ConfigError: it is absent, damaged, empty or of another kind.
  """
  reader = next((reader for end, reader in _READERS.items() if path.name.endswith(end)), None)
  if reader is None:
    raise ConfigError(f'{path} must end in one of {", ".join(_READERS)}.')
  if not path.is_file():
    raise ConfigError(f'{path} is not there; give the path of the published file.')
  try:
    records = reader(path)
  except (OSError, EOFError, UnicodeDecodeError, pyarrow.ArrowException) as error:
    raise ConfigError(f'{path} cannot be read ({error}); copy it again.') from error
  if not records:
    raise ConfigError(f'{path} has no records; copy it again.')
  return records


def read(data_dir: str, name: str, split: str) -> list[Record]:
  """The records of a split.

  Args:
    data_dir: holds a folder per benchmark.
    name: of the benchmark, as in the catalogue.
    split: such as 'validation'.

  Raises:
    ConfigError: there is no such file, or it cannot be read; naming what was looked for.
  """
  folder = pathlib.Path(data_dir) / name
  for ending in _READERS:
    path = folder / f'{split}{ending}'
    if path.is_file():
      return read_file(path)
  records = _from_tfds(name, split)
  if records:
    return records
  wanted = f'{folder / split}{{{",".join(_READERS)}}}'
  also = f', nor a prepared TFDS {TFDS[name][0]}' if name in TFDS else ''
  raise ConfigError(
    f'{name} needs its {split} split: there is neither {wanted}{also}. Copy the published file '
    'there, or set DATA_DIR.'
  )


def field(record: Record, name: str, benchmark: str) -> Any:
  """A column of a record.

  Raises:
    ConfigError: it has none of that name.
  """
  if name not in record:
    raise ConfigError(
      f'{benchmark}: a record has columns {sorted(record)} and no {name!r}; use the file as it is '
      'published.'
    )
  return record[name]
