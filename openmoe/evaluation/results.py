"""Result files of evaluations: one JSON per task, intervals by bootstrap, the table of all.

A file holds what is needed to trust it and to compare it: the model's fingerprint, how prompts were
made and cut, the tokenizer, seeds, and every item with its prompt, log-probabilities and figures.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from openmoe.checkpoint import safe_json
from openmoe.checkpoint.paths import read_small, write_whole
from openmoe.config import ConfigError

FORMAT = 1
_MOST_BYTES = 1 << 31  # of a result file
_PERCENTILES = (2.5, 97.5)


def file_name(task: str) -> str:
  """Name of a task's result file."""
  return re.sub(r'[^\w.\-]+', '_', task) + '.json'


def save(path: epath.Path, header: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> None:
  """Writes a result, whole or not at all; one item a line, so that files can be compared.

  Raises:
    ConfigError: a figure is no number, which JSON has no word for.
    OSError: it cannot be written.
  """
  try:
    head = json.dumps({'format': FORMAT, **header}, ensure_ascii=False, allow_nan=False, indent=1)
    rows = ',\n'.join(json.dumps(item, ensure_ascii=False, allow_nan=False) for item in items)
  except ValueError as error:
    raise ConfigError(
      f'{path}: a figure is not finite ({error}), so nothing is written; look at the model.'
    ) from error
  write_whole(path, f'{head[:-2]},\n "items": [\n{rows}\n]}}\n'.encode())


def _is_number(value: Any) -> bool:
  """Whether it is a number to compute with: finite, and no float's limit beyond it."""
  return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _problem(result: Any) -> str | None:
  """What a value lacks that every result file has, or None."""
  if not isinstance(result, dict) or result.get('format') != FORMAT:
    return f'is no result file of format {FORMAT}'
  wanted = dict.fromkeys(('task', 'group', 'metric', 'tokenizer', 'bos'), str)
  wanted |= {'in_average': bool, 'shots': int, 'items': list}
  wanted |= dict.fromkeys(('model', 'settings', 'metrics'), dict)
  for name, kind in wanted.items():
    if not isinstance(result.get(name), kind):
      return f'has no {name}, or one of another kind'
  model, low, high = result['model'], result.get('low'), result.get('high')
  if not (_is_number(low) and _is_number(high) and low < high):
    return f'has no range of scores, but {low!r} to {high!r}'
  if not all(isinstance(model.get(n), str) for n in ('name', 'fingerprint')) or not _is_number(
    model.get('dropped_fraction')
  ):
    return 'does not say which model it is of'
  names = set()
  for place, item in enumerate(result['items'], start=1):
    if not isinstance(item, dict) or not isinstance(item.get('name'), str):
      return f'has no name for item {place}'
    measures, logs = item.get('measures'), item.get('log_probs', [])
    if not isinstance(measures, dict) or not _is_number(measures.get(result['metric'])):
      return f'has no {result["metric"]} for item {place}'
    if not isinstance(logs, list) or not all(map(_is_number, logs)):
      return f'has log_probs for item {place} that are no list of numbers'
    names.add(item['name'])
  if len(names) < len(result['items']):
    return 'has items of the same name'
  return None if names else 'has no items'


def load(path: str | os.PathLike) -> dict[str, Any]:
  """A result file.

  Raises:
    ConfigError: it is absent, cut off, or no result file.
  """
  path = epath.Path(path)
  try:
    text = read_small(path, _MOST_BYTES).decode('utf-8')
    result = safe_json.loads(text)
    if '\\ud' in text.lower():  # an escape may be half a surrogate pair, which nothing can print
      json.dumps(result, ensure_ascii=False).encode()
  except FileNotFoundError as error:
    raise ConfigError(f'{path} does not exist; scripts.evaluate writes result files.') from error
  except ValueError as error:
    raise ConfigError(
      f'{path} is no whole JSON file ({error}); evaluate that task again.'
    ) from error
  if problem := _problem(result):
    raise ConfigError(f'{path} {problem}; scripts.evaluate writes them: evaluate that task again.')
  return result


def load_all(directory: str | os.PathLike) -> dict[str, dict[str, Any]]:
  """All results in a directory by task, or the one of a file.

  Raises:
    ConfigError: there is none.
  """
  directory = epath.Path(directory)
  if not directory.is_dir():
    result = load(directory)
    return {result['task']: result}
  paths = sorted(p for p in directory.glob('*.json') if p.name != 'summary.json')
  if not paths:
    raise ConfigError(f'{directory} holds no result files; scripts.evaluate writes them.')
  return {result['task']: result for result in map(load, paths)}


def bootstrap(values: Sequence[float], resamples: int, seed: int | Sequence[int]) -> np.ndarray:
  """float64 [resamples]: means of samples of the values, drawn with replacement."""
  unique, counts = np.unique(np.asarray(values, np.float64), return_counts=True)
  rng = np.random.default_rng(seed)
  # How often each value is drawn is multinomial, so nothing of the size of the sample is drawn.
  drawn = rng.multinomial(counts.sum(), counts / counts.sum(), size=resamples)
  return drawn @ unique / counts.sum()


def interval(means: np.ndarray) -> list[float]:
  """[2.5 %, 97.5 %] of resampled means."""
  return [float(x) for x in np.percentile(means, _PERCENTILES)]


@dataclasses.dataclass(frozen=True)
class Row:
  """A line of the table.

  Attributes:
    group: name of the task.
    metric: what `score` is.
    score, low95, high95: mean over the group's tasks, with its interval.
    normalised: 100 * (score - low) / (high - low), where low is guessing, with its interval.
    items: in all tasks of the group.
    shots: in the prompts.
    dropped: largest share of routed pairs that found no slot.
  """

  group: str
  metric: str
  score: float
  low95: float
  high95: float
  normalised: float
  normalised95: tuple[float, float]
  items: int
  shots: int
  dropped: float

  def __post_init__(self):
    if len(self.normalised95) != 2:
      raise ConfigError(f'normalised95={self.normalised95} must be two numbers.')


def summarise(results: Sequence[Mapping[str, Any]], resamples: int, seed: int) -> list[Row]:
  """One row per group in order of appearance, and, with several, 'average' of their normalised.

  Tasks count alike in their group, groups alike in the average, as in BIG-bench.
  """
  groups: dict[str, list[Mapping[str, Any]]] = {}
  for result in results:
    groups.setdefault(result['group'], []).append(result)
  rows, spreads, counted = [], [], []
  for group, members in groups.items():
    metric = members[0]['metric']
    values = [[item['measures'][metric] for item in member['items']] for member in members]
    # A stream of its own for each task: from one seed alone, tasks would move together.
    streams = [(seed, zlib.crc32(member['task'].encode())) for member in members]
    drawn = [bootstrap(v, resamples, stream) for v, stream in zip(values, streams, strict=True)]
    means = np.mean(drawn, axis=0)
    score = float(np.mean([np.mean(v) for v in values]))
    low, high = (float(np.mean([member[key] for member in members])) for key in ('low', 'high'))
    normalise = lambda x, low=low, high=high: 100 * (x - low) / (high - low)
    spread = normalise(means)
    if members[0]['in_average']:
      spreads.append(spread)
      counted.append(normalise(score))
    rows.append(
      Row(
        group,
        metric,
        score,
        *interval(means),
        normalise(score),
        tuple(interval(spread)),
        sum(map(len, values)),
        members[0]['shots'],
        max(member['model']['dropped_fraction'] for member in members),
      )
    )
  if len(counted) > 1:
    score, spread = float(np.mean(counted)), np.mean(spreads, axis=0)
    rows.append(
      Row(
        'average',
        'normalised',
        score,
        *interval(spread),
        score,
        tuple(interval(spread)),
        sum(row.items for row in rows),
        rows[0].shots,
        max(row.dropped for row in rows),
      )
    )
  return rows


def save_summary(directory: epath.Path, rows: Sequence[Row], header: Mapping[str, Any]) -> None:
  """summary.json and summary.csv beside the results."""
  content = {**header, 'rows': [dataclasses.asdict(row) for row in rows]}
  text = json.dumps(content, indent=1, allow_nan=False)
  write_whole(directory / 'summary.json', text.encode() + b'\n')
  names = ('group', 'metric', 'score', 'low95', 'high95', 'normalised', 'items', 'shots', 'dropped')
  table = io.StringIO()
  writer = csv.writer(table, lineterminator='\n')
  writer.writerows([names, *([getattr(row, name) for name in names] for row in rows)])
  write_whole(directory / 'summary.csv', table.getvalue().encode())


# --- what changed between two results of a task


@dataclasses.dataclass(frozen=True)
class Change:
  """An item that came out differently.

  Attributes:
    item: its name.
    why: 'missing' (only one of the two has it), 'prompt', 'tokens' (same text, other ids),
      'model' or 'numerics' (same ids; the model differs, or does not), 'seed' (sampled anew).
    outcome: whether the figure of the task's metric changed as well.
    before, after: of that figure; None where the item is missing.
    log_prob_gap: largest difference of a log-probability; None for generated text.
  """

  item: str
  why: str
  outcome: bool
  before: float | None
  after: float | None
  log_prob_gap: float | None


def _cause(one: Mapping, two: Mapping, same_model: bool, same_seed: bool) -> str | None:
  for key, why in (('prompt', 'prompt'), ('choices', 'prompt'), ('tokens', 'tokens')):
    if one.get(key) != two.get(key):
      return why
  if (one.get('log_probs'), one.get('texts')) == (two.get('log_probs'), two.get('texts')):
    return None
  if not same_model:
    return 'model'
  return 'numerics' if same_seed or one.get('log_probs') else 'seed'


def compare(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[Change]:
  """Items of a task that differ between two results, in the order of the first."""
  metric = one['metric']
  same_model = one['model']['fingerprint'] == two['model']['fingerprint']
  same_seed = one['settings'].get('seed') == two['settings'].get('seed')
  others = {item['name']: item for item in two['items']}
  figure = lambda item: item['measures'].get(metric)
  changes = []
  for item in one['items']:
    other = others.pop(item['name'], None)
    if other is None:
      changes.append(Change(item['name'], 'missing', True, figure(item), None, None))
      continue
    why = _cause(item, other, same_model, same_seed)
    if why:
      a, b = item.get('log_probs') or [], other.get('log_probs') or []
      gap = float(np.max(np.abs(np.subtract(a, b)))) if a and len(a) == len(b) else None
      before, after = figure(item), figure(other)
      changes.append(Change(item['name'], why, before != after, before, after, gap))
  left = (Change(name, 'missing', True, None, figure(item), None) for name, item in others.items())
  return [*changes, *left]
