"""safetensors files: read and written a few rows at a time with plain reads and writes.

The safetensors package is of no help here: it maps whole local files, and mapped pages count as
memory; its headers tell no offsets, keep the last of two equal names, and cannot be read from an
object store. Tests read with it what is written here. The format is 8 bytes of header length, a
JSON header, the bytes of the tensors.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Sequence

import numpy as np
from etils import epath

from convert.core.tensors import (
  BFLOAT16,
  ConvertError,
  Stored,
  Writable,
  as_bytes,
  read_at,
  refuse_pointer,
  sync_file,
  write_at,
)
from openmoe.checkpoint import safe_json
from openmoe.checkpoint.paths import Unreadable

# Every type of the format that NumPy has too, so that any file can be listed.
DTYPES = {
  'F32': np.dtype(np.float32),
  'BF16': BFLOAT16,
  'F16': np.dtype(np.float16),
  'F64': np.dtype(np.float64),
  'BOOL': np.dtype(np.bool_),
} | {f'{sign}{8 * n}': np.dtype(f'{sign.lower()}{n}') for sign in 'IU' for n in (1, 2, 4, 8)}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # as the format's own implementation has it
_LARGEST_SIZE = 1 << 62  # of an array in bytes


def _header(path: epath.Path, size: int) -> tuple[dict, int]:
  """(header, where the tensors' bytes begin)."""
  if size < 8:
    raise ConvertError(f'{path} is truncated: it has no header.')
  first = read_at(path, 0, 8).tobytes()
  refuse_pointer(path, first)
  length = int.from_bytes(first, 'little')
  if length > _LARGEST_HEADER:
    raise ConvertError(f'{path} is not a safetensors file: its header would take {length} bytes.')
  if 8 + length > size:
    raise ConvertError(f'{path} is truncated: its header takes {length} bytes of {size - 8}.')
  text = read_at(path, 8, length).tobytes()
  try:
    return safe_json.parse(text, f'the header of {path}', once=True), 8 + length
  except Unreadable as error:
    raise ConvertError(f'{path} has an unreadable header: {error}') from error


def _entry(
  path: epath.Path, name: str, entry: object
) -> tuple[np.dtype, tuple[int, ...], int, int]:
  """(dtype, shape, first byte, last byte + 1) of a tensor.

  Raises:
    ConvertError: the entry is of another form, or of a type that NumPy has not.
  """
  where = f'{name} in {path}'
  try:
    if not isinstance(entry, dict):
      raise Unreadable(f'{where} is {entry!r:.80}; an object belongs there.')
    code = safe_json.field(entry, 'dtype', str, where)
    shape, span = (safe_json.field(entry, key, list, where) for key in ('shape', 'data_offsets'))
    if (
      not all(type(n) is int and 0 <= n < _LARGEST_SIZE for n in (*shape, *span)) or len(span) != 2
    ):
      raise Unreadable(f'{where}: shape {shape!r:.80} and data_offsets {span!r:.80} are no counts.')
  except Unreadable as error:
    raise ConvertError(f'{where} has an unreadable entry: {error}') from error
  if code not in DTYPES:
    raise ConvertError(
      f'{where} is of type {code[:20]}, which is not read here; save it as F32, BF16 or F16, or '
      'remove it if it is no weight.'
    )
  return DTYPES[code], tuple(shape), *span


def _stored(path: epath.Path, name: str, entry: object, base: int, size: int) -> Stored:
  dtype, shape, begin, end = _entry(path, name, entry)
  row = math.prod(shape[1:]) * dtype.itemsize
  nbytes = math.prod(shape) * dtype.itemsize
  if end - begin != nbytes:
    raise ConvertError(f'{name} in {path}: {end - begin} bytes for shape {list(shape)}.')
  if base + end > size:
    raise ConvertError(f'{path} is truncated: {name} ends at byte {base + end} of {size}.')

  def read(start: int, stop: int) -> np.ndarray:
    content = read_at(path, base + begin + start * row, (stop - start) * row)
    return content.view(dtype).reshape((stop - start, *shape[1:]) if shape else ())

  return Stored(name, shape, dtype, read)


def read_safetensors(path: os.PathLike | str) -> dict[str, Stored]:
  """The tensors of a file by name.

  Raises:
    ConvertError: the file is truncated, or its header does not fit its size.
  """
  path = epath.Path(path)
  size = path.stat().length
  header, base = _header(path, size)
  header.pop('__metadata__', None)
  found = {name: _stored(path, name, entry, base, size) for name, entry in header.items()}
  spans = sorted(tuple(entry['data_offsets']) for entry in header.values())
  for (_, end), (begin, _) in zip([(0, 0), *spans], [*spans, (size - base, 0)], strict=True):
    if begin != end:
      raise ConvertError(f'{path}: its tensors leave a gap or overlap at byte {base + end}.')
  return found


class SafetensorsFile:
  """A file of tensors known beforehand, filled in any order.

  Args:
    path: local file.
    tensors: (name, shape, dtype) in the order they lie in the file.
  """

  def __init__(self, path: os.PathLike | str, tensors: Sequence[tuple[str, tuple, np.dtype]]):
    self._path = epath.Path(path)
    header, offset = {'__metadata__': {'format': 'pt'}}, 0
    for name, shape, dtype in tensors:
      nbytes = math.prod(shape) * dtype.itemsize
      span = [offset, offset + nbytes]
      header[name] = {'dtype': _CODES[dtype], 'shape': list(shape), 'data_offsets': span}
      offset += nbytes
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)  # tensors begin at a multiple of 8
    self._base, self._size = 8 + len(text), 8 + len(text) + offset
    del header['__metadata__']
    self._entries = header
    # An interrupted conversion is taken up, so what is there stays.
    flags = os.O_WRONLY | os.O_CREAT
    descriptor = os.open(self._path, flags, 0o644)
    try:
      os.ftruncate(descriptor, self._size)
    finally:
      os.close(descriptor)
    write_at(self._path, 0, memoryview(len(text).to_bytes(8, 'little') + text))

  def writable(self, name: str) -> Writable:
    entry = self._entries[name]
    stored = _stored(self._path, name, entry, self._base, self._size)
    row = max(1, stored.nbytes // max(1, stored.rows))
    begin = self._base + entry['data_offsets'][0]

    def write(start: int, x: np.ndarray) -> None:
      write_at(self._path, begin + start * row, as_bytes(x))

    return Writable(stored, write, functools.partial(sync_file, self._path))
