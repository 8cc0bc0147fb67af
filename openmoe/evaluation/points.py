"""Points and names for figures, from evaluations and from a command line."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from openmoe.checkpoint import fields, safe_json
from openmoe.checkpoint.paths import Unreadable
from openmoe.config import ConfigError
from openmoe.evaluation import figures, results

LABELS = {
  'triviaqa': 'TriviaQA, 0-shot exact match (%)',
  'bigbench_lite': 'BIG-bench-Lite, 3-shot, mean normalised score',
  'leaderboard_average': 'Open LLM leaderboard, mean of six (%)',
  'mmlu': 'MMLU, 5-shot accuracy (%)',
  'gsm8k': 'GSM8K, 5-shot accuracy (%)',
  'humaneval': 'HumanEval, pass@1 (%)',
  'mt_bench': 'MT-Bench, mean of two turns (of 10)',
}
_OF_GROUP = {'bigbench_lite': 'average', 'leaderboard_average': 'average'}


def read_summary(directory: str) -> tuple[str, list[results.Row]]:
  """(name of the model, rows) of the summary.json of an evaluation.

  Raises:
    ConfigError: there is none, or it is damaged.
  """
  path = pathlib.Path(directory) / 'summary.json'
  remedy = 'run scripts.evaluate again'
  try:
    facts, where = safe_json.read(path), str(path)
    model = safe_json.field(facts, 'model', dict, where)
    name = safe_json.field(model, 'name', str, f'{where}: model')
    rows = safe_json.field(facts, 'rows', list, where)
  except FileNotFoundError as error:
    raise ConfigError(f'{path} is not there; scripts.evaluate writes it at its end.') from error
  except (OSError, Unreadable) as error:
    raise ConfigError(f'{path} is damaged ({error}); {remedy}.') from error
  return name, [fields.read(results.Row, row, f'{path}: rows', remedy) for row in rows]


def evaluated_score(directory: str, benchmark: str) -> float:
  """A benchmark's score in an evaluation: normalised for the average, else 100 times the metric."""
  rows = {row.group: row for row in read_summary(directory)[1]}
  name = _OF_GROUP.get(benchmark, benchmark)
  if name not in rows:
    raise ConfigError(f'{directory} has no {name!r}, only {sorted(rows)}; evaluate it there.')
  return rows[name].normalised if name == 'average' else 100 * rows[name].score


def parse_point(text: str, benchmark: str) -> figures.Point:
  """FAMILY:LABEL:ACTIVATED:TOTAL:TOKENS:SCORE, where the score may be a directory.

  Raises:
    ConfigError: it has other parts.
  """
  parts = text.split(':', 5)
  try:
    family, label, *numbers, score = parts
    activated, total, tokens = map(float, numbers)
  except ValueError as error:
    raise ConfigError(
      f'--add {text!r} must be FAMILY:LABEL:ACTIVATED:TOTAL:TOKENS:SCORE, sizes and tokens in '
      'billions, the score a number or the directory of an evaluation.'
    ) from error
  if pathlib.Path(score).is_dir():
    value, source = evaluated_score(score, benchmark), score
  else:
    try:
      value, source = float(score), 'command line'
    except ValueError as error:
      raise ConfigError(f'--add: {score!r} is neither a number nor a directory.') from error
  return figures.Point(family, label, activated, total, tokens, value, source, ours=True)


def short_names(directories: Sequence[str]) -> dict[str, str]:
  """Directories by the shortest ends of their names that tell them apart."""
  parts = [pathlib.Path(d).resolve().parts for d in directories]
  for length in range(1, max(map(len, parts)) + 1):
    names = ['/'.join(part[-length:]) for part in parts]
    if len(set(names)) == len(names):
      return dict(zip(names, directories, strict=True))
  raise ConfigError(f'{list(directories)}: the same directory is given twice.')
