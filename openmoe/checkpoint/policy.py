"""Which checkpoints of a run are kept, and how loud it is told that none can be written."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from openmoe.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Keep:
  """What is kept; a checkpoint goes when none of these wants it.

  Attributes:
    newest: so many of the newest whole ones.
    every: also those of a step that is a multiple; None for no others.
    best: also so many that are best by a metric, of those evaluated at their very step.
    by: name of the validation metric, 'loss' (the lowest) or another (the highest).
  """

  newest: int
  every: int | None = None
  best: int = 0
  by: str = 'loss'

  def __post_init__(self):
    if self.newest < 1 or self.best < 0 or (self.every is not None and self.every < 1):
      raise ConfigError(
        f'keep_checkpoints={self.newest} and keep_every={self.every} must be at least 1, '
        f'keep_best={self.best} at least 0.'
      )

  def wanted(
    self, steps: Sequence[int], losses: Mapping[int, float], damaged: set[int]
  ) -> set[int]:
    """The steps to keep, of those that are there.

    Args:
      losses: loss_of() by step, where it is known.
      damaged: steps that count for nothing and are left where they are, for a person to look at.

    >>> sorted(Keep(1, every=100, best=1).wanted([50, 100, 150, 175], {50: 1.0, 150: 2.0}, {175}))
    [50, 100, 150, 175]
    """
    whole = sorted(set(steps) - damaged)
    ranked = sorted((losses[s], s) for s in whole if math.isfinite(losses.get(s, math.nan)))
    kept = {*whole[-self.newest :], *(step for _, step in ranked[: self.best])}
    if self.every:
      kept |= {step for step in whole if step % self.every == 0}
    return kept | (set(steps) & damaged)

  def loss_of(self, metadata: Mapping[str, Any]) -> float:
    """What is the less the better, as a checkpoint's metadata tell it; nan for nothing."""
    told = metadata.get('validation')
    value = told.get(self.by) if isinstance(told, Mapping) else None
    if not isinstance(value, int | float):
      return math.nan
    return float(value) if self.by == 'loss' else -float(value)


class Preservation:
  """Keep as orbax asks for it; it sees what its owner learns of losses and damage."""

  def __init__(self, keep: Keep, losses: Mapping[int, float], damaged: set[int]):
    self._keep, self._losses, self._damaged = keep, losses, damaged

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """One answer a checkpoint."""
    del context
    steps = [info.step for info in checkpoints]
    wanted = self._keep.wanted(steps, self._losses, self._damaged)
    return [step in wanted for step in steps]


class Failures:
  """Saves that failed one after the other; the longer nothing could be saved, the louder."""

  def __init__(self):
    self._count, self._since = 0, 0.0

  def reset(self) -> None:
    """A save has succeeded."""
    self._count = 0

  def another(self) -> str:
    """Counts a failure; what a message about it begins with."""
    self._count += 1
    if self._count == 1:
      self._since = time.monotonic()
      return ''
    minutes = (time.monotonic() - self._since) / 60
    word = 'WARNING' if self._count == 2 else 'ALARM' + '!' * min(5, self._count - 2)
    return f'{word}: {self._count} saves in a row have failed, for {minutes:.0f} minutes. '


def how_far_back(step: int, there: Sequence[int], name: str) -> str:
  """What a run would lose if it were killed now, in words.

  >>> how_far_back(20, [5, 10], 'checkpoint'), how_far_back(20, [], 'checkpoint')
  ('the newest whole one is checkpoint_10, 10 steps back', 'there is no older one')
  """
  if not there:
    return 'there is no older one'
  newest = max(there)
  return f'the newest whole one is {name}_{newest}, {step - newest} steps back'
