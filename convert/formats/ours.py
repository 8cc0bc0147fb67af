"""Our own checkpoints, read and written a slice at a time, in the form openmoe/checkpoint/ has.

Reading takes orbax's OCDBT database or plain zarr directories, whatever the chunks; writing makes
plain zarr directories with one layer's rows to a chunk, which orbax restores like any other.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
from etils import epath

from convert.core.forms import Form, Options, Sink
from convert.core.names import Row, name_problems, name_table
from convert.core.tensors import ConvertError, Stored, Writable, write_synced
from convert.formats.zarrays import ZarrStore, missing_chunks
from openmoe.checkpoint import manifest, safe_json
from openmoe.checkpoint.description import (
  KEY,
  Description,
  OptimizerRecord,
  identity,
  kept_vocabulary,
  of_metadata,
  undescribed,
)
from openmoe.checkpoint.paths import Unreadable, step_of
from openmoe.config import Architecture, ConfigError, ModelConfig, OptimizerName

MOMENTS = ('v', 'v_row', 'v_col')
CODEC = None  # float weights hardly compress, and an uncompressed chunk is read five times faster
_STANDARD = 'orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler'
_HANDLERS = {
  'data': 'openmoe.data_positions.DataPositionsHandler',
  'metadata': 'orbax.checkpoint._src.handlers.json_checkpoint_handler.JsonCheckpointHandler',
  'params': _STANDARD,
  'state': _STANDARD,
}


def _moment(row: Row, slot: str, place: str) -> str:
  return f'{place}/moments/{row.ours}/{slot}'


class OursForm(Form):
  """Reads a `checkpoint_<step>` directory of a run.

  Raises:
    ConvertError: if its metadata cannot be read.
  """

  kind = 'ours'

  def __init__(self, path: os.PathLike | str):
    self.path = epath.Path(path)
    self._params = ZarrStore(self.path / 'params')
    self._state = ZarrStore(self.path / 'state')
    try:
      file = self.path / 'metadata' / 'metadata'
      self._facts = safe_json.read(file)
      self.step = safe_json.field(self._facts, 'step', int, str(file))
      self.description = of_metadata(self._facts, str(file))
    except (ConfigError, OSError, Unreadable) as error:
      raise ConvertError(f'{self.path}/metadata cannot be read: {error}') from error
    self._names = {name.replace('.', '/'): name for name in self._params.names()}
    self._state_names = {name.replace('.', '/'): name for name in self._state.names()}
    self._params.cache_for(self._names.values())

  def tensors(self) -> dict[str, Stored]:
    found = {p: self._params.stored(n, label=p) for p, n in self._names.items()}
    state = {p: self._state.stored(n, label=f'state/{p}') for p, n in self._state_names.items()}
    return found | {f'state/{path}': stored for path, stored in state.items()}

  def parameter(self, row: Row) -> Stored:
    label = f'{row.ours}{list(row.index)}' if row.index else row.ours
    name = row.ours.replace('/', '.')
    return self._params.stored(name, label=label, index=row.index, merge=2 if row.gated else 0)

  def check_names(self, rows: Sequence[Row]) -> list[str]:
    return name_problems(self._names, dict.fromkeys(row.ours for row in rows))

  @property
  def _place(self) -> str:
    """Where the optimizer's own state lies."""
    record = self.description.optimizer if self.description else None
    return record.place if record else 'opt_state'

  @property
  def has_optimizer(self) -> bool:
    """Whether moments are there."""
    return any(path.startswith(f'{self._place}/moments/') for path in self._state_names)

  def slots(self, row: Row) -> dict[str, Stored]:
    """Adafactor's moments of a parameter that are in use, in t5x's shape."""
    found = {}
    for slot in MOMENTS:
      name = self._state_names.get(_moment(row, slot, self._place))
      if name is None:
        continue
      rank = len(self._state.open(name).shape) - len(row.index) - int(row.experts)
      path = _moment(row, slot, self._place)
      label = f'{path}{list(row.index)}' if row.index else path
      # Of a gate [d, 2, f]: v has three axes, the slot of the hidden side two, of embed one.
      merge = 2 if row.gated and rank > 1 else 0
      found[slot] = self._state.stored(name, label=label, index=row.index, merge=merge)
    return found

  def model(self) -> ModelConfig | None:
    return self.description.model if self.description else None

  def describe(self, config: ModelConfig) -> Description:
    return dataclasses.replace(self.description or Description(config), model=config)

  def vocabulary_content(self) -> bytes:
    record = self.description.vocabulary if self.description else None
    return kept_vocabulary(self.path.parent, record) if record else b''

  def sizes(self) -> dict[str, Any]:
    """The model's identity.

    Raises:
      ConvertError: it alone does not say how the model computes.
    """
    raise ConvertError(undescribed(self.path, self._facts.get('identity', {})))

  def told(self) -> dict[str, Any]:
    """The model's identity, for comparison with --model."""
    jetmoe = 'decoder/attention/router/kernel' in self._names
    architecture = Architecture.JETMOE if jetmoe else Architecture.OPENMOE
    return dict(self._facts.get('identity', {})) | {'architecture': architecture.value}

  def problems(self) -> Iterator[str]:
    named = step_of(self.path)
    if named not in (None, self.step):
      yield f'mixed steps: the directory says {named}, the metadata {self.step}'
    if problem := manifest.find_problem(self.path, self.step):
      yield problem
    for path in ('step', f'{self._place}/count'):
      if path in self._state_names:
        value = int(self._state.stored(self._state_names[path]).whole())
        if value != self.step:
          yield f'mixed steps: state/{path} is {value}, the metadata says {self.step}'
    for store, names in ((self._params, self._names), (self._state, self._state_names)):
      for path, name in names.items():
        for chunk in missing_chunks(store.open(name)):
          yield f'{path}: chunk {chunk} is missing'


