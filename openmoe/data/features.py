"""seqio examples -> packed rows -> Batch.

Packing is first fit over a few open rows, on numpy, so that an example which does not fit the
newest row does not close it: examples of a whole and of half a row then waste nothing. With one
open row it is seqio's own next-fit. Rows know which example each segment came from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from openmoe.types import Batch

# Rows an example may still join. More wait longer for little: 8 leave under 1 % empty with UL2.
OPEN_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Example:
  """One example of a task, before packing.

  Attributes:
    inputs: int32 [t], may be empty.
    targets: int32 [t].
    source: the task's label, '' when it was not asked for.
    documents: ids of the documents of its first and last token; -1 unknown.
    objective: index of the denoiser; -1 unknown.
  """

  inputs: np.ndarray
  targets: np.ndarray
  source: str = ''
  documents: tuple[int, int] = (-1, -1)
  objective: int = -1

  @property
  def size(self) -> int:
    return len(self.inputs) + len(self.targets)


Row = tuple[Example, ...]


class Packer:
  """Packs a sequence of examples into rows of at most row_length tokens, deterministically."""

  def __init__(self, row_length: int, open_rows: int = OPEN_ROWS):
    """Rows close when they are full, or the fullest when more than open_rows are open.

    Args:
      row_length: tokens of a row (t).
      open_rows: 0 puts every example in a row of its own.
    """
    self._row_length = row_length
    self._limit = open_rows
    self.open: list[list[Example]] = []
    self._free: list[int] = []

  def add(self, example: Example) -> list[Row]:
    """Takes an example and returns the rows it completed (none, one or two)."""
    if example.size > self._row_length:
      raise ValueError(
        f'An example of {example.size} tokens does not fit a row of {self._row_length}: seqio '
        'trims features to task_feature_lengths before packing.'
      )
    if not self._limit:
      return [(example,)]
    for index, free in enumerate(self._free):
      if example.size <= free:
        self.open[index].append(example)
        self._free[index] = free - example.size
        return [self._close(index)] if not self._free[index] else []
    done = []
    if len(self.open) >= self._limit:
      done.append(self._close(self._free.index(min(self._free))))
    self.open.append([example])
    self._free.append(self._row_length - example.size)
    if not self._free[-1]:
      done.append(self._close(len(self.open) - 1))
    return done

  def _close(self, index: int) -> Row:
    self._free.pop(index)
    return tuple(self.open.pop(index))

  def flush(self) -> list[Row]:
    """The open rows, oldest first; at the end of a finite dataset."""
    rows = [tuple(row) for row in self.open]
    self.open, self._free = [], []
    return rows

  def reopen(self, rows: Sequence[Row]) -> None:
    """Takes up the open rows of an earlier packer."""
    self.open = [list(row) for row in rows]
    self._free = [self._row_length - sum(e.size for e in row) for row in rows]


def batch_rows(rows: Sequence[Row], task_feature_lengths: Mapping[str, int]) -> Batch:
  """numpy Batch of packed rows; an empty row is all padding.

  With `inputs` among the lengths the loss counts on targets only, EOS included; without, on every
  token. As seqio.DecoderFeatureConverter makes its features.

  Args:
    rows: b rows.
    task_feature_lengths: as DataConfig's.
  """
  length = sum(task_feature_lengths.values())
  shape = (len(rows), length)
  inputs, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  weights = np.zeros(shape, np.float32)
  count = np.arange(length, dtype=np.int32)
  for r, row in enumerate(rows):
    start = 0
    for number, example in enumerate(row, start=1):
      middle, end = start + len(example.inputs), start + example.size
      targets[r, start:middle] = example.inputs
      targets[r, middle:end] = example.targets
      # 0 begins a segment: the padding id serves as BOS in the released models.
      inputs[r, start + 1 : end] = targets[r, start : end - 1]
      weights[r, middle:end] = 1
      segments[r, start:end] = number
      positions[r, start:end] = count[: end - start]
      start = end
  return Batch(inputs, targets, weights, segments, positions)


def pack_examples(examples: Sequence[Example]) -> dict[str, np.ndarray]:
  """Examples as flat arrays, for a saved state; unpack_examples is the inverse."""
  return {
    'input_sizes': np.array([len(e.inputs) for e in examples], np.int64),
    'target_sizes': np.array([len(e.targets) for e in examples], np.int64),
    'inputs': np.concatenate([e.inputs for e in examples] or [np.zeros(0, np.int32)]),
    'targets': np.concatenate([e.targets for e in examples] or [np.zeros(0, np.int32)]),
    'sources': np.array([e.source for e in examples], np.str_),
    'documents': np.array([e.documents for e in examples], np.int64).reshape(-1, 2),
    'objectives': np.array([e.objective for e in examples], np.int64),
  }


def unpack_examples(arrays: Mapping[str, np.ndarray]) -> list[Example]:
  """See pack_examples."""
  inputs = np.split(arrays['inputs'], np.cumsum(arrays['input_sizes'])[:-1])
  targets = np.split(arrays['targets'], np.cumsum(arrays['target_sizes'])[:-1])
  if not len(arrays['input_sizes']):
    return []
  return [
    Example(i, t, str(source), (int(ids[0]), int(ids[1])), int(objective))
    for i, t, source, ids, objective in zip(
      inputs, targets, arrays['sources'], arrays['documents'], arrays['objectives'], strict=True
    )
  ]
