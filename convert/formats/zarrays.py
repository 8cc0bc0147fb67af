"""Chunked zarr arrays through TensorStore: local, gs:// and inside orbax's OCDBT database.

Missing chunks are errors here. TensorStore would read them as zeros, and a checkpoint with a lost
file would pass for a whole one.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from convert.core.tensors import (
  DTYPES,
  PIECE,
  ConvertError,
  Stored,
  Writable,
  divisor_near,
  sync_file,
)
from convert.formats.chunks import PlainSlice, plain_slice
from openmoe.checkpoint.paths import is_remote

LARGEST_CHUNK = 64 << 20  # that is written
LARGEST_READ = 16 << 30  # of a chunk that is read: orbax can make one of all that a device holds
_NO_ZERO_FILL = {'fill_missing_data_reads': False}


def kvstore(path: os.PathLike | str) -> dict[str, Any]:
  """TensorStore's description of a directory, local or in an object store.

  Raises:
    ConvertError: for a scheme that TensorStore has no driver for.
  """
  text = os.fspath(path).rstrip('/') + '/'
  scheme, separator, rest = text.partition('://')
  if not separator:
    return {'driver': 'file', 'path': os.path.abspath(text) + '/'}
  drivers = {'gs': 'gcs', 's3': 's3'}
  if scheme not in drivers:
    raise ConvertError(f'{path}: paths are local, gs:// or s3://, not {scheme}://.')
  bucket, _, inside = rest.partition('/')
  return {'driver': drivers[scheme], 'bucket': bucket, 'path': inside}


def is_ocdbt(path: os.PathLike | str) -> bool:
  return (epath.Path(path) / 'manifest.ocdbt').exists()


def _context(cache_bytes: int) -> ts.Context:
  # Files are synced once, when a conversion is complete, and not after every chunk.
  return ts.Context({'cache_pool': {'total_bytes_limit': cache_bytes}, 'file_io_sync': False})


class ZarrStore:
  """The zarr arrays of one directory, each under its own name."""

  def __init__(self, path: os.PathLike | str, ocdbt: bool = False):
    """Opens a directory.

    Args:
      ocdbt: its arrays lie, or are to lie, in one database; told by itself where there is one.
    """
    self.path = epath.Path(path)
    self._ocdbt = ocdbt or is_ocdbt(path)
    self._context = _context(0)

  def _array(self, name: str) -> dict[str, Any]:
    if self._ocdbt:
      base = {'driver': 'ocdbt', 'base': kvstore(self.path), 'path': f'{name}/'}
    else:
      base = kvstore(self.path / name)
    return {'driver': 'zarr', 'kvstore': base}

  def names(self) -> list[str]:
    """Arrays that are there, sorted."""
    if self._ocdbt:
      spec = {'driver': 'ocdbt', 'base': kvstore(self.path)}
      keys = ts.KvStore.open(spec).result().list().result()
      return sorted(key.decode().removesuffix('/.zarray') for key in keys if b'/.zarray' in key)
    return sorted(p.name for p in self.path.iterdir() if (p / '.zarray').exists())

  def open(self, name: str, *, missing_is_zero: bool = False) -> ts.TensorStore:
    """An array for reading.

    Raises:
      ConvertError: if it is absent or its description cannot be read.
    """
    spec = self._array(name) | ({} if missing_is_zero else _NO_ZERO_FILL)
    try:
      array = ts.open(spec, open=True, context=self._context).result()
    except ValueError as error:
      raise ConvertError(f'{name} in {self.path} cannot be opened: {error}') from error
    chunk = math.prod(array.chunk_layout.read_chunk.shape or ()) * array.dtype.numpy_dtype.itemsize
    if chunk > LARGEST_READ:
      raise ConvertError(
        f'{name} in {self.path} has chunks of {chunk} bytes; {LARGEST_READ} at most.'
      )
    return array

  def cache_for(self, names: Iterable[str]) -> None:
    """Keeps decoded chunks that hold several layers, so that each is decoded once.

    Bounded by the largest such chunk: it has to fit into memory anyway to be read at all.
    """
    largest = 0
    for name in names:
      array = self.open(name)
      if math.prod(array.chunk_layout.read_chunk.shape) * array.dtype.numpy_dtype.itemsize > PIECE:
        shape = array.chunk_layout.read_chunk.shape
        largest = max(largest, math.prod(shape) * array.dtype.numpy_dtype.itemsize)
    self._context = _context(largest)

  def stored(
    self,
    name: str,
    *,
    label: str = '',
    index: tuple[int, ...] = (),
    merge: int = 0,
    missing_is_zero: bool = False,
  ) -> Stored:
    """An array, or the slice `index` of it, as a Stored.

    Args:
      label: the name to use in messages; default: name.
      index: leading indices.
      merge: trailing axes to see as one (a split gate).
      missing_is_zero: for arrays whose writer omits chunks of zeros.
    """
    plain = None if missing_is_zero else self._plain(name, index, merge)
    if plain is not None:
      return self._stored_plain(plain, label or name, merge)
    array = self.open(name, missing_is_zero=missing_is_zero)[index]
    return self._stored(array, label or name, merge)

  def _plain(self, name: str, index: tuple[int, ...], merge: int) -> PlainSlice | None:
    """A slice that needs no TensorStore, if this is one."""
    if self._ocdbt or is_remote(self.path):
      return None
    plain = plain_slice(self.path / name, index)
    return plain if plain is not None and len(plain.shape) > merge else None

  def _stored_plain(self, plain: PlainSlice, label: str, merge: int) -> Stored:
    seen = _merged(plain.shape, merge)

    def read(start: int, stop: int) -> np.ndarray:
      try:
        return plain.read(start, stop).reshape((stop - start, *seen[1:]))
      except ConvertError as error:
        raise ConvertError(f'{label} in {self.path} cannot be read: {error}.') from error

    return Stored(label, seen, plain.dtype, read, min(plain.unit, seen[0]))

  def _stored(self, array: ts.TensorStore, label: str, merge: int) -> Stored:
    shape = tuple(array.shape)
    seen = _merged(shape, merge)
    dtype = np.dtype(array.dtype.numpy_dtype)
    # Rows are those of the first axis, unless that is itself one of the merged ones.
    whole = not shape or (merge and len(seen) == 1)

    def read(start: int, stop: int) -> np.ndarray:
      try:
        x = np.asarray((array if whole else array[start:stop]).read().result())
      except ValueError as error:
        raise ConvertError(f'{label} in {self.path} cannot be read: {error}') from error
      x = np.ascontiguousarray(x)
      if whole:
        return x.reshape(seen)[start:stop] if shape else x.reshape(())
      return x.reshape((stop - start, *seen[1:]))

    chunk = array.chunk_layout.read_chunk.shape if shape else None
    unit = seen[0] if whole and shape else chunk[0] if chunk and chunk[0] else 1
    return Stored(label, seen, dtype, read, min(unit, seen[0] if seen else 1))

  def create(
    self, name: str, shape: tuple[int, ...], dtype: np.dtype, lead: int, unit: int, codec: Mapping
  ) -> None:
    """Makes an array whose chunks are one slice of its `lead` axes and about PIECE bytes of it.

    Args:
      unit: rows that will be written together; the chunk divides them.
      codec: zarr compressor, such as {'id': 'zstd', 'level': 1}; None for none.
    """
    body = shape[lead:]
    row_bytes = max(1, math.prod(body[1:]) * dtype.itemsize)
    rows = divisor_near(unit, max(1, LARGEST_CHUNK // row_bytes)) if body else 1
    chunks = [1] * lead + ([min(rows, body[0]), *body[1:]] if body else [])
    metadata = {
      'zarr_format': 2,
      'shape': list(shape),
      'chunks': chunks,
      'dtype': 'bfloat16' if dtype == DTYPES['bfloat16'] else dtype.newbyteorder('<').str,
      'compressor': dict(codec) if codec else None,
      'fill_value': None,
      'filters': None,
      'order': 'C',
      'dimension_separator': '.',
    }
    # Zeros are stored like anything else, so that a missing chunk always means a lost one.
    spec = self._array(name) | {'metadata': metadata, 'store_data_equal_to_fill_value': True}
    with _disk_errors(self.path):
      ts.open(spec, create=True, open=True, context=self._context).result()

  def writable(
    self, name: str, *, label: str = '', index: tuple[int, ...] = (), split: tuple[int, ...] = ()
  ) -> Writable:
    """A slice of an array that exists, for writing.

    Args:
      split: trailing shape of a row, where it is not the caller's (a split gate).
    """
    merge = 2 if split else 0
    plain = self._plain(name, index, merge)
    if plain is not None:
      stored = self._stored_plain(plain, label or name, merge)
      return Writable(stored, lambda start, x: plain.write(start, x), plain.sync)
    spec = self._array(name) | _NO_ZERO_FILL | {'store_data_equal_to_fill_value': True}
    array = ts.open(spec, open=True, context=self._context).result()[index]
    stored = self._stored(array, label or name, merge)

    def write(start: int, x: np.ndarray) -> None:
      whole = not array.shape or len(x) == stored.rows
      part = array if whole else array[start : start + len(x)]
      with _disk_errors(self.path):
        part.write(x.reshape(part.shape)).result()

    def sync() -> None:
      if self._ocdbt:
        return  # the whole database is synced when a conversion is complete
      # Chunks are named for their place, so those of a slice begin with its index.
      prefix = ''.join(f'{i}.' for i in index)
      for path in (self.path / name).iterdir():
        if path.name.startswith(prefix) and '.__lock' not in path.name:
          sync_file(path)

    return Writable(stored, write, sync)


@contextlib.contextmanager
def _disk_errors(path: os.PathLike | str) -> Iterator[None]:
  """TensorStore says only in its text that it was the disk."""
  try:
    yield
  except ValueError as error:
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO):
      if os.strerror(number) in str(error):
        raise OSError(number, os.strerror(number), os.fspath(path)) from error
    raise


def _merged(shape: tuple[int, ...], merge: int) -> tuple[int, ...]:
  """`shape` with the last `merge` axes seen as one."""
  return (*shape[: len(shape) - merge], math.prod(shape[-merge:])) if merge else shape


def missing_chunks(array: ts.TensorStore, most: int = 8) -> list[str]:
  """Names of the first chunks of an array that its store does not have."""
  keys = {key.decode().rsplit('/', 1)[-1] for key in array.kvstore.list().result()}
  chunk = array.chunk_layout.read_chunk.shape or ()
  grid = [range(-(-n // c)) for n, c in zip(array.shape, chunk, strict=True)]
  # One by one: a shape may claim more chunks than there is memory for their names.
  names = ('.'.join(map(str, place)) or '0' for place in _places(grid))
  return list(itertools.islice((name for name in names if name not in keys), most))


def _places(grid: Sequence[range]) -> Iterator[tuple[int, ...]]:
  if not grid:
    yield ()
    return
  for i in grid[0]:
    for rest in _places(grid[1:]):
      yield (i, *rest)
