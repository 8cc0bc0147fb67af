"""t5x checkpoints: a flax msgpack file `checkpoint` and one zarr directory per large array.

Written from the format alone; t5x is not needed. Leaves lie in the msgpack, or there is a
TensorStore spec in their place whose last path component names a directory beside it. Driver and
bucket of the spec are ignored, as t5x itself ignores them: a checkpoint may have been moved.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import flax.serialization
import msgpack
import numpy as np
from etils import epath

from convert.core.forms import RECEIPT, Form, Options, Sink, read_model
from convert.core.names import Row, name_problems, name_table
from convert.core.tensors import ConvertError, Stored, Writable, write_synced
from convert.formats.zarrays import ZarrStore, is_ocdbt, missing_chunks
from openmoe.checkpoint.description import Description, kept_vocabulary, read_description
from openmoe.checkpoint.paths import is_inside, read_small
from openmoe.config import Architecture, ConfigError, ModelConfig

SLOTS = ('m', 'v', 'v_row', 'v_col')
VERSION = 3
# Float weights hardly compress: a level below 0 keeps the format and leaves out the effort.
CODECS = {'zstd': {'id': 'zstd', 'level': -1}, 'gzip': {'id': 'gzip', 'level': 1}}
_ARRAYS = (1, 3)  # msgpack extension codes of flax.serialization: arrays and NumPy scalars
_LARGEST_FILE = 1 << 30
_LONGEST, _MOST_CONTAINERS = 1 << 16, 1 << 20


def _check_size(content: bytes) -> None:
  """Refuses a msgpack that would unpack to far more than its own size.

  Raises:
    ConvertError: it has more, larger or deeper containers than any checkpoint.
  """
  count = 0

  def seen(_) -> None:
    nonlocal count
    count += 1
    if count > _MOST_CONTAINERS:
      raise ConvertError(f'The checkpoint file has more than {_MOST_CONTAINERS} containers.')

  def inside(code: int, data: bytes) -> None:
    if code not in _ARRAYS:
      raise ConvertError(f'The checkpoint file holds msgpack extension {code}; known are 1 and 3.')
    unpack(data)

  def unpack(data: bytes) -> None:
    msgpack.unpackb(
      data,
      object_hook=seen,
      list_hook=seen,
      ext_hook=inside,
      strict_map_key=False,
      max_array_len=_LONGEST,
      max_map_len=_LONGEST,
    )

  unpack(content)


def _leaves(node: Any, path: str = '') -> Iterator[tuple[str, Any]]:
  """('/'-joined path, array or directory name) of every leaf."""
  if isinstance(node, np.ndarray) or np.isscalar(node):
    yield path, np.asarray(node)
  elif not isinstance(node, Mapping):
    raise ConvertError(f'{path} in the checkpoint file is a {type(node).__name__}, not an array.')
  elif 'driver' in node and 'kvstore' in node:
    name = os.path.basename(str(node['kvstore'].get('path', '')).rstrip('/'))
    if not is_inside(name):
      raise ConvertError(f'{path} in the checkpoint file names no directory beside it.')
    yield path, name
  else:
    for key, child in node.items():
      yield from _leaves(child, f'{path}/{key}' if path else str(key))


class T5xForm(Form):
  """Reads a t5x checkpoint: t5x's own form, or what it saves through orbax.

  Args:
    path: the checkpoint directory, local or gs://.

  Raises:
    ConvertError: if the msgpack file cannot be read or is of another version.
  """

  kind = 't5x'

  def __init__(self, path: os.PathLike | str):
    self.path = epath.Path(path)
    if is_ocdbt(self.path / 'state'):  # today's t5x saves through orbax
      self._store = ZarrStore(self.path / 'state')
      self._leaves = {name.replace('.', '/'): name for name in self._store.names()}
      self.step = self._read_step()
      return
    self._store = ZarrStore(path)
    try:
      content = read_small(self.path / 'checkpoint', _LARGEST_FILE)
      _check_size(content)
      # Written by flax.serialization, so arrays that lie in pieces are put together as well.
      tree = flax.serialization.msgpack_restore(content)
      version, tree = tree['version'], tree['optimizer']
      self._leaves = dict(_leaves(tree))
    except (ValueError, KeyError, TypeError, AttributeError, msgpack.UnpackException) as error:
      raise ConvertError(f'{self.path}/checkpoint is not a whole t5x msgpack: {error!r}') from error
    if version != VERSION:
      raise ConvertError(f'{self.path} is a t5x checkpoint of version {version}; known is 3.')
    self.step = self._read_step()

  def _read_step(self) -> int | None:
    if 'state/step' not in self._leaves:
      return None
    stored = self._stored('state/step')
    if math.prod(stored.shape) != 1 or not np.issubdtype(stored.dtype, np.integer):
      raise ConvertError(f'{self.path}: state/step is no whole number.')
    step = int(stored.read(0, 1).reshape(()))
    if not 0 <= step < 1 << 53:
      raise ConvertError(f'{self.path}: state/step is {step}.')
    return step

  def _stored(self, path: str) -> Stored:
    leaf = self._leaves[path]
    if isinstance(leaf, str):
      # TensorStore omits chunks of zeros unless told otherwise, and moments may be zero.
      return self._store.stored(
        leaf, label=path, missing_is_zero=path.startswith('state/param_states/')
      )
    read = lambda start, stop: leaf[start:stop] if leaf.ndim else leaf
    return Stored(path, leaf.shape, leaf.dtype, read, max(1, len(leaf) if leaf.ndim else 1))

  def tensors(self) -> dict[str, Stored]:
    return {path: self._stored(path) for path in sorted(self._leaves)}

  def parameter(self, row: Row) -> Stored:
    return self._stored(f'target/{row.t5x}')

  def check_names(self, rows: Sequence[Row]) -> list[str]:
    found = [p.removeprefix('target/') for p in self._leaves if p.startswith('target/')]
    return name_problems(found, [row.t5x for row in rows])

  def slots(self, row: Row) -> dict[str, Stored]:
    """Adafactor's slots of a parameter that are in use; the others of t5x have shape (1,)."""
    base = f'state/param_states/{row.t5x}'
    found = {s: self._stored(f'{base}/{s}') for s in SLOTS if f'{base}/{s}' in self._leaves}
    return {name: stored for name, stored in found.items() if stored.shape != (1,)}

  @property
  def has_optimizer(self) -> bool:
    return any(path.startswith('state/param_states/') for path in self._leaves)

  def problems(self) -> Iterator[str]:
    named = {leaf for leaf in self._leaves.values() if isinstance(leaf, str)}
    there = set(self._store.names())
    yield from (f'{name} is a directory that `checkpoint` does not name' for name in there - named)
    for path, leaf in sorted(self._leaves.items()):
      if not isinstance(leaf, str):
        continue
      if leaf not in there:
        yield f'{path}: its directory {leaf} is missing'
      elif path.startswith('target/'):
        for chunk in missing_chunks(self._store.open(leaf)):
          yield f'{path}: chunk {chunk} is missing'

  @functools.cached_property
  def _told(self) -> Description | None:
    """What the receipt of the export says: t5x's own files tell no model.

    Raises:
      ConvertError: the receipt is damaged.
    """
    receipt, where = self.receipt() or {}, f'{self.path}/{RECEIPT}'
    if 'description' not in receipt:
      told = receipt.get('model')  # of before there were descriptions
      return None if told is None else Description(read_model(told, f'{where}: model'))
    try:
      return read_description(receipt['description'], f'{where}: description')
    except ConfigError as error:
      raise ConvertError(str(error)) from error

  def model(self) -> ModelConfig | None:
    return self._told.model if self._told else None

  def describe(self, config: ModelConfig) -> Description:
    told = self._told
    return dataclasses.replace(told, model=config) if told else super().describe(config)

  def vocabulary_content(self) -> bytes:
    record = self._told.vocabulary if self._told else None
    return kept_vocabulary(self.path.parent, record) if record else b''

  def sizes(self) -> dict[str, Any]:
    """Everything but how heads x head_dim divides, which no shape tells."""
    shape = lambda path: self._stored(path).shape
    layers = {p.split('/')[2] for p in self._leaves if p.startswith('target/decoder/layers_')}
    routers = [p for p in self._leaves if p.startswith('target/') and p.endswith('/w/kernel')]
    wo = [
      p
      for p in self._leaves
      if p.startswith('target/') and p.endswith(('layers_0/mlp/wo/kernel', '/expert/wo/kernel'))
    ]
    sizes = {'num_layers': len(layers), 'num_sparse_layers': len(routers)}
    sizes['architecture'] = Architecture.OPENMOE.value  # t5x has no other
    if 'target/token_embedder/embedding' in self._leaves:
      embedding = shape('target/token_embedder/embedding')
      sizes |= dict(zip(('vocab_size', 'embed_dim'), embedding, strict=True))
    if routers:
      sizes['num_experts'] = shape(routers[0])[-1]
    if wo:
      sizes['mlp_dim'] = shape(wo[0])[-2]
    return sizes


