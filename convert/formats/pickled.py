"""torch.save files (.bin) without torch and without running what they contain.

A .bin is a zip archive: data.pkl is a pickle that says which tensors there are, data/N holds the
bytes of storage N. The pickle is read by weight_pickle.py, which builds descriptions of tensors and
can do nothing else.
"""

from __future__ import annotations

import math
import os
import struct
import threading
import zipfile
import zlib
from typing import Any

import numpy as np
from etils import epath

from convert.core.tensors import PIECE, ConvertError, Stored, as_bytes, read_at, refuse_pointer
from convert.formats.weight_pickle import PickleError, Tensor, read_pickle
from openmoe.checkpoint.paths import Unreadable, open_regular

_LARGEST_PICKLE = 64 << 20
_MOST_ENTRIES = 1 << 20
_LOCAL_HEADER = 30  # bytes


class _Storage:
  """The bytes of one entry of the archive, compared with its CRC-32 when they are read in order."""

  def __init__(self, path: epath.Path, info: zipfile.ZipInfo):
    header = read_at(path, info.header_offset, _LOCAL_HEADER).tobytes()
    if header[:4] != b'PK\x03\x04':
      raise ConvertError(f'{path} is damaged: {info.filename} does not lie where its list says.')
    # The local header has name and padding of its own length.
    name, extra = struct.unpack('<HH', header[26:30])
    self.start = info.header_offset + _LOCAL_HEADER + name + extra
    self.size, self._crc = info.file_size, info.CRC
    self._what = f'{path} is damaged: {info.filename}'
    self._path, self._lock = path, threading.Lock()
    self._sound: bool | None = None
    if self.start + self.size > path.stat().length:
      raise ConvertError(f'{path} is truncated: {info.filename} is not all there.')

  def read(self, offset: int, size: int) -> np.ndarray:
    return read_at(self._path, self.start + offset, size)

  def compare(self, crc: int) -> None:
    """Raises ConvertError unless the CRC-32 of all bytes is this one."""
    self._sound = crc == self._crc
    if not self._sound:
      raise ConvertError(f'{self._what} has another CRC-32 than when it was written.')

  def check(self) -> None:
    """As compare, of the bytes as they lie there; they are read once."""
    with self._lock:
      if self._sound is None:
        crc = 0
        for at in range(0, self.size, PIECE):
          crc = zlib.crc32(self.read(at, min(PIECE, self.size - at)), crc)
        self.compare(crc)
      elif not self._sound:
        self.compare(self._crc ^ 1)


def _stored(path: epath.Path, name: str, tensor: Tensor, storage: _Storage) -> Stored:
  """Rows of a tensor.

  Raises:
    ConvertError: it reaches beyond its storage.
  """
  dtype, shape, strides = tensor.dtype, tensor.shape, tensor.strides
  item = dtype.itemsize
  lowest = min((*shape, 1)) < 1 or min((*strides, 0)) < 0 or tensor.offset < 0
  if len(shape) != len(strides) or lowest:
    raise ConvertError(f'{name} in {path} reaches beyond its storage.')
  last = tensor.offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
  if (last + 1) * item > storage.size or math.prod(shape) * item > storage.size:
    raise ConvertError(f'{name} in {path} reaches beyond its storage.')
  row = math.prod(shape[1:])
  plain = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
  if strides != plain:
    return Stored(name, shape, dtype, _gathered(tensor, storage, last), max(1, *shape[:1]))
  whole = tensor.offset == 0 and math.prod(shape) * item == storage.size
  crc, done = 0, 0

  def read(first: int, stop: int) -> np.ndarray:
    nonlocal crc, done
    if not whole:
      storage.check()
    content = storage.read((tensor.offset + first * row) * item, (stop - first) * row * item)
    if whole and first in (0, done):
      # In order, as a conversion and fsck read: then the check costs no reading of its own.
      crc, done = zlib.crc32(as_bytes(content), 0 if first == 0 else crc), stop
      if (stop if shape else 1) == (shape[0] if shape else 1):
        storage.compare(crc)
    return content.view(dtype).reshape((stop - first, *shape[1:]) if shape else ())

  return Stored(name, shape, dtype, read)


