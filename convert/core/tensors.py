"""Tensors as they lie in files: read and written a few rows at a time, never all at once.

Two layouts exist. Ours and t5x's have the same bytes for a tensor ([in, out]; our split gate is a
view); PyTorch's Linear kernels are transposed. So a conversion is a copy or a transposition, with
a change of dtype if asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

from openmoe.checkpoint.paths import LFS, Unreadable, is_remote, open_regular, write_whole

PIECE = 8 << 20  # bytes handled at a time, unless a chunk or an expert is larger
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TILE = (512, 256)  # of a transposition: rows read, columns read
DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': BFLOAT16}


class ConvertError(RuntimeError):
  """A conversion or check that cannot go on; names the tensor, the rule and the remedy."""

  exit_code = 64


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in a file.

  Attributes:
    name: as the format spells it.
    shape, dtype: as stored.
    read: (start, stop) -> rows of axis 0, C-contiguous; scalars are read with (0, 1).
    unit: rows that are best read together, because they share a compressed chunk.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[int, int], np.ndarray]
  unit: int = 1

  @property
  def rows(self) -> int:
    return self.shape[0] if self.shape else 1

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def step(self, piece: int = PIECE) -> int:
    """Rows to read at a time: about `piece` bytes, in whole units."""
    row_bytes = max(1, self.nbytes // max(1, self.rows))
    return min(self.rows, max(1, piece // (row_bytes * self.unit)) * self.unit)

  def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) over the whole tensor, in order."""
    step = self.step()
    for start in range(0, self.rows, step):
      yield start, self.read(start, min(start + step, self.rows))

  def whole(self) -> np.ndarray:
    return self.read(0, self.rows).reshape(self.shape)

  def sha256(self) -> str:
    """Digest of the bytes in C order, as stored."""
    digest = hashlib.sha256()
    for _, x in self.pieces():
      digest.update(as_bytes(x))
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Writable:
  """A tensor being written: what was written can be read back.

  Attributes:
    stored: the reading side.
    write: (start, rows) at a multiple of stored.unit.
    sync: waits until the disk has all that was written.
  """

  stored: Stored
  write: Callable[[int, np.ndarray], None]
  sync: Callable[[], None] = lambda: None


def as_bytes(x: np.ndarray) -> memoryview:
  """The array's bytes without a copy; bfloat16 has no buffer interface of its own."""
  return memoryview(np.ascontiguousarray(x).reshape(-1).view(np.uint8))


def transpose(x: np.ndarray) -> np.ndarray:
  """The last two axes exchanged, C-contiguous."""
  out = np.empty((*x.shape[:-2], x.shape[-1], x.shape[-2]), x.dtype)
  transpose_into(out, x)
  return out


def transpose_into(out: np.ndarray, x: np.ndarray) -> None:
  """out[:] = x with the last two axes exchanged; tile by tile, five times NumPy's speed.

  Each tile is copied first: rows a power of two apart share a few places of the cache, and would
  push each other out before their other columns are read.
  """
  (rows, columns), (high, wide) = x.shape[-2:], TILE
  tile = np.empty((min(rows, high), min(columns, wide)), x.dtype)
  for at in np.ndindex(x.shape[:-2]):
    for i in range(0, rows, high):
      for j in range(0, columns, wide):
        part = x[at][i : i + high, j : j + wide]
        held = tile[: part.shape[0], : part.shape[1]]
        held[...] = part
        out[at][j : j + wide, i : i + high] = held.T


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
  """Equal bit by bit; unlike ==, NaN equals itself and 0.0 is not -0.0."""
  kind = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[a.dtype.itemsize]
  return a.dtype == b.dtype and np.array_equal(a.view(kind), b.view(kind))


def is_float(dtype: np.dtype) -> bool:
  """Whether a type is one of floating numbers."""
  return np.issubdtype(dtype, np.floating) or dtype == BFLOAT16


def is_finite(x: np.ndarray) -> bool:
  """Whether all values are; a finite sum is the quick proof, an infinite one may be overflow."""
  if not is_float(x.dtype):
    return True
  with np.errstate(over='ignore', invalid='ignore'):
    if x.dtype == np.float32 and np.isfinite(x.sum()):
      return True
    return bool(np.isfinite(x.astype(np.float32, copy=False)).all())


def cast(x: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
  """`x` in another dtype, rounded to nearest even.

  Raises:
    ConvertError: a finite value overflows.
  """
  if x.dtype == dtype:
    return x
  with np.errstate(over='ignore'):
    y = x.astype(dtype)
  if not is_finite(y) and is_finite(x):
    largest = float(np.max(np.abs(x)))
    limit = float(ml_dtypes.finfo(dtype).max)
    raise ConvertError(
      f'{name}: {largest:.4g} overflows {dtype.name} (largest {limit:.4g}). Convert to float32, or '
      'mend the tensor.'
    )
  return y


def divisor_near(step: int, limit: int) -> int:
  """The largest divisor of `step` up to `limit`, at least 1."""
  return next(n for n in range(max(1, min(step, limit)), 0, -1) if step % n == 0)


def digest(value: object) -> str:
  """SHA-256 of a JSON-able value."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sync_file(path: os.PathLike | str) -> None:
  """Waits until the disk has a local file, or the names in a local directory."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def write_synced(path: os.PathLike | str, content: bytes) -> None:
  """Writes a file as a whole and waits until the disk has it."""
  write_whole(path, content, sync=True)


def read_at(path: os.PathLike | str, offset: int, size: int) -> np.ndarray:
  """Bytes of a file, uint8.

  Raises:
    ConvertError: the file ends before, or is none.
  """
  try:
    with open_regular(path) as file:
      if size > os.fstat(file.fileno()).st_size if not is_remote(path) else False:
        raise ConvertError(f'{path} is truncated: it has fewer than {size} bytes.')
      content = np.empty(size, np.uint8)
      file.seek(offset)
      done = 0
      while done < size:
        got = file.readinto(memoryview(content)[done:])
        if not got:
          raise ConvertError(f'{path} is truncated: {size} bytes at {offset} are not all there.')
        done += got
  except Unreadable as error:
    raise ConvertError(str(error)) from error
  return content


def write_at(path: os.PathLike | str, offset: int, content: memoryview) -> None:
  """Writes bytes into a local file that exists.

  Raises:
    OSError: not all of them could be written.
  """
  with open(path, 'r+b', buffering=0) as file:
    while content:
      # Of a disk that is nearly full a write takes what fits, and the next one says so.
      done = os.pwrite(file.fileno(), content[:PIECE], offset)
      content, offset = content[done:], offset + done


def refuse_pointer(path: os.PathLike | str, first: bytes) -> None:
  """Raises ConvertError if a weight file begins as what git keeps in its place."""
  if first.startswith(LFS[: len(first)]) and len(first) >= 8:
    raise ConvertError(
      f'{path} is a Git LFS pointer, not the file: run `git lfs pull` in its folder, or '
      'download it.'
    )
