"""torch.save files (.bin) without torch and without running what they contain.

A .bin is a zip archive: data.pkl is a pickle that says which tensors there are, data/N holds the
bytes of storage N. The pickle is read by an unpickler that knows seven harmless names, all replaced
by functions of ours; any other name is refused, so nothing in the file can be executed.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import os
import pickle
import struct
import zipfile
from typing import Any, ClassVar

import numpy as np
from etils import epath

from convert.core.tensors import BFLOAT16, ConvertError, Stored

_LARGEST_PICKLE = 64 << 20
_STORAGES = {
  'FloatStorage': np.dtype(np.float32),
  'BFloat16Storage': BFLOAT16,
  'HalfStorage': np.dtype(np.float16),
}


@dataclasses.dataclass(frozen=True)
class _Storage:
  key: str
  dtype: np.dtype
  elements: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
  storage: _Storage
  offset: int  # elements
  shape: tuple[int, ...]
  strides: tuple[int, ...]  # elements


def _rebuild_tensor(storage, offset, shape, strides, *unused) -> _Tensor:
  del unused  # requires_grad and hooks, of no use here
  if not isinstance(storage, _Storage):
    raise pickle.UnpicklingError('a tensor without a storage')
  return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _rebuild_parameter(tensor, *unused) -> _Tensor:
  del unused
  return tensor


class _Unpickler(pickle.Unpickler):
  """Resolves only the names below, to functions of this module."""

  _ALLOWED: ClassVar = {
    ('collections', 'OrderedDict'): collections.OrderedDict,
    ('torch._utils', '_rebuild_tensor_v2'): _rebuild_tensor,
    ('torch._utils', '_rebuild_parameter'): _rebuild_parameter,
  }

  def find_class(self, module: str, name: str) -> Any:
    if module == 'torch' and name in _STORAGES:
      return _STORAGES[name]
    if (module, name) not in self._ALLOWED:
      raise pickle.UnpicklingError(f'it asks for {module}.{name}, which no weight file needs')
    return self._ALLOWED[module, name]

  def persistent_load(self, pid: Any) -> _Storage:
    kind, dtype, key, _, elements = pid
    if kind != 'storage' or not isinstance(dtype, np.dtype):
      raise pickle.UnpicklingError(f'an unknown kind of reference: {kind!r}')
    return _Storage(str(key), dtype, int(elements))


def read_at(path: epath.Path, offset: int, size: int) -> np.ndarray:
  """Bytes of a file, uint8.

  Raises:
    ConvertError: the file ends before.
  """
  content = np.empty(size, np.uint8)
  # A local file is read without a buffer between; remote ones go through epath's own.
  opened = path.open('rb') if '://' in os.fspath(path) else open(path, 'rb', buffering=0)  # noqa: SIM115
  with opened as file:
    file.seek(offset)
    done = 0
    while done < size:
      got = file.readinto(memoryview(content)[done:])
      if not got:
        raise ConvertError(f'{path} is truncated: {size} bytes at {offset} are not all there.')
      done += got
  return content


def _data_offset(path: epath.Path, info: zipfile.ZipInfo) -> int:
  """Where an entry's bytes begin: its local header has name and padding of its own length."""
  header = read_at(path, info.header_offset, 30).tobytes()
  name, extra = struct.unpack('<HH', header[26:30])
  return info.header_offset + 30 + name + extra


def _stored(path: epath.Path, name: str, tensor: _Tensor, start: int, size: int) -> Stored:
  """Rows of a tensor whose storage begins at byte `start` of the file."""
  dtype, shape = tensor.storage.dtype, tensor.shape
  item = dtype.itemsize
  last = tensor.offset + sum((n - 1) * s for n, s in zip(shape, tensor.strides, strict=True))
  if min((*shape, 1)) < 1 or min((*tensor.strides, 0)) < 0 or (last + 1) * item > size:
    raise ConvertError(f'{name} in {path} reaches beyond its storage.')
  row = math.prod(shape[1:])
  plain = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))

  def read(first: int, stop: int) -> np.ndarray:
    if tensor.strides == plain:
      at = start + (tensor.offset + first * row) * item
      content = read_at(path, at, (stop - first) * row * item)
      return content.view(dtype).reshape((stop - first, *shape[1:]) if shape else ())
    # torch keeps transposed views as they are; such a tensor is gathered from its whole storage.
    content = read_at(path, start + tensor.offset * item, (last - tensor.offset + 1) * item)
    strides = [s * item for s in tensor.strides]
    view = np.lib.stride_tricks.as_strided(content.view(dtype), shape, strides)
    return np.ascontiguousarray(view[first:stop])

  return Stored(name, shape, dtype, read, 1 if tensor.strides == plain else max(1, *shape[:1]))


def read_bin(path: os.PathLike | str) -> dict[str, Stored]:
  """The tensors of a .bin file by name.

  Raises:
    ConvertError: it is no zip archive of torch, it is damaged, or it holds more than tensors.
  """
  path = epath.Path(path)
  try:
    with path.open('rb') as file, zipfile.ZipFile(file) as archive:
      entries = {info.filename: info for info in archive.infolist()}
      pickled = [name for name in entries if name.endswith('/data.pkl') or name == 'data.pkl']
      if len(pickled) != 1:
        raise ConvertError(f'{path} has {len(pickled)} entries data.pkl, not one.')
      if entries[pickled[0]].file_size > _LARGEST_PICKLE:
        raise ConvertError(f'{path}: its data.pkl is larger than {_LARGEST_PICKLE} bytes.')
      if any(info.compress_type for info in entries.values()):
        raise ConvertError(f'{path} is compressed, which torch.save never does.')
      root = pickled[0].removesuffix('data.pkl')
      if archive.read(root + 'byteorder') != b'little' if root + 'byteorder' in entries else False:
        raise ConvertError(f'{path} was written on a big-endian machine.')
      found = _Unpickler(io.BytesIO(archive.read(pickled[0]))).load()
  except zipfile.BadZipFile as error:
    raise ConvertError(
      f'{path} is truncated, or of the format before torch 1.6: {error}. Save it anew with a '
      'present torch, best as safetensors.'
    ) from error
  except Exception as error:
    if isinstance(error, (ConvertError, OSError)):
      raise
    # A hostile pickle can fail in any way; none of them may pass for a weight file.
    raise ConvertError(f'{path} is not a plain weight file: {error}. Nothing was run.') from error
  if not isinstance(found, dict):
    raise ConvertError(f'{path} holds a {type(found).__name__}, not a state_dict.')
  return {str(name): _resolve(path, root, entries, str(name), t) for name, t in found.items()}


def _resolve(path: epath.Path, root: str, entries: dict, name: str, tensor: Any) -> Stored:
  if not isinstance(tensor, _Tensor):
    raise ConvertError(f'{name} in {path} is a {type(tensor).__name__}, not a tensor.')
  info = entries.get(f'{root}data/{tensor.storage.key}')
  if info is None or info.file_size < tensor.storage.elements * tensor.storage.dtype.itemsize:
    raise ConvertError(f'{name} in {path}: its storage data/{tensor.storage.key} is not all there.')
  return _stored(path, name, tensor, _data_offset(path, info), info.file_size)
