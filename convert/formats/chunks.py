"""Uncompressed chunks of local zarr arrays, read and written as the plain files they are.

TensorStore copies such a chunk twice on its way; a conversion spends a third of its time there.
Whatever is compressed, remote, or cut along other axes than the first goes through TensorStore.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from convert.core.tensors import DTYPES, ConvertError, as_bytes, sync_file
from openmoe.checkpoint import safe_json
from openmoe.checkpoint.paths import Unreadable, open_regular


@dataclasses.dataclass(frozen=True)
class PlainSlice:
  """A slice of an array whose chunks are some of its rows each, whole in the other axes.

  Attributes:
    folder: of the array.
    index: leading indices of the slice.
    shape, dtype: of the slice.
    unit: rows of a chunk; the last one is as large as the others, whatever is left for it.
  """

  folder: pathlib.Path
  index: tuple[int, ...]
  shape: tuple[int, ...]
  dtype: np.dtype
  unit: int

  @property
  def _row(self) -> int:
    return math.prod(self.shape[1:]) * self.dtype.itemsize

  def _file(self, chunk: int) -> pathlib.Path:
    place = (*self.index, chunk, *(0 for _ in self.shape[1:]))
    return self.folder / '.'.join(map(str, place))

  def _spans(self, start: int, stop: int) -> Iterator[tuple[pathlib.Path, int, int]]:
    """(file, first row, last row + 1) of the chunks that hold some rows."""
    for chunk in range(start // self.unit, -(-stop // self.unit)):
      first = chunk * self.unit
      yield self._file(chunk), max(start, first), min(stop, first + self.unit)

  def read(self, start: int, stop: int) -> np.ndarray:
    """Rows of the slice.

    Raises:
      ConvertError: a chunk is missing or has another size.
    """
    x = np.empty((stop - start, *self.shape[1:]), self.dtype)
    content = as_bytes(x)
    for path, first, last in self._spans(start, stop):
      part = content[(first - start) * self._row : (last - start) * self._row]
      _read(path, part, first % self.unit * self._row, self.unit * self._row)
    return x

  def write(self, start: int, x: np.ndarray) -> None:
    """Rows from `start`, a multiple of unit; whole chunks, but for the end of the slice."""
    content, stop = as_bytes(x), start + len(x)
    for path, first, last in self._spans(start, stop):
      with open(path, 'wb', buffering=0) as file:
        part = content[(first - start) * self._row : (last - start) * self._row]
        while part:
          part = part[file.write(part) :]
        file.truncate(self.unit * self._row)

  def sync(self) -> None:
    for path, _, _ in self._spans(0, self.shape[0]):
      sync_file(path)


def _read(path: pathlib.Path, into: memoryview, offset: int, size: int) -> None:
  try:
    with open_regular(path) as file:
      if (there := os.fstat(file.fileno()).st_size) != size:
        raise ConvertError(f'chunk {path.name} is truncated or damaged: {there} bytes of {size}')
      file.seek(offset)
      while into:
        count = file.readinto(into)
        if not count:
          raise ConvertError(f'chunk {path.name} ended while it was read')
        into = into[count:]
  except FileNotFoundError as error:
    raise ConvertError(f'chunk {path.name} is missing') from error
  except (OSError, Unreadable) as error:
    raise ConvertError(f'chunk {path.name} cannot be read: {error}') from error


def plain_slice(folder: os.PathLike | str, index: tuple[int, ...]) -> PlainSlice | None:
  """The slice `index` of a local array, or None where its chunks are not plain rows of it."""
  folder = pathlib.Path(folder)
  try:
    about = safe_json.read(folder / '.zarray', limit=1 << 20)
    shape, chunks = (_counts(about, name) for name in ('shape', 'chunks'))
    dtype = _dtype(about.get('dtype'))
  except (OSError, Unreadable):
    return None  # TensorStore says what is wrong with it
  lead, body = len(index), shape[len(index) :]
  plain = about.get('compressor', '') is None and not about.get('filters', '')
  plain = plain and about.get('order') == 'C' and about.get('dimension_separator', '.') == '.'
  by_rows = chunks[:lead] == (1,) * lead and chunks[lead + 1 :] == body[1:]
  inside = len(chunks) == len(shape) and all(i < n for i, n in zip(index, shape, strict=False))
  if not (plain and by_rows and inside and body and chunks[lead] and dtype is not None):
    return None
  return PlainSlice(folder, index, body, dtype, chunks[lead])


def _counts(about: Mapping[str, Any], name: str) -> tuple[int, ...]:
  numbers = safe_json.field(about, name, list, '.zarray')
  if not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
    raise Unreadable(f'.zarray: {name} is {numbers!r:.80}')
  return tuple(numbers)


def _dtype(name: object) -> np.dtype | None:
  """A little-endian type of numbers, or None for anything else."""
  if name == 'bfloat16':
    return DTYPES['bfloat16']
  return np.dtype(name) if isinstance(name, str) and re.fullmatch('<[fiu][248]', name) else None
