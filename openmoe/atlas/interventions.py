"""Experiments: the loss of the same texts under other decisions of the routers.

A described specialisation is a hypothesis; whether it is a cause shows when the experts are taken
away. All differences are paired by document, with intervals over documents.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from openmoe.atlas.charts import Analysis, Chart, Series, Table
from openmoe.atlas.counts import MOST_GROUPS, Study
from openmoe.atlas.estimators import AS_DEFINED, interval
from openmoe.atlas.forward import Calls, Forward
from openmoe.atlas.record import LABELS, Document, Record
from openmoe.atlas.recording import grouped
from openmoe.config import ConfigError
from openmoe.inference.model import LanguageModel
from openmoe.inference.routing import router_names

BASE = 'as it is'


@dataclasses.dataclass(frozen=True)
class Losses:
  """Losses of documents under several variants.

  Attributes:
    names: of the variants; the first is the base.
    documents: names and labels.
    sums: [variants, D, 2] sum of the losses of next tokens in nats, and their count.
  """

  names: tuple[str, ...]
  documents: tuple[Document, ...]
  sums: np.ndarray


def _loss(seen, rows: Sequence[Sequence[int]]) -> np.ndarray:
  """[rows, 2] of a call."""
  return np.array([
    (-seen.next_log_prob_bt[i, : len(row) - 1].astype(np.float64).sum(), len(row) - 1)
    for i, row in enumerate(rows)
  ])  # fmt: skip


def measure(
  models: Mapping[str, LanguageModel],
  documents: Iterable[Document],
  calls: Calls,
  show: Callable[[int], None] = lambda done: None,
) -> Losses:
  """Runs every model over the same calls.

  Args:
    models: by name of the variant; the first is the base.
  """
  forwards = [Forward(model, calls) for model in models.values()]
  first = next(iter(models.values()))
  kept, sums = [], []
  for batch in grouped(documents, forwards[0].rows, first.start_id, calls.length):
    rows = [row for _, of_document in batch for row in of_document]
    owner = np.array([i for i, (_, of_document) in enumerate(batch) for _ in of_document])
    found = np.zeros((len(forwards), len(batch), 2))
    for number, forward in enumerate(forwards):
      for at in range(0, len(rows), forward.rows):
        some = rows[at : at + forward.rows]
        np.add.at(found[number], owner[at : at + len(some)], _loss(forward(some), some))
    kept += [dataclasses.replace(document, tokens=()) for document, _ in batch]
    sums.append(found)
    show(len(kept))
  if not kept:
    raise ConfigError('There is no document with a token in the data; check --data and its fields.')
  return Losses(tuple(models), tuple(kept), np.concatenate(sums, axis=1))


def report(found: Losses) -> Analysis:
  """Losses and differences, of all documents and of each label's groups."""
  groups = {'all': np.ones(len(found.documents), bool)}
  for label in LABELS:
    values = [document.labels.get(label, '') for document in found.documents]
    names = sorted(set(values) - {''})
    groups |= {f'{label} {n}': np.array([v == n for v in values]) for n in names if len(names) > 1}
  rows, series = [], []
  mean = lambda t: t[0] / t[1]
  change = lambda t: t[2] / t[3] - t[0] / t[1]
  for number, name in enumerate(found.names):
    values, lows, highs, counts = [], [], [], []
    for group, kept in groups.items():
      base, own = _folded(found.sums[0][kept]), _folded(found.sums[number][kept])
      low, high = interval(np.concatenate([base, own], axis=1), change)
      difference = change(np.concatenate([base, own], axis=1).sum(axis=0))
      tokens = own.sum(axis=0)[1]
      rows.append([name, group, f'{tokens:,.0f}', f'{mean(own.sum(axis=0)):.4f}',
                   f'{difference:+.4f}', f'{low:+.4f} to {high:+.4f}'])  # fmt: skip
      for list_, value in ((values, difference), (lows, low), (highs, high), (counts, tokens)):
        list_.append(float(value))
    if number:
      series.append(Series(name, list(groups), *map(np.array, (values, lows, highs, counts))))
  head = ('variant', 'documents', 'tokens', 'loss', 'difference', '95 %')
  parts: list[Any] = [Table('intervention', 'Losses', AS_DEFINED, head, rows,
                            'Nats per next token; differences paired by document.')]  # fmt: skip
  if series:
    parts.append(Chart('intervention_change', 'Change of the loss', 'bars', AS_DEFINED, 'documents',
                       'nats per token', tuple(series), (0.0, 'no change')))  # fmt: skip
  return Analysis(
    'intervention',
    'What do these experts cause?',
    'The loss of the same texts with the decisions of routers changed, less the loss as it is.',
    'A model without some experts is a model that was never trained so: a loss that rises says '
    'that they are used, and not what for. Compare groups with one another.',
    tuple(parts),
  )


