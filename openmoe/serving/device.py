"""The programs of the engine on the devices of one process, or of several at once.

With several processes the first one leads: what it is about to run, numbers alone, it tells all,
and the others, which sit in `follow`, run the same. So every process gives its devices the same
programs in the same order, and only the first knows of requests.
"""

from __future__ import annotations

import io
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from openmoe.inference.model import LanguageModel
from openmoe.serving import slots

_LEAST = 1 << 12  # bytes of a message


class Device:
  """A model, the cache of its slots, and the programs that use both.

  Args:
    slots_count: sequences at a time.
  """

  def __init__(self, model: LanguageModel, slots_count: int):
    self.model, self.slots = model, slots_count
    self._cache: Any = None

  # --- what the engine calls

  def reserve(self) -> None:
    """Makes the cache."""
    self._tell('reserve')

  def step(self, arrays: dict[str, np.ndarray], keys: int) -> slots.Drawn:
    """slots.step: token_b, length_b, active_b, alternatives, and draw_arrays."""
    return self._tell('step', arrays, keys)

  def read(self, arrays: dict[str, np.ndarray], keys: int, scores: bool) -> slots.Read:
    """slots.read_chunk: row, tokens_t, next_t, first, count, alternatives, and draw_arrays."""
    return self._tell('read', arrays, keys, int(scores))

  def copy(self, source: int, target: int) -> None:
    """slots.copy_row."""
    self._tell('copy', None, source, target)

  def idle(self) -> None:
    """Keeps the others from taking silence for death."""
    if jax.process_count() > 1:
      self._tell('nothing')

  def end(self) -> None:
    """Lets the others go."""
    if jax.process_count() > 1:
      _broadcast(_packed('end', {}, ()))

  def follow(self) -> None:
    """In every process but the first: does what the first one does, until it ends."""
    with self.model.on_mesh():
      while True:
        name, arrays, numbers = _unpacked(_broadcast(b''))
        if name == 'end':
          return
        jax.block_until_ready(getattr(self, _PROGRAMS[name])(arrays, *numbers))

  # --- the programs

  def _tell(self, name: str, arrays: dict[str, np.ndarray] | None = None, *numbers: int) -> Any:
    arrays = arrays or {}
    if jax.process_count() > 1:
      _broadcast(_packed(name, arrays, numbers))
    return getattr(self, _PROGRAMS[name])(arrays, *numbers)

  def _nothing(self, arrays: dict) -> None: ...

  def _reserve(self, arrays: dict) -> None:
    make = lambda: slots.init_slots(self.model.config, self.slots, self.model.max_length)
    self._cache = jax.jit(make)()

  def _step(self, arrays: dict, keys: int) -> slots.Drawn:
    args, draw = _with_draw(arrays)
    self._cache, drawn = slots.step(
      self.model.params, self._cache, draw=draw, config=self.model.config, keys=keys, **args
    )
    return drawn

  def _read(self, arrays: dict, keys: int, scores: int) -> slots.Read:
    args, draw = _with_draw(arrays)
    options = {'config': self.model.config, 'keys': keys, 'scores': bool(scores)}
    self._cache, found = slots.read_chunk(
      self.model.params, self._cache, draw=draw, **args, **options
    )
    return found

  def _copy(self, arrays: dict, source: int, target: int) -> None:
    self._cache = slots.copy_row(self._cache, np.int32(source), np.int32(target))


_PROGRAMS = {name: f'_{name}' for name in ('nothing', 'reserve', 'step', 'read', 'copy')}
_DRAW = 'draw_'  # before the names of a Draw's fields


def draw_arrays(draw: slots.Draw) -> dict[str, np.ndarray]:
  """A Draw as arrays of a call."""
  return {_DRAW + name: x for name, x in vars(draw).items()}


def _with_draw(arrays: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], slots.Draw]:
  others = {name: x for name, x in arrays.items() if not name.startswith(_DRAW)}
  fields = {name.removeprefix(_DRAW): x for name, x in arrays.items() if name not in others}
  return others, slots.Draw(**fields)


def _packed(name: str, arrays: dict[str, np.ndarray], numbers: tuple[int, ...]) -> bytes:
  file = io.BytesIO()
  np.savez(file, name=np.array(name), numbers=np.array(numbers, np.int64), **_prefixed(arrays))
  return file.getvalue()


def _prefixed(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  return {f'x_{name}': x for name, x in arrays.items()}


def _unpacked(message: bytes) -> tuple[str, dict[str, np.ndarray], list[int]]:
  with np.load(io.BytesIO(message), allow_pickle=False) as file:
    arrays = {key.removeprefix('x_'): file[key] for key in file.files if key.startswith('x_')}
    return str(file['name']), arrays, file['numbers'].tolist()


def _broadcast(message: bytes) -> bytes:
  """The message of the first process, in all; first its size, so that all have the same shapes."""
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
  room = _LEAST
  while room < size:
    room *= 2
  content = np.zeros(room, np.uint8)
  own = np.frombuffer(message[:size], np.uint8)
  content[: len(own)] = own
  return np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes()[:size]
