"""The files of notes beside a run: metrics.jsonl and the router arrays, mended and written.

Notes never stop a run. What cannot be read when a run goes on is kept aside as NAME.damaged, what
cannot be written is told once and tried again with the next record.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from openmoe.checkpoint import npz, safe_json
from openmoe.checkpoint.paths import Unreadable, is_remote, read_small, write_whole

RECORDS = 'metrics.jsonl'
ROUTER_FOLDER = 'router'
ROUTER_SPAN = 1000  # steps in one router file
# Values of a record that the clock decides. They differ between processes, so nothing may follow
# from them that all must do together, and between a run and its repetition.
TIMED = (
  *('time', 'steps_per_second', 'tokens_per_second', 'model_flops_per_second', 'mfu'),
  *('stalled_fraction', 'goodput'),
)
_REMOTE_PERIOD = 60.0  # seconds between writes of metrics.jsonl to an object store
LIMIT = 4 << 30  # bytes of a file of notes
_MOST_STEPS, _LARGEST = 1 << 53, 1 << 1000
Note = Callable[[str], None]


def encode(record: Mapping[str, Any]) -> str:
  """One line of strict JSON; nan and inf become strings, which float() turns back."""
  plain = {
    k: repr(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
  }
  return json.dumps(plain, allow_nan=False) + '\n'


def decode(line: bytes) -> dict[str, Any] | None:
  """A record, or None for a line that is not a whole one."""
  try:
    record = safe_json.loads(line.decode('utf-8'))
  except ValueError:  # JsonError, and text that is not UTF-8
    return None
  if not isinstance(record, dict) or not isinstance(record.get('kind', ''), str):
    return None
  if type(record.get('step')) is not int or not 0 <= record['step'] < _MOST_STEPS:
    return None
  if any(isinstance(value, int) and abs(value) > _LARGEST for value in record.values()):
    return None  # no float holds it
  return {k: float(v) if v in ('nan', 'inf', '-inf') else v for k, v in record.items()}


def router_files(model_dir: str | os.PathLike) -> list[epath.Path]:
  """The files of router arrays of a run, in the order of their steps."""
  folder = epath.Path(model_dir) / ROUTER_FOLDER
  if not folder.exists():
    return []
  return sorted((p for p in folder.iterdir() if p.name.endswith('.npz')), key=lambda p: p.name)


def load_arrays(path: epath.Path) -> dict[str, np.ndarray]:
  """The arrays of a router file, 'steps' [records] and others [records, ...].

  Raises:
    Unreadable: it is no such file, or a damaged one.
    OSError: it cannot be read.
  """
  arrays = npz.parse(read_small(path, LIMIT), os.fspath(path))
  lengths = {len(a) if a.ndim else -1 for a in arrays.values()}
  if 'steps' not in arrays or len(lengths) != 1:
    raise Unreadable(f'{path} does not hold router arrays, but {sorted(arrays)}.')
  return arrays


def set_aside(path: epath.Path, why: object, note: Note) -> None:
  """Renames a file that cannot be read to NAME.damaged, and says so."""
  target, number = path.with_name(f'{path.name}.damaged'), 1
  while target.exists():
    number += 1
    target = path.with_name(f'{path.name}.damaged{number}')
  path.rename(target)
  note(f'{path.name} is damaged ({why}); it is now {target.name}, and the run goes on without it.')


class Records:
  """A file of records, metrics.jsonl or a like one, opened to continue after `start_step`."""

  def __init__(self, model_dir: epath.Path, start_step: int, note: Note, name: str = RECORDS):
    self._path = model_dir / name
    self._remote = is_remote(model_dir)
    self._waiting: list[str] = []
    self._last_write = 0.0
    self.last: dict[str, int] = {}
    content = self._read(note)
    records = [r for line in content.splitlines() if (r := decode(line)) is not None]
    kept = [r for r in records if r['step'] <= start_step]
    for record in kept:
      self.last[record.get('kind', 'train')] = record['step']
    repaired = ''.join(encode(record) for record in kept).encode()
    # What the file must be replaced with before anything is added; a full disk may put it off.
    self._repaired = None if repaired == content else repaired
    self._size = len(repaired)

  def _read(self, note: Note) -> bytes:
    if not self._path.exists():
      return b''
    try:
      content = read_small(self._path, LIMIT)
    except (Unreadable, OSError) as error:
      set_aside(self._path, error, note)
      return b''
    *whole, last = content.split(b'\n')
    bad = sum(decode(line) is None for line in whole)
    try:
      last.decode('utf-8')  # a line that a kill has cut is ASCII, as all we write
    except UnicodeError:
      bad += 1
    if bad:
      set_aside(self._path, f'{bad} lines hold no record', note)
      write_whole(self._path, content)
    return content

  def append(self, record: Mapping[str, Any]) -> None:
    """Adds a record, which reaches the file now or with a later flush().

    Raises:
      OSError: as flush().
    """
    self.last[record['kind']] = record['step']
    self._waiting.append(encode(record))
    # Object stores cannot append: each write sends the whole file again.
    if not self._remote or time.monotonic() - self._last_write > _REMOTE_PERIOD:
      self.flush()

  def flush(self) -> None:
    """Writes what waits.

    Raises:
      OSError: it cannot be written; it waits for the next time, and no half line is left.
    """
    if self._repaired is not None:
      write_whole(self._path, self._repaired)
      self._repaired = None
    if not self._waiting:
      return
    content = ''.join(self._waiting).encode()
    if self._remote:
      with self._path.open('ab') as file:
        file.write(content)
    else:
      self._append(content)
    self._waiting.clear()
    self._last_write = time.monotonic()

  def _append(self, content: bytes) -> None:
    with open(self._path, 'ab', buffering=0) as file:
      written = 0
      try:
        while written < len(content):
          written += file.write(content[written:])
      except OSError:
        file.truncate(self._size)
        raise
    self._size += len(content)


class RouterArrays:
  """The npz file of the current span of steps, replaced as a whole at every record."""

  def __init__(self, model_dir: epath.Path, start_step: int, note: Note):
    self._folder = model_dir / ROUTER_FOLDER
    self._rows: dict[str, list[np.ndarray]] = {}
    self._first = -1
    for path in router_files(model_dir):
      try:
        arrays = load_arrays(path)
      except (Unreadable, OSError) as error:
        set_aside(path, error, note)
        continue
      keep = arrays['steps'] <= start_step
      if not keep.any():
        path.unlink()
      elif not keep.all():
        self._replace(path, {k: v[keep] for k, v in arrays.items()})

  def _replace(self, path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_whole(path, buffer.getvalue())

  def append(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Adds the arrays of a step.

    Raises:
      ValueError: their names differ from those before.
      OSError: the file cannot be written; the next record tries again.
    """
    first = step // ROUTER_SPAN * ROUTER_SPAN
    path = self._folder / f'{first:09d}.npz'
    if first != self._first:
      self._folder.mkdir(parents=True, exist_ok=True)
      self._rows = {k: list(v) for k, v in load_arrays(path).items()} if path.exists() else {}
      self._first = first
    if step in self._rows.get('steps', ()):
      return
    row = {'steps': np.int64(step)} | {k: np.asarray(v, np.float32) for k, v in arrays.items()}
    if self._rows and self._rows.keys() != row.keys():
      raise ValueError(
        f'Router arrays {sorted(row)} at step {step} differ from {sorted(self._rows)} before in '
        f'{path}; set another MODEL_DIR for a run that records something else.'
      )
    for name, value in row.items():
      self._rows.setdefault(name, []).append(value)
    self._replace(path, {k: np.stack(v) for k, v in self._rows.items()})