def _folded(sums_D2: np.ndarray) -> np.ndarray:
  """[F, 2] by group of documents."""
  groups = min(len(sums_D2), MOST_GROUPS)
  out = np.zeros((groups, 2))
  np.add.at(out, np.arange(len(sums_D2)) % groups, sums_D2)
  return out


def keep_top(study: Study, share: float, label: str) -> dict[str, str]:
  """Words of routing.parse that keep each group's own top experts of every router.

  Args:
    study: of a record of the same model; which experts a group uses is read there.
    share: of experts that stay, at least top_k.

  Returns:
    {'group, top 25 %': words}.

  Raises:
    ConfigError: the record has no such label.
  """
  keys = study.labels()
  if label not in keys:
    raise ConfigError(f'{study.record.folder} has no {label} labels, only {list(keys)}.')
  header, key, found = study.header, keys[label], {}
  count = max(header.top_k, math.ceil(share * header.num_experts))
  for g, name in enumerate(key.labels):
    words = []
    for i, router in enumerate(header.routers):
      used = study.tally(i, key).sum(axis=0)[g]
      best = np.sort(np.argsort(-used, kind='stable')[:count])
      words.append(f'keep={router}:{",".join(map(str, best))}')
    found[f'top {share:.1%} of {name}'] = ' '.join(words)
  return found


# --- replay


def documents_of(record: Record) -> Iterator[tuple[Document, np.ndarray, np.ndarray]]:
  """(document, experts, weights) [tokens, R, k] of a record; tokens that begin rows among them."""
  told = record.describe()
  for part in record.parts():
    number = np.asarray(part['document'])
    edges = np.concatenate([[0], np.flatnonzero(np.diff(number)) + 1, [len(number)]])
    for first, last in itertools.pairwise(edges):
      real = part['position'][first:last] > 0
      about = told[int(number[first])]
      tokens = part['token_id'][first:last][real].tolist()
      yield (
        Document(about['name'], tokens, about['labels']),
        np.asarray(part['expert'][first:last]),
        np.asarray(part['weight'][first:last]),
      )


@dataclasses.dataclass(frozen=True)
class Replay:
  """What a model gave along a record.

  Attributes:
    largest_gap: of the log-probabilities of next tokens to those of the record.
    other_predictions: tokens whose largest logit is another one.
    loss, recorded_loss: nats per token.
    tokens: that have a next one.
  """

  largest_gap: float
  other_predictions: int
  loss: float
  recorded_loss: float
  tokens: int


