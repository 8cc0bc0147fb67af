"""The drill: a run undisturbed, the same run killed again and again, and what they differ in."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from openmoe.config import ConfigError
from openmoe.drill import control, proof
from openmoe.drill.compare import Aspect, compare
from openmoe.drill.moments import Watcher, draw, durations
from openmoe.drill.starts import Shape, Starts
from openmoe.programme import as_programme

UNDISTURBED, KILLED, CONTROL = 'undisturbed', 'killed', 'control'


def drill(
  arguments: Mapping[str, Any],
  starts: Starts,
  shapes: Sequence[Shape],
  directory: pathlib.Path,
  kills: int,
  seed: int,
  config_text: str,
) -> bool:
  """Whether the run survives; all that was found is in resume_proof.json.

  Args:
    arguments: of train(), of the tiny twin.
    starts: launches it.
    shapes: on which the starts of the killed run take turns; the undisturbed one has the first.
    directory: new; the runs and the proof go there.
    kills: how often it is killed.
    seed: of the moments.
    config_text: the configuration as text.

  Raises:
    ConfigError: the directory is not empty, or there is nothing to draw.
    Failed: a start ended by itself in a way that it should not.
  """
  if kills < 1:
    raise ConfigError(f'--kills={kills} must be at least 1.')
  if directory.exists() and any(directory.iterdir()):
    raise ConfigError(f'{directory} is not empty; give a --directory of its own to every drill.')
  directory.mkdir(parents=True, exist_ok=True)
  run, programme = arguments['run'], as_programme(arguments['data'], arguments['run'].total_steps)
  exact = len(set(shapes)) == 1
  title = f'{arguments["model"].name}, {run.total_steps} steps, {kills} kills'
  with proof.Board(title) as board:
    board.begin(UNDISTURBED, shapes[0])
    watcher = starts.run(directory / UNDISTURBED, shapes[0], tell=board.now)
    board.ended(None, run.total_steps)
    lasts = durations(watcher.lines())
    moments = draw(kills, programme, run.total_steps, lasts, run.eval_period, seed)
    turns = itertools.cycle(shapes)
    for number, moment in enumerate([*moments, None]):
      shape = next(turns)
      if moment is not None:
        moment.process = number
      board.begin(KILLED, shape)
      watcher = starts.run(directory / KILLED, shape, moment, board.now)
      board.ended(moment, run.total_steps)
      for earlier in moments[:number]:
        # A start that was killed before it knew where it goes on tells nothing of the kill before.
        if earlier.resumed_at is None and watcher.resumed_at() is not None:
          earlier.resumed_at = watcher.resumed_at()
          board.resumed(earlier)
    step = run.total_steps
    aspects = compare(directory / UNDISTURBED, directory / KILLED, step)
    found = _control(arguments, starts, shapes[0], directory, board)
  verdict = all(_holds(a, exact) for a in aspects) and found['differs']
  verdict &= all(m.found != 'ended before' for m in moments)
  words = f'{found["altered"]}: {"seen" if found["differs"] else "NOT SEEN"} ({found["first"]})'
  proof.show_verdict(aspects, words, verdict, exact)
  proof.write(
    directory / proof.NAME,
    config_text=config_text,
    arguments=arguments,
    moments=moments,
    shapes=shapes,
    aspects=aspects,
    control=found,
    verdict=verdict,
    more={'exact': exact, 'seed': seed, 'seconds_of_phases': lasts},
  )
  return verdict


def _holds(aspect: Aspect, exact: bool) -> bool:
  # What a run reads does not depend on its mesh.
  return aspect.holds(exact or aspect.name == 'batches')


def _control(arguments, starts: Starts, shape: Shape, directory, board) -> dict[str, Any]:
  """The undisturbed run once more from its last checkpoint but one, of which a bit is altered."""
  run = arguments['run']
  step = (run.total_steps - 1) // run.checkpoint_period * run.checkpoint_period
  target = directory / CONTROL
  altered = control.alter_a_bit(directory / UNDISTURBED, target, step, arguments)
  board.begin(CONTROL, shape)
  watcher: Watcher = starts.run(target, shape, tell=board.now)
  board.ended(None, run.total_steps)
  aspects = compare(directory / UNDISTURBED, target, run.total_steps)
  seen = [a for a in aspects if not a.same and a.name in ('parameters', 'optimizer')]
  return {
    'altered': altered,
    'resumed_at': watcher.resumed_at(),
    'differs': bool(seen) and watcher.resumed_at() == step,
    'first': seen[0].first if seen else '',
  }
