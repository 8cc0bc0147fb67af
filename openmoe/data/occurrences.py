"""Where a document was trained on, and which documents of a step a model finds hardest."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from openmoe.checkpoint.positions import DataPositions
from openmoe.config import ConfigError, DataConfig
from openmoe.data.exclusion import MARKED
from openmoe.data.features import Example, Row
from openmoe.data.inspection import checkpoints_of
from openmoe.data.stages import Saved, saved
from openmoe.data.stream import ShardedStream


class Scorer(Protocol):
  """What LanguageModel.score gives, for (context, continuation) token ids."""

  def score(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list: ...


@dataclasses.dataclass(frozen=True)
class Place:
  """One example of a batch.

  Attributes:
    step: of the batch, from 0: what step + 1 trains on.
    row: of the global batch.
    segment: of the row, from 1.
  """

  step: int
  row: int
  segment: int
  example: Example


def stages_of(run_dir: str | os.PathLike) -> list[Saved]:
  """The stages of a run's checkpoints, each as its newest one says; in order.

  Raises:
    ConfigError: there is no checkpoint, or one is damaged.
  """
  found: dict[str, Saved] = {}
  for path in checkpoints_of(run_dir).values():
    told = saved(DataPositions(path / 'data'))
    found[told.stage] = told
  return list(found.values())


def in_batches(
  config: DataConfig,
  wanted: str | int,
  steps: int,
  first: int = 0,
  tell: Callable[[int], None] = lambda step: None,
  ends_at: Saved | None = None,
) -> Iterator[Place]:
  """Examples in which a document has a token, with those of other documents in the same example.

  Args:
    wanted: FILE:RECORD, or the number of the document.
    steps: batches to read, from the beginning of the data.
    first: global step of the first.
    tell: is told each step before it is read.
    ends_at: a saved position after these steps, to make sure that they were read as then.

  Raises:
    ConfigError: no corpus has the document, or the position is of other batches.
  """
  shards = range(config.num_shards)
  with ShardedStream(config, shards, wanted) as stream:
    for step in range(first, first + steps):
      tell(step)
      if next(stream, None) is None:
        break
      for number, row in enumerate(stream.last_rows):
        for segment, example in enumerate(row, start=1):
          if example.documents[0] == MARKED:
            yield Place(step, number, segment, example)
    if ends_at is not None:
      _check_end(config, ends_at, next(stream, None) and stream.last_rows)


def _check_end(config: DataConfig, ends_at: Saved, rows: Sequence[Row] | None) -> None:
  """Raises ConfigError where a saved position goes on otherwise than what was read up to it."""
  with ShardedStream(config, range(config.num_shards)) as stream:
    stream.restore(ends_at.positions)
    theirs = next(stream, None) and stream.last_rows
  tokens = lambda rows: [[(bytes(e.inputs), bytes(e.targets)) for e in row] for row in rows or ()]
  if tokens(rows) != tokens(theirs):
    raise ConfigError(
      f'Read from step {ends_at.first}, the data do not lead to the position saved at step '
      f'{ends_at.step}: the run began elsewhere in them (INITIAL_CHECKPOINT, ALLOW_DATA_CHANGE, '
      'another list of excluded documents), or their files have changed, so where the document '
      'was is not known.'
    )


def ranked(model: Scorer, rows: Sequence[Row], step: int) -> list[tuple[float, Place]]:
  """Examples of a batch by their loss, nats a target token, the largest first.

  Each is read by itself, without capacity.
  """
  places = [
    Place(step, number, segment, example)
    for number, row in enumerate(rows)
    for segment, example in enumerate(row, start=1)
  ]
  requests = [(p.example.inputs.tolist(), p.example.targets.tolist()) for p in places]
  losses = [-float(np.mean(score.token_log_probs)) for score in model.score(requests)]
  return sorted(zip(losses, places, strict=True), key=lambda pair: -pair[0])
