"""t5x checkpoints as today's t5x writes them: one OCDBT database of orbax's in `state/`.

Every leaf is a zarr array under its name with dots, small ones and the step too; `_METADATA` says
how the tree goes. Written from the format alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from convert.core.tensors import Stored, Writable, write_synced
from convert.formats.t5x import CODECS, SLOTS, T5xSink
from convert.formats.zarrays import ZarrStore

_HANDLER = 'orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler'


class OrbaxSink(T5xSink):
  """Writes a t5x checkpoint through orbax's format; see T5xSink."""

  def __init__(self, path: epath.Path, step: int, codec: str = 'zstd'):
    super().__init__(path, step, codec)
    (path / 'state').mkdir(parents=True, exist_ok=True)
    self._store = ZarrStore(path / 'state', ocdbt=True)
    self._shapes: dict[str, tuple[int, ...]] = {}

  def _add(self, path: str, shape: tuple[int, ...], dtype: np.dtype, unit: int) -> None:
    self._store.create(path.replace('/', '.'), shape, dtype, 0, unit, CODECS['zstd'])
    self._shapes[path] = shape

  def _set(self, path: str, leaf: Any) -> None:
    self._add(path, leaf.shape, leaf.dtype, max(1, len(leaf) if leaf.ndim else 1))
    self._store.writable(path.replace('/', '.'), label=path).write(0, leaf)

  def prepare_slots(self, slots: Mapping[str, Mapping[str, Stored]]) -> None:
    """Lays out Adafactor's slots by t5x path of the parameter; those not in use are (1,) zeros."""
    for path, used in slots.items():
      for name in SLOTS:
        where = f'state/param_states/{path}/{name}'
        if name in used:
          self._add(where, used[name].shape, used[name].dtype, used[name].step())
        else:
          self._set(where, np.zeros((1,), np.float32))

  def slot(self, row, name: str) -> Writable:
    path = f'state/param_states/{row.t5x}/{name}'
    return self._store.writable(path.replace('/', '.'), label=path)

  def finish(self) -> None:
    tree = {}
    for path, shape in sorted(self._shapes.items()):
      keys = path.split('/')
      value = {'value_type': 'jax.Array', 'skip_deserialize': False, 'write_shape': list(shape)}
      tree[str(tuple(keys))] = {
        'key_metadata': [{'key': key, 'key_type': 2} for key in keys],
        'value_metadata': value,
      }
    state = {'tree_metadata': tree, 'use_ocdbt': True, 'use_zarr3': False}
    state |= {'store_array_data_equal_to_fill_value': True, 'custom_metadata': None}
    whole = {'item_handlers': {'state': _HANDLER}, 'metrics': {}, 'performance_metrics': {}}
    whole |= {'init_timestamp_nsecs': None, 'commit_timestamp_nsecs': None, 'custom_metadata': {}}
    write_synced(self._path / 'state' / '_METADATA', json.dumps(state).encode())
    write_synced(self._path / '_CHECKPOINT_METADATA', json.dumps(whole).encode())
    write_synced(self._path / 'commit_success.txt', b'Checkpoint commit was successful\n')
