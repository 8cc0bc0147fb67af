"""Reading records: objects of .jsonl and .json files, rows of .csv and .parquet files.

Nothing is skipped in silence: a record that cannot be read is refused with its file and line.
Halves of surrogate pairs, which JSON may hold and nothing else takes, are replaced by U+FFFD.
"""

from __future__ import annotations

import csv
import io
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow.parquet

from openmoe.config import ConfigError
from openmoe.data import files
from openmoe.data.files import DamagedFile

JSONL_SUFFIXES = ('.jsonl', '.jsonl.zst', '.jsonl.gz')


class Record(dict):
  """The fields of one record by name.

  Attributes:
    where: file, and line or number of the record.
  """

  def __init__(self, fields: dict[str, Any], where: str):
    super().__init__(fields)
    self.where = where


def _whole_text(value: Any) -> Any:
  """The same value with every text in it without halves of surrogate pairs."""
  if isinstance(value, str):
    return files.without_surrogates(value)
  if isinstance(value, list):
    return [_whole_text(item) for item in value]
  if isinstance(value, dict):
    return {_whole_text(key): _whole_text(item) for key, item in value.items()}
  return value


def whole_text(value: Any, where: str) -> Any:
  """A JSON value whose texts can be written as UTF-8: other halves of surrogates become U+FFFD.

  Raises:
    DamagedFile: it is nested too deeply.
  """
  try:
    return _whole_text(value)
  except RecursionError as error:
    raise DamagedFile(f'{where} is JSON that is nested too deeply; remove or repair it.') from error


def _record(value: Any, where: str, escapes: bool) -> Record:
  if not isinstance(value, dict):
    raise DamagedFile(f'{where}: a {type(value).__name__}, not a JSON object; remove or repair it.')
  return Record(whole_text(value, where) if escapes else value, where)


def jsonl(path: str | os.PathLike) -> Iterator[Record]:
  """Objects of a .jsonl file, plain, .zst or .gz; empty lines hold none."""
  for number, line in files.lines(path):
    if line.strip():
      where = f'{path}:{number}'
      # Only an escape can put half a surrogate pair into what was UTF-8.
      yield _record(files.parse_json(line, where), where, b'\\ud' in line.lower())


def _is_jsonl(text: str) -> bool:
  """Whether several lines are there and the first is an object by itself."""
  first, _, rest = text.lstrip().partition('\n')
  if not rest.strip() or not first.startswith('{'):
    return False
  try:
    return isinstance(files.parse_json(first, ''), dict)
  except DamagedFile:
    return False


def json_file(path: str | os.PathLike) -> Iterator[Record]:
  """Objects of a .json file: of a list, of the list under `data` or `Data`, or one a line."""
  text = files.read_text(path)
  if _is_jsonl(text):
    yield from jsonl(path)
    return
  content = files.parse_json(text, os.fspath(path))
  if isinstance(content, dict):
    lists = (content[key] for key in ('data', 'Data') if isinstance(content.get(key), list))
    content = next(lists, [content])
  if not isinstance(content, list):
    raise DamagedFile(f'{path} is a {type(content).__name__}, not a list of JSON objects.')
  for number, value in enumerate(content, start=1):
    yield _record(value, f'{path} record {number}', escapes=True)


def csv_rows(path: str | os.PathLike) -> Iterator[tuple[str, list[str]]]:
  """('path:line', cells) of every row of a .csv file that is not empty."""
  rows = csv.reader(io.StringIO(files.read_text(path), newline=''), strict=True)
  while True:
    try:
      row = next(rows, None)
    except csv.Error as error:
      raise DamagedFile(
        f'{path}:{rows.line_num} is no CSV ({error}); it may be cut off: copy it again.'
      ) from error
    if row is None:
      return
    if row:
      yield f'{path}:{rows.line_num}', row


