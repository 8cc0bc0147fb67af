"""What a run writes down while it trains, and how it is read back.

  metrics.jsonl          one JSON object a record: step, kind ('train' or 'validation'), scalars
  tensorboard/<kind>/    the same scalars as events
  router/<first>.npz     per-layer, per-expert arrays of a fixed span of steps from <first> on

A resumed run drops what lies after the step it resumes from, so every step is there once. Only
process 0 writes; elsewhere the writer does nothing. What is shown is the business of display.py.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, TextIO

import jax
import numpy as np
from etils import epath

from openmoe.checkpoint.paths import is_remote, write_whole
from openmoe.observe.display import Progress, make_display
from openmoe.observe.hardware import peak_flops

RECORDS = 'metrics.jsonl'
ROUTER_FOLDER = 'router'
ROUTER_SPAN = 1000  # steps in one router file
DEAD_SHARE = 0.01
_REMOTE_PERIOD = 60.0  # seconds between writes of metrics.jsonl to an object store


def dead_experts(expert_load: np.ndarray) -> np.ndarray:
  """Which experts are dead: chosen for less than 1 % of a uniform share.

  Args:
    expert_load: [..., e] share of the routed (token, choice) pairs; sums to 1 over e.

  Returns:
    bool, of the same shape.

  >>> dead_experts(np.array([0.5, 0.4, 0.099, 0.001])).tolist()
  [False, False, False, True]
  """
  expert_load = np.asarray(expert_load)
  return expert_load < DEAD_SHARE / expert_load.shape[-1]


# --- reading


def _encode(record: Mapping[str, Any]) -> str:
  """One line of strict JSON; nan and inf become strings, which float() turns back."""
  plain = {
    k: repr(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
  }
  return json.dumps(plain, allow_nan=False)


def _decode(line: str) -> dict[str, Any] | None:
  """A record, or None for a line that is not a whole one."""
  try:
    record = json.loads(line)
  except ValueError:
    return None
  if not isinstance(record, dict) or not isinstance(record.get('step'), int):
    return None
  return {k: float(v) if v in ('nan', 'inf', '-inf') else v for k, v in record.items()}


def read_records(model_dir: str | os.PathLike, kind: str | None = None) -> list[dict[str, Any]]:
  """Records of metrics.jsonl in the order they were written; lines that are not whole are skipped.

  Args:
    model_dir: run directory.
    kind: 'train' or 'validation' for those only.
  """
  path = epath.Path(model_dir) / RECORDS
  if not path.exists():
    return []
  records = [r for line in path.read_text().splitlines() if (r := _decode(line)) is not None]
  return [r for r in records if kind in (None, r.get('kind'))]


def _router_files(model_dir: str | os.PathLike) -> list[epath.Path]:
  folder = epath.Path(model_dir) / ROUTER_FOLDER
  if not folder.exists():
    return []
  return sorted((p for p in folder.iterdir() if p.name.endswith('.npz')), key=lambda p: p.name)


def _load_npz(path: epath.Path) -> dict[str, np.ndarray]:
  # allow_pickle stays off: a run directory is data, and must not be able to execute anything.
  with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
    return dict(arrays)


def read_router(model_dir: str | os.PathLike) -> dict[str, np.ndarray]:
  """All router records of a run: 'steps' [n], 'expert_load' [n, l, e], others [n, l].

  'layers' [n, l], where it is there, holds the index of each sparse layer in the model.
  Empty for a dense model.
  """
  parts = [_load_npz(path) for path in _router_files(model_dir)]
  return {k: np.concatenate([p[k] for p in parts]) for k in (parts[0] if parts else ())}


# --- writing


class _Records:
  """metrics.jsonl, opened so that it continues after `start_step`."""

  def __init__(self, model_dir: epath.Path, start_step: int):
    self._path = model_dir / RECORDS
    self._remote = is_remote(model_dir)
    self._waiting: list[str] = []
    self._last_write = 0.0
    self.last: dict[str, int] = {}
    text = self._path.read_text() if self._path.exists() else ''
    kept = [
      r
      for line in text.splitlines()
      if (r := _decode(line)) is not None and r['step'] <= start_step
    ]
    for record in kept:
      self.last[record.get('kind', 'train')] = record['step']
    repaired = ''.join(_encode(record) + '\n' for record in kept)
    if repaired != text:
      write_whole(self._path, repaired.encode())

  def append(self, record: Mapping[str, Any]) -> None:
    self.last[record['kind']] = record['step']
    self._waiting.append(_encode(record) + '\n')
    # Object stores cannot append: each write sends the whole file again.
    if not self._remote or time.monotonic() - self._last_write > _REMOTE_PERIOD:
      self.flush()

  def flush(self) -> None:
    if not self._waiting:
      return
    with self._path.open('a') as file:
      file.write(''.join(self._waiting))
    self._waiting.clear()
    self._last_write = time.monotonic()


class _RouterArrays:
  """The npz file of the current span of steps, replaced as a whole at every record."""

  def __init__(self, model_dir: epath.Path, start_step: int):
    self._folder = model_dir / ROUTER_FOLDER
    self._rows: dict[str, list[np.ndarray]] = {}
    self._first = -1
    for path in _router_files(model_dir):
      arrays = _load_npz(path)
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
    first = step // ROUTER_SPAN * ROUTER_SPAN
    path = self._folder / f'{first:09d}.npz'
    if first != self._first:
      self._folder.mkdir(parents=True, exist_ok=True)
      self._rows = {k: list(v) for k, v in _load_npz(path).items()} if path.exists() else {}
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


@dataclasses.dataclass
class _Clock:
  """Time spent training between records; pauses do not count."""

  step: int
  since: float
  paused: float = 0.0
  rate: float | None = None  # smoothed steps per second

  def lap(self, step: int, now: float) -> float | None:
    """Steps per second since the last lap, or None when no step or no time has passed."""
    steps, seconds = step - self.step, now - self.since - self.paused
    self.step, self.since, self.paused = step, now, 0.0
    if steps <= 0 or seconds <= 0:
      return None
    speed = steps / seconds
    self.rate = speed if self.rate is None else 0.8 * self.rate + 0.2 * speed
    return speed


class MetricsWriter:
  """Writes and shows the metrics of one run; a context manager.

  Args:
    model_dir: run directory, local or gs://; made if need be.
    start_step: step that the run starts or resumes from; records after it are dropped.
    total_steps: steps of the whole run, for the estimated time left.
    tokens_before: step -> tokens of all batches before it, padding included, for tokens per second.
    flops_before: step -> model FLOPs of all steps before it (no recomputation, no capacity
      padding), for model FLOP/s and, where the device's peak is known, MFU.
    sparse_layers: indices of the sparse layers, to label them.
    stream: where progress is shown; None is standard output. A terminal gets the live display.
  """

  def __init__(
    self,
    model_dir: str | os.PathLike,
    start_step: int,
    total_steps: int,
    *,
    tokens_before: Callable[[int], float] | None = None,
    flops_before: Callable[[int], float] | None = None,
    sparse_layers: tuple[int, ...] = (),
    stream: TextIO | None = None,
  ):
    self._active = jax.process_index() == 0
    if not self._active:
      return
    directory = epath.Path(model_dir)
    directory.mkdir(parents=True, exist_ok=True)
    self._directory = directory
    self._tokens_before = tokens_before
    self._flops_before = flops_before
    peak = peak_flops(jax.devices()[0].device_kind)
    self._peak = peak * jax.device_count() if peak else None
    self._records = _Records(directory, start_step)
    self._router = _RouterArrays(directory, start_step)
    self._events: dict[str, Any] = {}
    self._clock = _Clock(start_step, time.monotonic())
    self._progress = Progress(step=start_step, total_steps=total_steps, sparse_layers=sparse_layers)
    self._latest_router: tuple[int, dict[str, float]] = (-1, {})
    self._display = make_display(stream)

  def write(self, step: int, scalars: Mapping[str, float], kind: str = 'train') -> None:
    """Records and shows the scalars of a step.

    A step that this kind already has is left alone, so that a resumed run may evaluate again.
    Training records gain tokens_seen, steps_per_second, tokens_per_second, model_flops_per_second
    and mfu where they are known, and dropped_fraction (mean over layers) and dead_experts (over
    all layers) if write_router() was called for the step before.

    Args:
      step: optimizer steps done.
      scalars: Python, numpy or jax scalars.
      kind: 'train' or 'validation'.
    """
    if not self._active or step <= self._records.last.get(kind, -1):
      return
    scalars = {name: float(value) for name, value in scalars.items()}
    if kind == 'train':
      scalars |= self._speed(step)
      if self._latest_router[0] == step:
        scalars |= self._latest_router[1]
    self._records.append({'step': step, 'kind': kind, 'time': round(time.time(), 3)} | scalars)
    self._write_events(step, scalars, kind)
    self._show(step, scalars, kind)

  def _speed(self, step: int) -> dict[str, float]:
    last = self._clock.step
    speed = self._clock.lap(step, time.monotonic())
    scalars = {'tokens_seen': float(self._tokens_before(step))} if self._tokens_before else {}
    if speed is None:
      return scalars
    a_step = lambda total: (total(step) - total(last)) / (step - last)  # batches may differ in size
    scalars['steps_per_second'] = speed
    if self._tokens_before:
      scalars['tokens_per_second'] = speed * a_step(self._tokens_before)
    if self._flops_before:
      scalars['model_flops_per_second'] = speed * a_step(self._flops_before)
      if self._peak:
        scalars['mfu'] = scalars['model_flops_per_second'] / self._peak
    return scalars

  def _write_events(self, step: int, scalars: Mapping[str, float], kind: str) -> None:
    if kind not in self._events:
      # Imported here because it brings TensorFlow, which evaluation and tests can do without.
      from clu import metric_writers

      folder = os.fspath(self._directory / 'tensorboard' / kind)
      self._events[kind] = metric_writers.SummaryWriter(folder)
    self._events[kind].write_scalars(step, scalars)

  def _show(self, step: int, scalars: Mapping[str, float], kind: str) -> None:
    if kind != 'train':
      self._progress = dataclasses.replace(self._progress, validation=(step, dict(scalars)))
      self._display.validation(self._progress)
      return
    rate, left = self._clock.rate, self._progress.total_steps - step
    self._progress = dataclasses.replace(
      self._progress, step=step, scalars=dict(scalars), eta=left / rate if rate else None
    )
    self._display.train(self._progress)

  def write_router(self, step: int, arrays: dict[str, np.ndarray]) -> None:
    """Records what the routers did; call it before write() of the same step.

    Args:
      step: optimizer steps done.
      arrays: 'expert_load' [l, e], 'dropped_fraction' [l], and any other [l] or [l, e]; the same
        names at every step.

    Raises:
      ValueError: if the names differ from those recorded before.
    """
    if not self._active:
      return
    layers = self._progress.sparse_layers
    # Beside the arrays, so that they can be read without the configuration of the run.
    self._router.append(step, arrays | {'layers': np.array(layers)} if layers else arrays)
    load = np.asarray(arrays['expert_load'])
    dead = dead_experts(load)
    summary = {'dead_experts': float(dead.sum())}
    if 'dropped_fraction' in arrays:
      summary['dropped_fraction'] = float(np.mean(arrays['dropped_fraction']))
    self._latest_router = (step, summary)
    self._progress = dataclasses.replace(self._progress, expert_load=load, dead=dead)

  def note(self, text: str) -> None:
    """Shows a line of text above the progress."""
    if self._active:
      self._display.note(text)

  @contextmanager
  def paused(self) -> Iterator[None]:
    """Time spent inside does not count as training: compilation, evaluation."""
    begin = time.monotonic()
    try:
      yield
    finally:
      if self._active:
        self._clock.paused += time.monotonic() - begin

  def flush(self) -> None:
    """Makes sure that everything so far is in the files; call it before a checkpoint is named."""
    if self._active:
      self._records.flush()
      for events in self._events.values():
        events.flush()

  def close(self) -> None:
    """Flushes, and gives the terminal back."""
    if self._active:
      self.flush()
      self._display.close()
      for events in self._events.values():
        events.close()
      self._events.clear()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc) -> None:
    self.close()