def replay(model: LanguageModel, record: Record, own_weights: bool = False) -> Replay:
  """Runs a model with every choice of a record in place of its own.

  Args:
    own_weights: the model's own combine weights; else those of the record.

  Raises:
    ConfigError: the record is of another kind of model.
  """
  header = record.header
  calls = calls_of(header)
  forward = Forward(model, calls)
  names = router_names(forward.config)
  same = (tuple(map(str, header.routers)), header.num_experts, header.top_k, header.vocab_size)
  mine = (names, forward.config.moe.num_experts, forward.config.moe.top_k, model.config.vocab_size)
  if same != mine:
    raise ConfigError(f'{record.folder} is of routers {same}, {model.name} has {mine}.')
  waiting, gap, other, sums = {}, 0.0, 0, np.zeros(3)
  recorded = _recorded(record)

  def remembered() -> Iterator[Document]:
    for document, expert, weight in documents_of(record):
      waiting[id(document)] = (expert, weight)
      yield document

  for batch in grouped(remembered(), forward.rows, header.start_id, header.length):
    rows = [row for _, of_document in batch for row in of_document]
    expert, weight = (np.concatenate(x) for x in zip(
      *(waiting.pop(id(document)) for document, _ in batch), strict=True))  # fmt: skip
    ends = np.cumsum([len(row) for row in rows])
    for at in range(0, len(rows), forward.rows):
      some = rows[at : at + forward.rows]
      begins = [ends[at + i] - len(row) for i, row in enumerate(some)]
      follow = [_by_router(x, begins, some, fill) for x, fill in ((expert, -1), (weight, 0))]
      seen = forward(some, replay=(follow[0], None if own_weights else follow[1]))
      for i, row in enumerate(some):
        told_log_prob, told_prediction = next(recorded)
        mine_log_prob = seen.next_log_prob_bt[i, : len(row)]
        gap = max(gap, float(np.abs(mine_log_prob - told_log_prob).max()))
        other += int((seen.predicted_bt[i, : len(row)] != told_prediction).sum())
        sums += -mine_log_prob.sum(dtype=float), -told_log_prob.sum(dtype=float), len(row) - 1
  return Replay(gap, other, sums[0] / sums[2], sums[1] / sums[2], int(sums[2]))


def calls_of(header) -> Calls:
  """How the calls of a record were made."""
  if header.capacity is None:
    return Calls(length=header.length)
  sizes = (header.length, header.rows, header.group_size, header.capacity_factor)
  return Calls(True, *sizes, header.ignore_padding)


def _recorded(record: Record) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """(log-probabilities, predictions) of row after row."""
  for part in record.parts():
    begins = np.flatnonzero(np.asarray(part['position']) == 0)
    for first, last in zip(begins, [*begins[1:], part.tokens], strict=True):
      yield np.asarray(part['next_log_prob'][first:last]), part['predicted_id'][first:last]


def _by_router(x_NRk: np.ndarray, begins, rows, fill: int) -> np.ndarray:
  """[R, b, t, k] of some rows, the longest of which has t tokens."""
  longest = max(map(len, rows))
  out = np.full((x_NRk.shape[1], len(rows), longest, x_NRk.shape[2]), fill, x_NRk.dtype)
  for i, (first, row) in enumerate(zip(begins, rows, strict=True)):
    out[:, i, : len(row)] = x_NRk[first : first + len(row)].swapaxes(0, 1)
  return out


# --- benchmarks


def benchmark_differences(
  base: Mapping[str, Mapping], other: Mapping[str, Mapping], resamples: int = 1000
) -> list[list[str]]:
  """Rows (task, metric, items, before, after, difference, 95 %), paired by item.

  Args:
    base, other: results by task, as evaluation.results.load_all gives them.
  """
  rows = []
  for task in sorted(base.keys() & other.keys()):
    metric = base[task]['metric']
    one, two = (
      {item['name']: item['measures'][metric] for item in result[task]['items']}
      for result in (base, other)
    )
    names = sorted(one.keys() & two.keys())
    pairs = np.array([(one[name], two[name], 1.0) for name in names])
    change = lambda t: (t[1] - t[0]) / t[2]
    low, high = interval(pairs, change, resamples)
    before, after, count = pairs.sum(axis=0)
    rows.append([task, metric, f'{len(names)}', f'{before / count:.4f}', f'{after / count:.4f}',
                 f'{(after - before) / count:+.4f}', f'{low:+.4f} to {high:+.4f}'])  # fmt: skip
  return rows