def csv_file(path: str | os.PathLike) -> Iterator[Record]:
  """Rows of a .csv file whose first row names the columns; every value is text."""
  header: list[str] | None = None
  for where, row in csv_rows(path):
    if header is None:
      header = row
      if len(set(header)) < len(header):
        raise DamagedFile(f'{where}: columns {header} are not distinct; the first row names them.')
    elif len(row) != len(header):
      raise DamagedFile(
        f'{where}: {len(row)} cells in place of {len(header)}; quote cells with commas, or copy '
        'the file again.'
      )
    else:
      yield Record(dict(zip(header, row, strict=True)), where)


def parquet(path: str | os.PathLike, columns: Sequence[str] | None = None) -> Iterator[Record]:
  """Rows of a .parquet file, one row group in memory at a time; all columns, or some."""
  with files.opened(path):
    pass  # there, a regular file, and no pointer to one
  with files.reading(path):
    file = pyarrow.parquet.ParquetFile(path)
  with file:
    number = 0
    for group in range(file.num_row_groups):
      with files.reading(path):
        rows = file.read_row_group(group, columns=columns).to_pylist()
      for row in rows:
        number += 1
        yield Record(row, f'{path} record {number}')


READERS: dict[str, Callable[[str | os.PathLike], Iterator[Record]]] = {
  '.jsonl': jsonl,
  '.json': json_file,
  '.jsonl.gz': jsonl,
  '.jsonl.zst': jsonl,
  '.parquet': parquet,
  '.csv': csv_file,
}


def read(path: str | os.PathLike) -> list[Record]:
  """The records of a file of any kind.

  Raises:
    ConfigError: it is absent, empty or of another kind.
    DamagedFile: it cannot be read; naming file and line.
  """
  name = pathlib.Path(path).name
  reader = next((reader for end, reader in READERS.items() if name.endswith(end)), None)
  if reader is None:
    raise ConfigError(f'{path} must end in one of {", ".join(READERS)}.')
  found = list(reader(path))
  if not found:
    raise DamagedFile(f'{path} has no records; copy it again.')
  return found


# --- folders of files, for the builders of data sets


def find_files(folder: str, suffixes: Sequence[str]) -> list[pathlib.Path]:
  """Files under `folder` with one of the suffixes, sorted by relative path.

  Raises:
    ConfigError: when there is none, or the same file is there compressed and decompressed.
  """
  root = pathlib.Path(folder)
  found = sorted(p for p in root.rglob('*') if p.is_file() and p.name.endswith(tuple(suffixes)))
  if not found:
    raise ConfigError(f'{folder} holds no file ending in {list(suffixes)}; give the raw folder.')
  stems: dict[pathlib.Path, pathlib.Path] = {}
  for path in found:
    stem = path.with_name(path.name.removesuffix('.zst').removesuffix('.gz'))
    if stem in stems:
      raise ConfigError(f'{stems[stem]} and {path} are the same data twice; remove one.')
    stems[stem] = path
  return found


def jsonl_records(folder: str) -> Iterator[tuple[str, Record]]:
  """('relative path:line', object) of all .jsonl files of a folder: a key that stays the same."""
  root = pathlib.Path(folder)
  for path in find_files(folder, JSONL_SUFFIXES):
    for record in jsonl(path):
      line = record.where.rpartition(':')[2]
      yield f'{path.relative_to(root).as_posix()}:{line}', record


def parquet_records(
  folder: str, columns: Sequence[str] | None = None, keep: Callable[[pathlib.Path], bool] = bool
) -> Iterator[tuple[str, Record]]:
  """('relative path:row', row) of all .parquet files of a folder.

  Args:
    folder: searched recursively.
    columns: columns to read; None is all.
    keep: which files to read, by path relative to the folder.
  """
  root = pathlib.Path(folder)
  for path in find_files(folder, ['.parquet']):
    relative = path.relative_to(root)
    if keep(relative):
      for number, record in enumerate(parquet(path, columns), start=1):
        yield f'{relative.as_posix()}:{number}', record
