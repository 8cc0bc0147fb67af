"""Texts in a user's own file, by its kind: .txt in pieces, columns of .csv and .parquet, .jsonl.

Plain Python over openmoe.data.files; sources.py builds the dataset around it.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
from collections.abc import Iterator, Sequence

import pyarrow
import pyarrow.csv
import pyarrow.parquet
from etils import epath

from openmoe.checkpoint import safe_json
from openmoe.config import ConfigError
from openmoe.data import files

KINDS = ('.txt', '.jsonl', '.csv', '.parquet')
SUFFIXES = (*(kind + packed for kind in KINDS[:3] for packed in ('', '.gz', '.zst')), KINDS[3])
_CHECK_PIECE = 1 << 20
_FIELDS_SHOWN = 8


class BadRecordError(ValueError):
  """A record holds no usable text; the message is the reason, the same for all of its kind."""


def kind_of(path: str) -> str:
  """'.txt', '.jsonl', '.csv' or '.parquet'.

  Raises:
    ConfigError: the name ends in nothing that is known.
  """
  stem = path.removesuffix('.gz').removesuffix('.zst')
  for kind in KINDS:
    if stem.endswith(kind) and not (kind == '.parquet' and stem != path):
      return kind
  raise ConfigError(f'{path} must end in one of {list(SUFFIXES)}.')


def check_whole(path: str) -> None:
  """Reads a compressed file to its end, and the first bytes of any other.

  A .gz that was cut off in copying ends TensorFlow's line reader like a whole one, so nobody would
  notice; decompressing costs about a hundredth of tokenising.

  Raises:
    ConfigError: it is damaged, cut off, a Git LFS pointer, UTF-16, or no regular file.
  """
  with files.opened(path) as file:
    head = file.read(_CHECK_PIECE)
    if kind_of(path) != '.parquet':
      files.refuse_utf16(head, path)
    if path.endswith(('.gz', '.zst')):
      while file.read(_CHECK_PIECE):
        continue


def cut(path: str, piece_bytes: int) -> list[bytes]:
  """Pieces of a .txt file of at most piece_bytes, ending at line ends where it has any."""
  content = files.without_bom(files.read_bytes(path))
  pieces, start = [], 0
  while start < len(content):
    end = min(start + piece_bytes, len(content))
    if end < len(content):
      newline = content.rfind(b'\n', start, end)
      end = newline + 1 if newline > start else _character_end(content, start, end)
    pieces.append(content[start:end])
    start = end
  return pieces


def _character_end(content: bytes, start: int, end: int) -> int:
  """The last end of a whole UTF-8 character at or before `end`."""
  found = end
  while found > start and content[found] & 0xC0 == 0x80:
    found -= 1
  return found if found > start else end


def lines(path: str) -> list[bytes]:
  """Lines of a .jsonl.zst file, which TensorFlow cannot read by itself."""
  return [line for _, line in files.lines(path)]


def csv_texts(path: str, field: str) -> list[bytes]:
  """Cells of a column; an empty one is an empty text.

  Raises:
    ConfigError: there is no such column, or the file is damaged.
  """
  content = files.without_bom(files.read_bytes(path))
  beginning = io.StringIO(content[:_CHECK_PIECE].decode('utf-8', 'replace'))
  try:
    header = next(csv.reader(beginning), [])
  except csv.Error as error:
    raise files.DamagedFile(f'{path} cannot be read as CSV ({error}); repair it.') from error
  _need_column(path, field, header)
  try:
    table = pyarrow.csv.read_csv(
      pyarrow.BufferReader(content),
      parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
      convert_options=pyarrow.csv.ConvertOptions(
        include_columns=[field], column_types={field: pyarrow.string()}, strings_can_be_null=False
      ),
    )
  except pyarrow.ArrowException as error:
    raise files.DamagedFile(f'{path} cannot be read as CSV ({error}); repair it.') from error
  with files.reading(path):
    return _texts(table.column(field))


def row_groups(path: str) -> int:
  """Row groups of a .parquet file: what is read at once."""
  with _parquet(path) as file:
    return file.num_row_groups


def parquet_texts(path: str, group: int, field: str) -> list[bytes]:
  """A column of one row group; null is an empty text.

  Raises:
    ConfigError: there is no such column, it holds no text, or the file is damaged.
  """
  with _parquet(path) as file:
    _need_column(path, field, file.schema_arrow.names)
    kind = file.schema_arrow.field(field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
      raise ConfigError(f'{path}: column {field!r} holds {kind}, not text; set text_field.')
    with files.reading(path):
      return _texts(file.read_row_group(group, columns=[field]).column(field))


def _texts(column: pyarrow.ChunkedArray) -> list[bytes]:
  return [value.encode() for value in column.fill_null('').to_pylist()]


@contextlib.contextmanager
def _parquet(path: str) -> Iterator[pyarrow.parquet.ParquetFile]:
  """An open .parquet file, local or gs://; every error names it."""
  files.check_regular(path)
  try:
    with epath.Path(path).open('rb') as file:
      yield pyarrow.parquet.ParquetFile(file)
  except (pyarrow.ArrowException, OSError, UnicodeError, OverflowError) as error:
    raise files.DamagedFile(
      f'{path} cannot be read as .parquet ({error}); copy it again.'
    ) from error


def _need_column(path: str, field: str, names: Sequence[str]) -> None:
  if field in names:
    return
  near = difflib.get_close_matches(field, names, 1)
  hint = f' Did you mean {near[0]!r}?' if near else ''
  shown = ', '.join(map(repr, names[:_FIELDS_SHOWN]))
  raise ConfigError(f'{path} has no column {field!r}, only {shown}; set text_field.{hint}')


def json_text(line: bytes, field: str) -> bytes:
  """The text of one line of .jsonl.

  Raises:
    BadRecordError: it has none.
  """
  try:
    value = safe_json.loads(line.decode('utf-8'))
    text = value[field]
    return text.encode('utf-8')
  except UnicodeError:
    raise BadRecordError('invalid UTF-8') from None
  except safe_json.JsonError as error:
    raise BadRecordError(f'invalid JSON ({error})') from None
  except KeyError:
    shown = ', '.join(repr(str(name)[:40]) for name in list(value)[:_FIELDS_SHOWN])
    raise BadRecordError(f'no text in field {field!r} (there are: {shown})') from None
  except (TypeError, AttributeError):
    raise BadRecordError(f'no text in field {field!r}') from None


def raw_records(path: str, piece_bytes: int, field: str) -> Iterator[bytes]:
  """What parse() takes, record by record in order, without TensorFlow."""
  kind = kind_of(path)
  if kind == '.txt':
    yield from cut(path, piece_bytes)
  elif kind == '.csv':
    yield from csv_texts(path, field)
  elif kind == '.parquet':
    for group in range(row_groups(path)):
      yield from parquet_texts(path, group, field)
  else:
    for _, line in files.lines(path):
      yield line


def parse(path: str, record: int, raw: bytes, field: str) -> bytes:
  """The text of a record, UTF-8.

  Raises:
    BadRecordError: it has none.
  """
  if kind_of(path) == '.jsonl':
    text = json_text(files.without_bom(raw) if record == 0 else raw, field)
  else:
    text = raw
    try:
      text.decode('utf-8')
    except UnicodeDecodeError:
      raise BadRecordError('invalid UTF-8') from None
  if not text.strip():
    raise BadRecordError('empty')
  return text