class OursSink(Sink):
  """Writes a `checkpoint_<step>` directory that openmoe.checkpoint.Checkpointer restores.

  Args:
    path: directory that becomes the checkpoint.
    step: its optimizer step.
    metadata: JSON-able facts for the run record.
    described: what the checkpoint says of itself; None where only its model is known.
  """

  kind = 'ours'

  def __init__(
    self,
    path: epath.Path,
    step: int,
    metadata: Mapping[str, Any],
    described: Description | None = None,
  ):
    self._path, self._step, self._metadata = path, step, dict(metadata)
    self._described = described
    optimizer = described.optimizer if described else None
    self._place = optimizer.place if optimizer else 'opt_state'
    for item in _HANDLERS:
      (path / item).mkdir(parents=True, exist_ok=True)
    self._params = ZarrStore(path / 'params')
    self._state = ZarrStore(path / 'state')
    self._config: ModelConfig | None = None
    self._trees: dict[str, dict[str, tuple[int, ...] | None]] = {'params': {}, 'state': {}}

  @classmethod
  def begin(cls, place: epath.Path, source: Form, described: Description, options: Options) -> Self:
    about = {'converted_from': f'{source.kind}: {source.path.name}'}
    if options.optimizer and described.optimizer is None:
      described = dataclasses.replace(described, optimizer=OptimizerRecord(OptimizerName.ADAFACTOR))
    return cls(place, source.step or 0, about, described)

  def prepare(self, config: ModelConfig, sources: Mapping[str, Stored], dtype: np.dtype) -> None:
    self._config = config
    rows = list(name_table(config))
    lead = {row.ours: tuple(n + 1 for n in row.index) for row in rows}  # the last row has the most
    for row in rows:
      if row.ours in self._trees['params']:
        continue
      source = sources[row.name]
      *body, last = source.shape
      body = (*body, 2, last // 2) if row.gated else source.shape
      shape = (*lead[row.ours], *body)
      name = row.ours.replace('/', '.')
      self._params.create(name, shape, dtype, len(row.index), source.step(), CODEC)
      self._trees['params'][row.ours] = shape
    step = np.asarray(self._step, np.int32)
    self._scalar('step', step)
    self._trees['state']['params'] = None

  def _scalar(self, path: str, value: np.ndarray) -> None:
    name = path.replace('/', '.')
    self._state.create(name, (), value.dtype, 0, 1, CODEC)
    self._state.writable(name).write(0, value)
    self._trees['state'][path] = ()

  def prepare_slots(self, slots: Mapping[str, Mapping[str, Stored]]) -> None:
    """Lays out Adafactor's moments, by t5x path of the parameter; unused ones become None."""
    rows = list(name_table(self._config))
    lead = {row.ours: tuple(n + 1 for n in row.index) for row in rows}
    shapes: dict[str, tuple[int, ...] | None] = {}
    for row in rows:
      for slot in MOMENTS:
        path, used = _moment(row, slot, self._place), slots[row.t5x].get(slot)
        shape = (
          None if used is None else (*lead[row.ours], *self._moment_shape(row, slot, used.shape))
        )
        if shapes.setdefault(path, shape) != shape:
          raise ConvertError(
            f'{row.t5x}/{slot} has another shape than in the other layers ({shape} against '
            f'{shapes[path]}); scanned layers must be factored alike.'
          )
        if path not in self._trees['state'] and used is not None:
          name = path.replace('/', '.')
          self._state.create(name, shape, used.dtype, len(row.index), used.rows, CODEC)
        self._trees['state'][path] = shape
    if self._place != 'opt_state':
      self._trees['state']['opt_state/0'] = None  # clipping: a link of the chain without a state
    self._scalar(f'{self._place}/count', np.asarray(self._step, np.int32))

  def _moment_shape(self, row: Row, slot: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """t5x's shape of a slot -> ours, where the gate is an axis of its own."""
    if not row.gated:
      return shape
    embed, _, hidden = self._trees['params'][row.ours][-3:]
    # The row is embed for experts, else the smaller side (openmoe.optimizer.factoring).
    gate_slot = 'v_col' if row.experts or embed <= 2 * hidden else 'v_row'
    return (*shape[:-1], 2, hidden) if slot in ('v', gate_slot) else shape

  def parameter(self, row: Row) -> Writable:
    split = self._trees['params'][row.ours][-2:] if row.gated else ()
    name = row.ours.replace('/', '.')
    label = f'{row.ours}{list(row.index)}' if row.index else row.ours
    return self._params.writable(name, label=label, index=row.index, split=split)

  def slot(self, row: Row, name: str) -> Writable:
    path = _moment(row, name, self._place)
    rank = len(self._trees['state'][path]) - len(row.index) - int(row.experts)
    split = self._trees['params'][row.ours][-2:] if row.gated and rank > 1 else ()
    where = path.replace('/', '.')
    label = f'{path}{list(row.index)}' if row.index else path
    return self._state.writable(where, label=label, index=row.index, split=split)

  def finish(self) -> None:
    for item, tree in self._trees.items():
      write_synced(self._path / item / '_METADATA', _tree_metadata(tree))
    described = self._described or Description(self._config)
    metadata = {KEY: described.plain()} | self._metadata
    facts = {'step': self._step, 'identity': identity(self._config), 'metadata': metadata}
    write_synced(self._path / 'metadata' / 'metadata', json.dumps(facts).encode())
    for item in _HANDLERS:
      # Object stores have no rename: there orbax takes this file for the sign of completion.
      write_synced(self._path / item / 'commit_success.txt', b'converted')
    manifest.write(self._path, self._step)
    # No times: the same conversion writes the same bytes.
    about = {
      'item_handlers': _HANDLERS,
      'metrics': {},
      'performance_metrics': {},
      'init_timestamp_nsecs': 1,
      'commit_timestamp_nsecs': 1,
      'custom_metadata': {},
    }
    write_synced(self._path / '_CHECKPOINT_METADATA', json.dumps(about).encode())
    write_synced(self._path / 'commit_success.txt', b'converted')


def _tree_metadata(tree: Mapping[str, tuple[int, ...] | None]) -> bytes:
  """orbax's description of a tree of arrays; None marks a leaf without an array."""
  entries = {}
  for path, shape in tree.items():
    keys = path.split('/')
    value = {'value_type': 'None', 'skip_deserialize': True}
    if shape is not None:
      value = {'value_type': 'jax.Array', 'skip_deserialize': False, 'write_shape': list(shape)}
    entries[str(tuple(keys))] = {
      # 1: a place in a sequence, 2: a name.
      'key_metadata': [{'key': key, 'key_type': 1 if key.isdigit() else 2} for key in keys],
      'value_metadata': value,
    }
  content = {
    'tree_metadata': entries,
    'use_ocdbt': False,
    'use_zarr3': False,
    'store_array_data_equal_to_fill_value': True,
    'custom_metadata': None,
  }
  return json.dumps(content).encode()


def is_ours(path: epath.Path) -> bool:
  return (path / 'metadata' / 'metadata').exists()
