"""What a run writes down while it trains, and how it is read back.

  metrics.jsonl          one JSON object a record: step, kind ('train' or 'validation'), scalars
  tensorboard/<kind>/    the same scalars as events
  router/<first>.npz     per-layer, per-expert arrays of a fixed span of steps from <first> on

A resumed run drops what lies after the step it resumes from, so every step is there once. Only
process 0 writes; elsewhere the writer does nothing. What is shown is the business of display.py.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, TextIO

import jax
import numpy as np
from etils import epath

from openmoe.checkpoint.paths import read_small
from openmoe.observe.display import Progress, make_display
from openmoe.observe.hardware import peak_flops
from openmoe.observe.notes import (
  LIMIT,
  RECORDS,
  Events,
  Records,
  RouterArrays,
  decode,
  load_arrays,
  router_files,
)

DEAD_SHARE = 0.01


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


def read_records(model_dir: str | os.PathLike, kind: str | None = None) -> list[dict[str, Any]]:
  """Records of metrics.jsonl in the order they were written; lines that are not whole are skipped.

  Args:
    model_dir: run directory.
    kind: 'train' or 'validation' for those only.

  Raises:
    Unreadable: it is no file, or larger than any.
  """
  path = epath.Path(model_dir) / RECORDS
  if not path.exists():
    return []
  # What somebody else wrote beside numbers is nothing to draw or to compare.
  number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
  return [
    {name: value for name, value in record.items() if name == 'kind' or number(value)}
    for line in read_small(path, LIMIT).splitlines()
    if (record := decode(line)) is not None and kind in (None, record.get('kind'))
  ]


def read_router(model_dir: str | os.PathLike) -> dict[str, np.ndarray]:
  """All router records of a run: 'steps' [records], 'expert_load' [records, l, e] and others.

  Others are [records, l].

  'layers' [records, l], where it is there, holds the index of each sparse layer in the model.
  Empty for a dense model.

  Raises:
    Unreadable: a file is damaged.
  """
  parts = [load_arrays(path) for path in router_files(model_dir)]
  return {k: np.concatenate([p[k] for p in parts]) for k in (parts[0] if parts else ())}


# --- writing


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
    self._display = make_display(stream)
    self._records = Records(directory, start_step, self.note)
    self._router = RouterArrays(directory, start_step, self.note)
    self._events = Events(directory)
    self._failing: set[str] = set()  # files that could not be written lately
    self._clock = _Clock(start_step, time.monotonic())
    self._progress = Progress(step=start_step, total_steps=total_steps, sparse_layers=sparse_layers)

  def write(self, step: int, scalars: Mapping[str, float], kind: str = 'train') -> dict[str, Any]:
    """Records and shows the scalars of a step.

    A step that this kind already has is left alone, so that a resumed run may evaluate again.
    Every record gains tokens_seen, and those of training steps_per_second, tokens_per_second,
    model_flops_per_second and mfu, where they are known.

    Args:
      step: optimizer steps done.
      scalars: Python, numpy or jax scalars.
      kind: 'train', 'validation' or 'checkpoint'.

    Returns:
      The record; where nothing is written, what it would hold without these additions.
    """
    scalars = {name: float(value) for name, value in scalars.items()}
    if not self._active or step <= self._records.last.get(kind, -1):
      return {'step': step, 'kind': kind} | scalars
    if kind == 'train':
      scalars |= self._speed(step)
    tokens = {'tokens_seen': float(self._tokens_before(step))} if self._tokens_before else {}
    record = {'step': step, 'kind': kind, 'time': round(time.time(), 3)} | tokens | scalars
    with self._told(RECORDS):
      self._records.append(record)
    with self._told('tensorboard'):
      self._events.write(step, tokens | scalars, kind)
    self._show(step, scalars, kind)
    return record

  def _speed(self, step: int) -> dict[str, float]:
    last = self._clock.step
    speed = self._clock.lap(step, time.monotonic())
    if speed is None:
      return {}
    a_step = lambda total: (total(step) - total(last)) / (step - last)  # batches may differ in size
    scalars = {'steps_per_second': speed}
    if self._tokens_before:
      scalars['tokens_per_second'] = speed * a_step(self._tokens_before)
    if self._flops_before:
      scalars['model_flops_per_second'] = speed * a_step(self._flops_before)
      if self._peak:
        scalars['mfu'] = scalars['model_flops_per_second'] / self._peak
    return scalars

  def _show(self, step: int, scalars: Mapping[str, float], kind: str) -> None:
    if kind == 'validation':
      self._progress = dataclasses.replace(self._progress, validation=(step, dict(scalars)))
      self._display.validation(self._progress)
    if kind != 'train':
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
    with self._told('router'):
      self._router.append(step, arrays | {'layers': np.array(layers)} if layers else arrays)
    load = np.asarray(arrays['expert_load'])
    self._progress = dataclasses.replace(self._progress, expert_load=load, dead=dead_experts(load))

  def note(self, text: str) -> None:
    """Shows a line of text above the progress."""
    if self._active:
      self._display.note(text)

  @contextmanager
  def _told(self, what: str) -> Iterator[None]:
    """Says once that some notes cannot be written, and once that they can again."""
    try:
      yield
    except OSError as error:
      if what not in self._failing:
        self.note(f'{what} cannot be written ({error}); training goes on. Make room there.')
      self._failing.add(what)
    else:
      if what in self._failing:
        self.note(f'{what} can be written again.')
      self._failing.discard(what)

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
      with self._told(RECORDS):
        self._records.flush()
      with self._told('tensorboard'):
        self._events.flush()

  def close(self) -> None:
    """Flushes, and gives the terminal back."""
    if self._active:
      self.flush()
      self._display.close()
      with self._told('tensorboard'):
        self._events.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc) -> None:
    self.close()
