"""safetensors files: read and written a few rows at a time with plain reads and writes.

The safetensors package maps whole files, and mapped pages count as memory; hence this small
implementation of the format: 8 bytes of header length, a JSON header, the bytes of the tensors.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from convert.core.tensors import (
  BFLOAT16,
  PIECE,
  ConvertError,
  Stored,
  Writable,
  as_bytes,
  sync_file,
)
from convert.formats.pickled import read_at

DTYPES = {
  'F32': np.dtype(np.float32),
  'BF16': BFLOAT16,
  'F16': np.dtype(np.float16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # as the format's own implementation has it


def _header(path: epath.Path) -> tuple[dict, int]:
  """(header, where the tensors' bytes begin)."""
  if path.stat().length < 8:
    raise ConvertError(f'{path} is truncated: it has no header.')
  length = int.from_bytes(read_at(path, 0, 8).tobytes(), 'little')
  if length > _LARGEST_HEADER:
    raise ConvertError(f'{path} is not a safetensors file: its header would take {length} bytes.')

  def once(pairs):
    names = [name for name, _ in pairs]
    doubled = (
      {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()
    )
    if doubled:
      raise ConvertError(f'{path}: {sorted(doubled)} is there more than once.')
    return dict(pairs)

  try:
    header = json.loads(read_at(path, 8, length).tobytes(), object_pairs_hook=once)
  except ValueError as error:
    raise ConvertError(f'{path} has an unreadable header: {error}') from error
  return header, 8 + length


def _stored(path: epath.Path, name: str, entry: Mapping, base: int, size: int) -> Stored:
  try:
    dtype, shape = DTYPES[entry['dtype']], tuple(map(int, entry['shape']))
    begin, end = map(int, entry['data_offsets'])
  except (KeyError, TypeError, ValueError) as error:
    raise ConvertError(f'{name} in {path} has an unreadable entry {entry}: {error!r}') from error
  row = math.prod(shape[1:]) * dtype.itemsize
  nbytes = math.prod(shape) * dtype.itemsize
  if begin < 0 or end - begin != nbytes:
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
  header, base = _header(path)
  header.pop('__metadata__', None)
  size = path.stat().length
  found = {name: _stored(path, name, entry, base, size) for name, entry in header.items()}
  spans = sorted(entry['data_offsets'] for entry in header.values())
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
      os.pwrite(descriptor, len(text).to_bytes(8, 'little') + text, 0)
      os.ftruncate(descriptor, self._size)
    finally:
      os.close(descriptor)

  def writable(self, name: str) -> Writable:
    entry = self._entries[name]
    stored = _stored(self._path, name, entry, self._base, self._size)
    row = max(1, stored.nbytes // max(1, stored.rows))
    begin = self._base + entry['data_offsets'][0]

    def write(start: int, x: np.ndarray) -> None:
      content = as_bytes(x)
      with open(self._path, 'r+b', buffering=0) as file:
        for at in range(0, len(content), PIECE):
          os.pwrite(file.fileno(), content[at : at + PIECE], begin + start * row + at)

    return Writable(stored, write, functools.partial(sync_file, self._path))
