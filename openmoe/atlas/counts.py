"""Counting a record: one pass over its parts, memory that does not grow with its tokens.

Every table has a leading axis of groups of documents, from which intervals are made. Position 0 is
left out unless a key asks for it: every row begins with the same token there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from openmoe.atlas import estimators
from openmoe.atlas.record import LABELS, Part, Record

MOST_GROUPS = 64
MOST_CELLS = 1 << 25  # of a table, all groups together
MOST_KEPT = 1 << 22  # cells of a table that is kept for another analysis
OUT = -1  # a token that a key leaves out


@dataclasses.dataclass(frozen=True)
class Key:
  """What tokens are grouped by.

  Attributes:
    name: for caches and files.
    labels: of the groups.
    of: part -> int [N] group of each token, OUT for none.
  """

  name: str
  labels: tuple
  of: Callable[[Part], np.ndarray]

  @property
  def size(self) -> int:
    return len(self.labels)


def real(part: Part) -> np.ndarray:
  """bool [N]: not the token that begins a row."""
  return part['position'] > 0


class Study:
  """A record and what was counted of it.

  Args:
    record: of one checkpoint.
    seed: of shuffles and bootstraps.

  Attributes:
    groups: of documents, for intervals.
    ids: token ids that occur, sorted. times: how often, position 0 aside.
  """

  def __init__(self, record: Record, seed: int = 0):
    self.record, self.header, self.seed = record, record.header, seed
    self.groups = min(record.documents, MOST_GROUPS)
    self._tables: dict[tuple, np.ndarray] = {}
    self._label_keys: dict[str, Key] | None = None
    vocab = self.header.vocab_size
    times = np.zeros(vocab, np.int64)
    for part in record.parts():
      times += np.bincount(part['token_id'][real(part)], minlength=vocab)
    self.ids = np.flatnonzero(times)
    self.times = times[self.ids]

  # --- keys

  def everything(self) -> Key:
    """All tokens in one group."""
    return Key('all', ('all',), lambda part: np.where(real(part), 0, OUT))

  def labels(self) -> dict[str, Key]:
    """Label -> key, for labels with more than one value."""
    if self._label_keys is None:
      told = [one['labels'] for one in self.record.describe()]
      self._label_keys = {}
      for label in LABELS:
        values = [one.get(label, '') for one in told]
        names = sorted({value for value in values if value})
        if len(names) > 1:
          index = {name: i for i, name in enumerate(names)}
          of_document = np.array([index.get(value, OUT) for value in values])
          self._label_keys[label] = Key(label, tuple(names), self._by_document(of_document))
    return self._label_keys

  def _by_document(self, of_document: np.ndarray) -> Callable[[Part], np.ndarray]:
    return lambda part: np.where(real(part), of_document[part['document']], OUT)

  def position(self) -> Key:
    """Every position, 0 among them."""
    return Key('position', tuple(range(self.header.length)), lambda part: part['position'])

  def token(self, column: str = 'token_id') -> Key:
    """Token ids that occur: `token_id`, `next_id` or `predicted_id`."""
    ids = self.ids

    def of(part: Part) -> np.ndarray:
      found = part[column]
      place = np.searchsorted(ids, found)
      known = (place < len(ids)) & (ids[np.minimum(place, len(ids) - 1)] == found)
      return np.where(known & real(part), place, OUT)

    return Key(column, tuple(int(i) for i in ids), of)

  # --- tables

  def tally(
    self, router: int, key: Key, *, top: int | None = None, null: bool = False
  ) -> np.ndarray:
    """int64 [F, key.size, e] assignments by group of documents, group of tokens and expert.

    Args:
      top: counts only the first so many choices.
      null: after a shuffle that keeps the loads.
    """
    name = ('tally', router, key.name, top, null)
    if name not in self._tables:
      e = self.header.num_experts
      groups = max(1, min(self.groups, MOST_CELLS // (key.size * e)))
      total = np.zeros(groups * key.size * e, np.int64)
      for number, part in enumerate(self.record.parts()):
        group = key.of(part)
        kept = group >= 0
        expert = self.experts(part, number, router, null, kept)[:, :top]
        base = (part['document'][kept] % groups).astype(np.int64) * key.size + group[kept]
        total += np.bincount((base[:, None] * e + expert).ravel(), minlength=len(total))
      table = total.reshape(groups, key.size, e)
      if table.size > MOST_KEPT:  # tables of pairs of tokens: one at a time, or they fill memory
        return table
      self._tables[name] = table
    return self._tables[name]

  def experts(
    self, part: Part, number: int, router: int, null: bool, kept: np.ndarray
  ) -> np.ndarray:
    """[N, k] choices of the tokens that are kept, shuffled for the null."""
    expert = part['expert'][kept, router].astype(np.int64)
    if null:
      generator = np.random.default_rng([self.seed, number, router])
      expert = estimators.shuffled(expert, generator)
    return expert

  def pairs(self, router: int, adjacent: bool = False, null: bool = False) -> np.ndarray:
    """int64 [F, e, e]: see estimators.pair_counts."""
    name = ('pairs', router, adjacent, null)
    if name not in self._tables:
      e = self.header.num_experts
      total = np.zeros((self.groups, e, e), np.int64)
      for number, part in enumerate(self.record.parts()):
        kept = real(part)
        expert = self.experts(part, number, router, null, kept)
        group = part['document'][kept] % self.groups
        for g in np.unique(group):
          total[g] += estimators.pair_counts(expert[group == g], e, adjacent)
      self._tables[name] = total
    return self._tables[name]

  def between(self, one: int, other: int, how: str = 'top1', null: bool = False) -> np.ndarray:
    """int64 [F, e, e]: choices of two routers about the same token.

    Args:
      how: 'top1' best of both; 'same_rank' rank by rank, as OLMoE's script counts; 'all' pairs.
      null: the tokens of the second are shuffled.
    """
    name = ('between', one, other, how, null)
    if name not in self._tables:
      e, groups = self.header.num_experts, self.groups
      total = np.zeros(groups * e * e, np.int64)
      for number, part in enumerate(self.record.parts()):
        kept = real(part)
        a = self.experts(part, number, one, False, kept)
        b = self.experts(part, number, other, null, kept)
        if how == 'top1':
          a, b = a[:, :1], b[:, :1]
        elif how == 'all':
          k = a.shape[1]
          a, b = np.repeat(a, k, axis=1), np.tile(b, (1, k))
        base = (part['document'][kept] % groups).astype(np.int64)[:, None]
        total += np.bincount(((base * e + a) * e + b).ravel(), minlength=len(total))
      self._tables[name] = total.reshape(groups, e, e)
    return self._tables[name]

  def drops(self, router: int, key: Key) -> np.ndarray:
    """int64 [F, key.size, length, 2]: (dropped, routed) assignments by group and position."""
    length = self.header.length
    groups = max(1, min(self.groups, MOST_CELLS // (key.size * length * 2)))
    total = np.zeros((2, groups * key.size * length), np.int64)
    for part in self.record.parts():
      group, position = key.of(part), part['position']
      kept = group >= 0
      base = (part['document'][kept] % groups).astype(np.int64) * key.size + group[kept]
      place = base * length + position[kept]
      for i, found in enumerate((part['dropped'], part['slot'] >= 0)):
        count = np.asarray(found[kept, router], np.int64).sum(axis=1)
        total[i] += np.bincount(place, weights=count, minlength=total.shape[1]).astype(np.int64)
    return np.moveaxis(total.reshape(2, groups, key.size, length), 0, -1)

  def mean_by(self, key: Key, column: str) -> tuple[np.ndarray, np.ndarray]:
    """(sums of a column [F, key.size, ...], tokens [F, key.size])."""
    sums, counts = None, np.zeros((self.groups, key.size))
    for part in self.record.parts():
      group = key.of(part)
      kept = group >= 0
      place = part['document'][kept] % self.groups * key.size + group[kept]
      values = np.asarray(part[column][kept], np.float64)
      if sums is None:
        sums = np.zeros((self.groups * key.size, *values.shape[1:]))
      for g in np.unique(place):
        sums[g] += values[place == g].sum(axis=0)
      counts += np.bincount(place, minlength=counts.size).reshape(counts.shape)
    return sums.reshape(self.groups, key.size, *sums.shape[1:]), counts