class Events:
  """TensorBoard events, a folder a kind of record; one that fails is begun anew with the next."""

  def __init__(self, model_dir: epath.Path):
    self._folder = model_dir / 'tensorboard'
    self._writers: dict[str, Any] = {}

  def write(self, step: int, scalars: Mapping[str, float], kind: str) -> None:
    """Adds scalars of a step.

    Raises:
      OSError: they cannot be written.
    """
    self._guarded(kind, lambda writer: writer.write_scalars(step, scalars))

  def flush(self) -> None:
    """Raises OSError when something cannot be written."""
    for kind in list(self._writers):
      self._guarded(kind, lambda writer: writer.flush())

  def close(self) -> None:
    """Raises OSError when something cannot be written."""
    for kind in list(self._writers):
      self._guarded(kind, lambda writer: writer.close())
    self._writers.clear()

  def _guarded(self, kind: str, act: Callable[[Any], None]) -> None:
    # Imported here because they bring TensorFlow, which evaluation and tests can do without.
    import tensorflow as tf
    from clu import metric_writers

    try:
      if kind not in self._writers:
        self._writers[kind] = metric_writers.SummaryWriter(os.fspath(self._folder / kind))
      act(self._writers[kind])
    except tf.errors.OpError as error:
      self._writers.pop(kind, None)
      raise OSError(error.message) from error
