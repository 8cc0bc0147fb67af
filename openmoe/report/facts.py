"""A run directory as a report wants it. What is damaged or missing in it is told, not raised."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from etils import epath

from openmoe.checkpoint import safe_json
from openmoe.checkpoint.paths import Unreadable, read_small
from openmoe.config import ConfigError
from openmoe.health import HealthConfig
from openmoe.health.replay import replay
from openmoe.health.watch import EVENTS
from openmoe.observe.goodput import Goodput, divide, read_goodput
from openmoe.observe.metrics import read_records, read_router
from openmoe.observe.notes import RECORDS, decode
from openmoe.observe.record import CONFIG, STARTS

SAMPLES = 'samples.json'
_LIMIT = 32 << 20  # bytes of a file of notes other than metrics
T = TypeVar('T')


@dataclasses.dataclass
class Run:
  """What is known of a run.

  Attributes:
    name: last part of its directory's path.
    train, validation, checkpoints: records of metrics.jsonl.
    router: arrays as read_router gives them; empty for a dense model.
    goodput: what its wall time went to.
    starts: records of run.json.
    configs: (until which step or '', text), the newest last.
    events: lines of health.jsonl, or what a replay says; `replayed` tells which.
    samples: (prompt, continuation) of the end of the run.
    problems: what could not be read.
  """

  name: str
  train: list[dict] = dataclasses.field(default_factory=list)
  validation: list[dict] = dataclasses.field(default_factory=list)
  checkpoints: list[dict] = dataclasses.field(default_factory=list)
  router: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  goodput: Goodput = dataclasses.field(default_factory=lambda: divide([]))
  starts: list[dict] = dataclasses.field(default_factory=list)
  configs: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  events: list[dict] = dataclasses.field(default_factory=list)
  replayed: bool = False
  samples: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  problems: list[str] = dataclasses.field(default_factory=list)

  @property
  def stages(self) -> list[tuple[str, int, int]]:
    """(name, first step, last step) of the stages, as the newest start has them."""
    found, begin = [], 0
    for stage in self.starts[-1].get('stages') or () if self.starts else ():
      if not (isinstance(stage, list) and len(stage) == 2 and type(stage[1]) is int):
        return []
      found.append((str(stage[0]), begin, begin + stage[1]))
      begin += stage[1]
    return found

  def column(self, *names: str, of: str = 'train') -> np.ndarray:
    """[records, names] as numbers, of the records that have them all."""
    records = getattr(self, of)
    number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)
    rows = [[r[n] for n in names] for r in records if all(number(r.get(n)) for n in names)]
    return np.array(rows, float).reshape(-1, len(names))


def read_run(model_dir: str | os.PathLike) -> Run:
  """Reads a run directory.

  Raises:
    ConfigError: it holds no records of training.
  """
  directory = epath.Path(model_dir)
  run = Run(os.path.basename(os.path.abspath(model_dir)) or os.fspath(model_dir))

  def attempt(what: str, read: Callable[[], T], otherwise: T) -> T:
    try:
      return read()
    except (Unreadable, OSError, ValueError) as error:
      run.problems.append(f'{what} cannot be read: {error}')
      return otherwise

  records = attempt(RECORDS, lambda: read_records(directory), [])
  for kind, found in (('validation', run.validation), ('checkpoint', run.checkpoints)):
    found += [r for r in records if r.get('kind') == kind]
  run.train = [r for r in records if r.get('kind', 'train') == 'train']
  if not run.train:
    why = f': {run.problems[0]}' if run.problems else ''
    raise ConfigError(
      f'{os.fspath(model_dir)} holds no {RECORDS} with records of training{why}; give the '
      'directory of a run that has made a step.'
    )
  run.router = attempt('router/', lambda: _consistent(read_router(directory)), {})
  run.goodput = attempt('timeline.jsonl', lambda: read_goodput(directory), run.goodput)
  starts = attempt(STARTS, lambda: _read_list(directory / STARTS), [])
  run.starts = [start for start in starts if isinstance(start, dict)]
  run.configs = attempt(CONFIG, lambda: _configs(directory), [])
  samples = attempt(SAMPLES, lambda: _read_list(directory / SAMPLES), [])
  run.samples = [
    (str(s.get('prompt', '')), str(s.get('text', ''))) for s in samples if isinstance(s, dict)
  ]
  run.replayed = not (directory / EVENTS).exists()
  run.events = attempt(EVENTS, lambda: _events(directory, run.replayed), [])
  return run


def _consistent(router: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  load = router.get('expert_load')
  if router and (load is None or load.ndim != 3 or not load.size):
    raise Unreadable('expert_load is not [records, layers, experts]')
  return router


def _read_list(path: epath.Path) -> list[Any]:
  return safe_json.read(path, list) if path.exists() else []


def _configs(directory: epath.Path) -> list[tuple[str, str]]:
  found = [
    ((int(match[1]), int(match[2] or 1)), path)
    for path in directory.iterdir()
    if (match := re.fullmatch(r'config_until_(\d+)(?:_(\d+))?\.gin', path.name))
  ]
  texts = [(str(order[0]), _text(path)) for order, path in sorted(found, key=lambda pair: pair[0])]
  newest = directory / CONFIG
  return texts + ([('', _text(newest))] if newest.exists() else [])


def _text(path: epath.Path) -> str:
  return read_small(path, _LIMIT).decode('utf-8', 'replace')


def _events(directory: epath.Path, replayed: bool) -> list[dict]:
  if replayed:
    return [event.record() for event in replay(directory, HealthConfig()).events]
  lines = read_small(directory / EVENTS, _LIMIT).splitlines()
  return [record for line in lines if (record := decode(line)) is not None]