class T5xSink(Sink):
  """Writes a t5x checkpoint; readable by t5x, or by plain msgpack and TensorStore.

  Args:
    path: directory that becomes the checkpoint.
    step: its optimizer step.
    codec: 'zstd' (today's t5x) or 'gzip' (the released checkpoints).
  """

  kind = 't5x'

  def __init__(self, path: epath.Path, step: int, codec: str = 'zstd'):
    self._path = path
    self._store = ZarrStore(path)
    self._codec = CODECS[codec]
    self._step = step
    self._tree: dict[str, Any] = {}
    self._inline: dict[str, np.ndarray] = {}

  @classmethod
  def begin(cls, place: epath.Path, source: Form, described: Description, options: Options) -> Self:
    del described  # the receipt tells what t5x has no place for
    return cls(place, source.step or 0, options.codec)

  @classmethod
  def check_model(cls, config: ModelConfig) -> None:
    if config.architecture is not Architecture.OPENMOE:
      raise ConvertError(
        f'--to t5x: {config.name} is a {config.architecture.value}, for which t5x has no model and '
        'no names; export it --to hf.'
      )

  def _add(self, path: str, shape: tuple[int, ...], dtype: np.dtype, unit: int) -> None:
    name = path.replace('/', '.')
    self._store.create(name, shape, dtype, 0, unit, self._codec)
    array = self._store.open(name)
    self._set(
      path,
      {
        'driver': 'zarr',
        'dtype': dtype.name,
        'kvstore': {'driver': 'file', 'path': name},
        'metadata': {
          'chunks': list(array.chunk_layout.read_chunk.shape),
          'compressor': self._codec,
          'shape': list(shape),
        },
      },
    )

  def _set(self, path: str, leaf: Any) -> None:
    *parents, last = path.split('/')
    node = self._tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = leaf

  def prepare(self, config: ModelConfig, sources: Mapping[str, Stored], dtype: np.dtype) -> None:
    self._set('state/step', np.asarray(self._step, np.int32))
    for row in name_table(config):
      source = sources[row.name]
      self._add(f'target/{row.t5x}', source.shape, dtype, source.step())

  def prepare_slots(self, slots: Mapping[str, Mapping[str, Stored]]) -> None:
    """Lays out Adafactor's slots by t5x path of the parameter; those not in use are (1,) zeros.

    t5x reads a leaf from a directory of its own only where it has named axes, and these are `v` and
    the factored slots of experts; it wants all others in the msgpack (t5x checkpoints.py _read_ts).
    """
    for path, used in slots.items():
      for name in SLOTS:
        where = f'state/param_states/{path}/{name}'
        if name not in used:
          self._set(where, np.zeros((1,), np.float32))
        elif name == 'v' or '/expert/' in path:
          self._add(where, used[name].shape, used[name].dtype, used[name].step())
        else:
          # Whatever step a conversion was interrupted at, what no file holds is read again.
          self._inline[where] = np.array(used[name].whole())
          self._set(where, self._inline[where])

  def parameter(self, row: Row) -> Writable:
    return self._store.writable(f'target.{row.t5x}'.replace('/', '.'), label=f'target/{row.t5x}')

  def slot(self, row: Row, name: str) -> Writable:
    path = f'state/param_states/{row.t5x}/{name}'
    if path not in self._inline:
      return self._store.writable(path.replace('/', '.'), label=path)
    x = self._inline[path]

    def write(start: int, rows: np.ndarray) -> None:
      x[start : start + len(rows)] = rows

    return Writable(Stored(path, x.shape, x.dtype, lambda start, stop: x[start:stop]), write)

  def finish(self) -> None:
    content = {'version': VERSION, 'optimizer': self._tree}
    write_synced(self._path / 'checkpoint', flax.serialization.msgpack_serialize(content))


def is_t5x(path: epath.Path) -> bool:
  ours = (path / 'metadata').exists()
  return (path / 'checkpoint').exists() or (not ours and is_ocdbt(path / 'state'))
