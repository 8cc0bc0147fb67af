"""Opening files that somebody else wrote: text, JSON and lines of JSON, compressed or not.

One place for what is the same wherever such files are read: UTF-8 whatever the locale, a byte order
mark at the start dropped, lines that end in LF or CRLF, .gz and .zst, a bound on what is held in
memory, and one error that names the file for everything that cannot be read. Nothing here knows
what the content means.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow

from openmoe.checkpoint import paths, safe_json
from openmoe.config import ConfigError

MOST_BYTES = 1 << 31  # of a file that is read as a whole, decompressed
LONGEST_LINE = 1 << 28  # bytes
_BOM = b'\xef\xbb\xbf'
_UTF16 = (b'\xff\xfe', b'\xfe\xff')

Path = str | os.PathLike


class DamagedFile(ConfigError):
  """A file is there and cannot be read as what it says it is."""

  exit_code = 65


def _open(path: Path) -> BinaryIO:
  """Opens a regular file; raises ConfigError for anything else."""
  try:
    file = paths.open_regular(path)
  except FileNotFoundError as error:
    raise ConfigError(f'{path} does not exist; give the path of a file.') from error
  except (OSError, ValueError) as error:
    raise ConfigError(f'{path} cannot be opened ({_reason(error)}).') from error
  return file if paths.is_remote(path) else io.BufferedReader(file)


def check_regular(path: Path) -> None:
  """Raises ConfigError unless a local path is a file that opens; remote ones are not looked at."""
  if not paths.is_remote(path):
    _open(path).close()


def _reason(error: BaseException) -> str:
  return getattr(error, 'strerror', None) or str(error) or type(error).__name__


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
  """What libraries raise for a file that is damaged becomes a DamagedFile that names it."""
  try:
    yield
  except EOFError as error:
    raise DamagedFile(
      f'{path} ends too early: it was cut off in copying; copy it again.'
    ) from error
  # Text that is no UTF-8 and dates beyond the calendar are found when values are made of columns.
  except (OSError, zlib.error, pyarrow.ArrowException, UnicodeError, OverflowError) as error:
    raise DamagedFile(f'{path} cannot be read ({_reason(error)}); copy it again.') from error


class _Reader:
  """The bytes of an open file after decompression; every error names the file."""

  def __init__(self, path: Path, file: BinaryIO):
    self._path, self._file = path, file

  def read(self, size: int = -1) -> bytes:
    with reading(self._path):
      return self._file.read(size)

  def readline(self, limit: int = -1) -> bytes:
    with reading(self._path):
      return self._file.readline(limit)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[_Reader]:
  """An open file, local or gs://, whose read() and readline() give decompressed bytes.

  Raises:
    ConfigError: there is no such file, or it is no regular one.
    DamagedFile: also while it is read; it is damaged, cut off, or a Git LFS pointer.
  """
  name = os.fspath(path)
  with contextlib.ExitStack() as stack:
    file = stack.enter_context(_open(path))
    with reading(path):
      head = file.read(len(paths.LFS))
      file.seek(0)
    if head == paths.LFS:
      raise DamagedFile(
        f'{path} is a Git LFS pointer, not the file: `git lfs pull` in its folder, or download it.'
      )
    with reading(path):
      if name.endswith('.gz'):
        file = stack.enter_context(gzip.GzipFile(fileobj=file))
      elif name.endswith('.zst'):
        file = io.BufferedReader(pyarrow.input_stream(file, compression='zstd'), 1 << 20)
    yield _Reader(path, file)


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
  """The whole content, decompressed.

  Raises:
    ConfigError: as opened(), or it has more than `most` bytes.
  """
  with opened(path) as file:
    content = file.read(most + 1)
  if len(content) > most:
    raise DamagedFile(f'{path} has more than {most:,} bytes, which no such file has.')
  return content


def without_bom(content: bytes) -> bytes:
  """The bytes of a UTF-8 text without the byte order mark that some editors put before it."""
  return content.removeprefix(_BOM)


def refuse_utf16(content: bytes, where: str) -> None:
  """Raises DamagedFile where the beginning of a file is UTF-16's byte order mark."""
  if content.startswith(_UTF16):
    raise DamagedFile(f'{where} is UTF-16; save it as UTF-8.')


def decode(content: bytes, where: str) -> str:
  """UTF-8 text without a byte order mark.

  Args:
    content: from the beginning of a file, or a line of it.
    where: file, or file and line, for errors.

  Raises:
    DamagedFile: it is not UTF-8; naming the byte.
  """
  refuse_utf16(content, where)
  try:
    return without_bom(content).decode('utf-8')
  except UnicodeDecodeError as error:
    raise DamagedFile(
      f'{where} is not UTF-8 (byte {error.start + 1} is 0x{content[error.start]:02x}); '
      'save it as UTF-8.'
    ) from error


def read_text(path: Path, most: int = MOST_BYTES) -> str:
  """The whole text of a UTF-8 file; line ends stay as they are.

  Raises:
    ConfigError: as read_bytes() and decode().
  """
  return decode(read_bytes(path, most), os.fspath(path))


def lines(path: Path, longest: int = LONGEST_LINE) -> Iterator[tuple[int, bytes]]:
  """(number from 1, bytes without LF or CRLF) of every line, one at a time in memory.

  Lines end at line feeds and nowhere else. A byte order mark at the start of the file is no part of
  the first line.

  Raises:
    ConfigError: as opened(), or a line has more than `longest` bytes.
  """
  with opened(path) as file:
    number = 0
    while line := file.readline(longest + 1):
      number += 1
      if len(line) > longest:
        raise DamagedFile(f'{path}:{number}: a line of more than {longest:,} bytes; split it.')
      line = without_bom(line) if number == 1 else line
      yield number, line.removesuffix(b'\n').removesuffix(b'\r')


def parse_json(content: bytes | str, where: str) -> Any:
  """The value of a JSON text.

  Args:
    content: UTF-8 where it is bytes.
    where: file, or file and line, for errors.

  Raises:
    DamagedFile: it is no JSON, a number in it is too long, or it is nested too deeply.
  """
  text = decode(content, where) if isinstance(content, bytes) else content
  try:
    return safe_json.loads(text)
  except safe_json.JsonError as error:
    raise DamagedFile(
      f'{where} is no JSON that can be read: {error}{error.position}. Copy or repair it.'
    ) from error


def read_json(path: Path, most: int = MOST_BYTES) -> Any:
  """The value of a JSON file.

  Raises:
    ConfigError: as read_bytes() and parse_json().
  """
  return parse_json(read_bytes(path, most), os.fspath(path))


def json_lines(path: Path, longest: int = LONGEST_LINE) -> Iterator[tuple[str, Any]]:
  """('path:line', value) of every line of JSON that is not empty.

  Raises:
    ConfigError: as lines() and parse_json(); naming file and line.
  """
  for number, line in lines(path, longest):
    if line.strip():
      where = f'{path}:{number}'
      yield where, parse_json(line, where)


def without_surrogates(text: str) -> str:
  """Text whose halves of surrogate pairs, which JSON may hold and UTF-8 may not, are U+FFFD."""
  try:
    text.encode('utf-8')
  except UnicodeEncodeError:
    # Whole pairs, which JSON writes as two escapes, are one character by now.
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
  return text
