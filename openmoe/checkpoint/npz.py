"""NumPy's .npz archives from anybody: arrays and nothing else, of a size that is known before."""

from __future__ import annotations

import io
import zipfile
import zlib

import numpy as np

from openmoe.checkpoint.paths import Unreadable

MOST_BYTES = 1 << 31  # of all arrays, unpacked; real ones have some MB
# What zipfile and NumPy's reader raise for damage: also encrypted or patched entries, methods of
# compression that are not there, shapes beyond any memory, headers that are no Python.
_DAMAGE = (
  *(ValueError, KeyError, TypeError, OSError, EOFError, OverflowError, MemoryError, SyntaxError),
  *(NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error),
)


def parse(content: bytes, where: str, most: int = MOST_BYTES) -> dict[str, np.ndarray]:
  """The arrays of an archive by name. Nothing in it is executed.

  Args:
    where: what a message calls it.
    most: bytes that it may unpack to.

  Raises:
    Unreadable: it is damaged, holds objects, or unpacks to more.
  """
  try:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
      size = sum(entry.file_size for entry in archive.infolist())
    if size > most:
      raise ValueError(f'it unpacks to {size:,} bytes')
    # allow_pickle stays off: what lies in a run directory must not be able to execute anything.
    with np.load(io.BytesIO(content), allow_pickle=False) as loaded:
      return dict(loaded)
  except _DAMAGE as error:
    raise Unreadable(f'{where} holds no arrays that can be read: {error!r:.300}') from error
