"""Reading raw corpora file by file: sorted, streamed, and exact about what is wrong.

Every reader yields (key, record); a key is 'relative path:record' so that it is unique, stable and
says where a document came from. Nothing is skipped in silence: a record that cannot be read ends
the build with its file and line.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from openmoe.config import ConfigError

JSONL_SUFFIXES = ('.jsonl', '.jsonl.zst', '.jsonl.gz')


def find_files(folder: str, suffixes: Sequence[str]) -> list[pathlib.Path]:
  """Files under `folder` with one of the suffixes, sorted by relative path.

  Raises:
    ConfigError: when there is none, or the same file is there compressed and decompressed.
  """
  root = pathlib.Path(folder)
  files = sorted(p for p in root.rglob('*') if p.is_file() and p.name.endswith(tuple(suffixes)))
  if not files:
    raise ConfigError(f'{folder} holds no file ending in {list(suffixes)}; give the raw folder.')
  stems: dict[pathlib.Path, pathlib.Path] = {}
  for path in files:
    stem = path.with_name(path.name.removesuffix('.zst').removesuffix('.gz'))
    if stem in stems:
      raise ConfigError(f'{stems[stem]} and {path} are the same data twice; remove one.')
    stems[stem] = path
  return files


def _open(path: pathlib.Path):
  if path.name.endswith('.zst'):
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression='zstd'))
  if path.name.endswith('.gz'):
    return gzip.open(path, 'rb')
  return path.open('rb')


def jsonl_records(folder: str) -> Iterator[tuple[str, dict]]:
  """Objects of all .jsonl files, plain, .zst or .gz; empty lines hold none.

  Raises:
    ConfigError: naming file and line of half a record, invalid UTF-8 or a non-object.
  """
  for path in find_files(folder, JSONL_SUFFIXES):
    name = path.relative_to(folder).as_posix()
    with _open(path) as f:
      for number, line in enumerate(f, start=1):
        if not line.strip():
          continue
        try:
          record = json.loads(line.decode('utf-8'))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
          raise ConfigError(f'{path}:{number}: {error}; repair or remove the line.') from error
        if not isinstance(record, dict):
          raise ConfigError(f'{path}:{number}: a {type(record).__name__}, not a JSON object.')
        yield f'{name}:{number}', record


def parquet_records(
  folder: str, columns: Sequence[str] | None = None, keep: Callable[[pathlib.Path], bool] = bool
) -> Iterator[tuple[str, dict]]:
  """Rows of all .parquet files, one row group in memory at a time.

  Args:
    folder: searched recursively.
    columns: columns to read; None is all.
    keep: which files to read, by path relative to the folder.
  """
  import pyarrow.parquet

  for path in find_files(folder, ['.parquet']):
    relative = path.relative_to(folder)
    if not keep(relative):
      continue
    file = pyarrow.parquet.ParquetFile(path)
    number = 0
    for group in range(file.num_row_groups):
      for row in file.read_row_group(group, columns=columns).to_pylist():
        number += 1
        yield f'{relative.as_posix()}:{number}', row


def text_and_meta(where: str, record: Mapping, text_field: str = 'text') -> dict[str, str]:
  """{'text', 'meta'}: meta is JSON of the field `meta`, or of all fields but the text.

  Raises:
    ConfigError: if the text is not a string.
  """
  text = record.get(text_field)
  if not isinstance(text, str):
    raise ConfigError(f'{where}: field {text_field!r} holds no text but {text!r}.')
  rest = {k: v for k, v in record.items() if k != text_field}
  return {'text': text, 'meta': to_json(rest.get('meta', rest))}


def to_json(value: object) -> str:
  """JSON with sorted keys; dates as ISO text, bytes as base64."""

  def other(item):
    if isinstance(item, bytes):
      return base64.b64encode(item).decode()
    return item.isoformat() if hasattr(item, 'isoformat') else str(item)

  return json.dumps(value, sort_keys=True, ensure_ascii=False, default=other)
