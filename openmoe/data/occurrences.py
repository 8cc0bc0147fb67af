"""Where a document was trained on, and which documents of a step a model finds hardest."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from openmoe.checkpoint.positions import DataPositions
from openmoe.config import ConfigError, DataConfig
from openmoe.data import inspection
from openmoe.data.exclusion import MARKED
from openmoe.data.features import Example, Row
from openmoe.data.stages import Saved, saved
from openmoe.data.stream import ShardedStream
from openmoe.observe.text import visible

_SHOWN = 24  # tokens of an example
_PATIENCE = 10.0  # seconds between two words of how far it is


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
  for path in inspection.checkpoints_of(run_dir).values():
    told = saved(DataPositions(path / 'data'))
    found[told.stage] = told
  return list(found.values())


def in_batches(
  config: DataConfig,
  wanted: str | int,
  steps: int,
  first: int = 0,
  ends_at: Saved | None = None,
) -> Iterator[Place]:
  """Examples in which a document has a token, with those of other documents in the same example.

  Args:
    wanted: FILE:RECORD, or the number of the document, also as text.
    steps: batches to read, from the beginning of the data.
    first: global step of the first.
    ends_at: a saved position after these steps, to make sure that they were read as then.

  Raises:
    ConfigError: no corpus has the document, or the position is of other batches.
  """
  shards = range(config.num_shards)
  by_number = isinstance(wanted, str) and wanted.isdigit()
  with ShardedStream(config, shards, int(wanted) if by_number else wanted) as stream:
    told = time.monotonic()
    for step in range(first, first + steps):
      if time.monotonic() - told > _PATIENCE:
        told = time.monotonic()
        print(f'step {step} of {first + steps}', file=sys.stderr)
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


def of_mixture(
  config: DataConfig, wanted: str | int, steps: int, first: int = 0, ends_at: Saved | None = None
) -> Iterator[str]:
  """in_batches() as lines of text, and how many steps they are."""
  where, vocabulary = set(), inspection.vocabulary_of(config)
  for place in in_batches(config, wanted, steps, first, ends_at):
    where.add(place.step)
    example = place.example
    tokens = np.concatenate([example.inputs, example.targets])[:_SHOWN]
    shown = inspection.show_tokens(tokens, vocabulary, loss=False, color=False)
    yield f'step {place.step} {_told(place, "")}{visible(shown)}'
  yield f'{wanted}: in {len(where)} of the steps {first} to {first + steps - 1}'


def of_run(run_dir: str | os.PathLike, wanted: str | int) -> Iterator[str]:
  """Where a run was trained on a document, up to its newest checkpoint, as lines of text.

  Raises:
    ConfigError: see in_batches.
  """
  end = 0
  for stage in stages_of(run_dir):
    if stage.first != end:
      yield f'No checkpoint is left that tells the data of steps {end} to {stage.first - 1}.'
    yield from of_mixture(stage.data, wanted, stage.step - stage.first, stage.first, stage)
    end = stage.step


def hardest(run_dir: str | os.PathLike, step: int, load: Callable[[str], Scorer]) -> Iterator[str]:
  """ranked() of a batch of a run, by its newest checkpoint up to then, as lines of text.

  Args:
    load: opens a checkpoint.

  Raises:
    ConfigError: see inspection.position_of_run.
  """
  found = inspection.position_of_run(run_dir, step)
  with ShardedStream(found.data, range(found.data.num_shards)) as stream:
    stream.restore(found.positions)
    next(itertools.islice(stream, step - found.step, None))
    rows = stream.last_rows
  checkpoint = inspection.checkpoint_before(run_dir, step)
  yield f'step {step}, losses of {checkpoint.name}, nats a target token'
  for loss, place in ranked(load(str(checkpoint)), rows, step):
    documents = inspection.documents_of(place.example, found.data)
    yield f'{loss:7.4f}  {_told(place, f"{documents} | ")}'


def _told(place: Place, documents: str) -> str:
  example = place.example
  return visible(
    f'row {place.row} segment {place.segment}: {example.source or "?"} | {documents}'
    f'{inspection.objective_name(example)} | '
    f'{len(example.inputs)} + {len(example.targets)} tokens | '
  )