def _gathered(tensor: Tensor, storage: _Storage, last: int):
  """Reading of a transposed view, which torch keeps as it is; from its whole storage."""
  item = tensor.dtype.itemsize

  def read(first: int, stop: int) -> np.ndarray:
    storage.check()
    content = storage.read(tensor.offset * item, (last - tensor.offset + 1) * item)
    strides = [s * item for s in tensor.strides]
    view = np.lib.stride_tricks.as_strided(content.view(tensor.dtype), tensor.shape, strides)
    return np.ascontiguousarray(view[first:stop])

  return read


def _archive(path: epath.Path) -> tuple[str, dict[str, zipfile.ZipInfo], bytes]:
  """(what names in the archive begin with, its entries, the pickle)."""
  with open_regular(path) as file, zipfile.ZipFile(file) as archive:
    infos = archive.infolist()
    entries = {info.filename: info for info in infos}
    if len(infos) > _MOST_ENTRIES or len(entries) < len(infos):
      raise ConvertError(f'{path} has too many entries, or two of one name.')
    pickled = [name for name in entries if name.endswith('/data.pkl') or name == 'data.pkl']
    if len(pickled) != 1:
      raise ConvertError(f'{path} has {len(pickled)} entries data.pkl, not one.')
    if entries[pickled[0]].file_size > _LARGEST_PICKLE:
      raise ConvertError(f'{path}: its data.pkl is larger than {_LARGEST_PICKLE} bytes.')
    if any(info.compress_type for info in infos):
      raise ConvertError(f'{path} is compressed, which torch.save never does.')
    root = pickled[0].removesuffix('data.pkl')
    order = entries.get(f'{root}byteorder')
    if order and (order.file_size != 6 or archive.read(order) != b'little'):
      raise ConvertError(f'{path} was written on a big-endian machine.')
    return root, entries, archive.read(pickled[0])


def read_bin(path: os.PathLike | str) -> dict[str, Stored]:
  """The tensors of a .bin file by name.

  Raises:
    ConvertError: it is no zip archive of torch, it is damaged, or it holds more than tensors.
  """
  path = epath.Path(path)
  try:
    with open_regular(path) as file:
      refuse_pointer(path, file.read(64))
    root, entries, pickled = _archive(path)
    found = read_pickle(pickled)
  except Unreadable as error:
    raise ConvertError(str(error)) from error
  except PickleError as error:
    raise ConvertError(f'{path} is not a plain weight file: {error}. Nothing was run.') from error
  except (zipfile.BadZipFile, EOFError, ValueError, OSError, NotImplementedError) as error:
    # Offsets of a damaged list lead anywhere, before the file's beginning too.
    raise ConvertError(
      f'{path} is damaged, truncated, or of the format before torch 1.6: {error}. Save it anew '
      'with a present torch, best as safetensors.'
    ) from error
  if not isinstance(found, dict):
    raise ConvertError(f'{path} holds a {type(found).__name__}, not a state_dict.')
  storages: dict[str, _Storage] = {}
  return {str(n): _resolve(path, root, entries, storages, str(n), t) for n, t in found.items()}


def _resolve(
  path: epath.Path,
  root: str,
  entries: dict[str, zipfile.ZipInfo],
  storages: dict[str, _Storage],
  name: str,
  tensor: Any,
) -> Stored:
  if not isinstance(tensor, Tensor):
    raise ConvertError(f'{name} in {path} is a {type(tensor).__name__}, not a tensor.')
  info = entries.get(f'{root}data/{tensor.key}')
  if info is None or not 0 <= tensor.elements * tensor.dtype.itemsize <= info.file_size:
    raise ConvertError(f'{name} in {path}: its storage data/{tensor.key} is not all there.')
  if tensor.key not in storages:
    storages[tensor.key] = _Storage(path, info)
  return _stored(path, name, tensor, storages[tensor.key])
