"""What benchmarks share: few-shot prompts from a training split, and counting a ranked choice."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from openmoe.config import ConfigError
from openmoe.evaluation.items import EvaluationTask, Item, Prediction, Prompt
from tasks.evaluation.records import Record

SHOT_SEED = 42
REFERENCE, FIXED = 'reference', 'fixed'


def few_shot(
  records: Sequence[Record],
  pool: Sequence[Record],
  shots: int,
  question: Callable[[Record], str],
  solved: Callable[[Record], str],
  prefix: str = '',
) -> list[Prompt]:
  """A prompt for each record, with other shots for each.

  One generator, seeded with 42, first shuffles the records and then draws every record's shots in
  that order; so a record's shots depend on how many records there are, and on nothing else.

  Raises:
    ConfigError: the pool has fewer records than shots.
  """
  if len(pool) < shots:
    raise ConfigError(f'{shots} shots cannot be drawn from {len(pool)} examples; ask for fewer.')
  rng = random.Random(SHOT_SEED)
  order = list(range(len(records)))
  rng.shuffle(order)
  prompts: list[Any] = [None] * len(records)
  for index in order:
    drawn = tuple(solved(record) for record in rng.sample(pool, shots)) if shots else ()
    prompts[index] = Prompt(question(records[index]), drawn, prefix, separator='\n\n')
  return prompts


def ranked(item: Item, prediction: Prediction) -> dict[str, float]:
  """Credit of the choice that ranks first, by three readings of its log-probability.

  acc: the sum over tokens; acc_norm: per character of the choice without the space before it;
  acc_token: per token, as seqio's rank_classification.
  """
  sums = prediction.log_probs
  readings = {
    'acc': sums,
    'acc_norm': [s / max(1, len(c.strip())) for s, c in zip(sums, item.choices, strict=True)],
    'acc_token': [s / max(1, n) for s, n in zip(sums, prediction.lengths, strict=True)],
  }
  return {name: item.scores[max(range(len(v)), key=v.__getitem__)] for name, v in readings.items()}


def choice_item(name: str, prompt: Prompt, choices: Sequence[str], right: int) -> Item:
  """An item with one right choice."""
  scores = tuple(float(i == right) for i in range(len(choices)))
  if sum(scores) != 1:
    raise ConfigError(f'item {name}: choice {right} is not one of {list(choices)}.')
  return Item(name, prompt, tuple(choices), scores, (choices[right],))


def ranking_task(name: str, metric: str, low: float, **options: Any) -> EvaluationTask:
  """A task whose choices are ranked; metric is one of ranked()."""
  return EvaluationTask(name=name, group=name, metric=metric, measure=ranked, low=low, **options)
