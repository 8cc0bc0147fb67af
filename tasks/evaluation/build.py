"""What benchmarks share: few-shot prompts from a training split, and counting a ranked choice."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

from openmoe.config import ConfigError
from openmoe.evaluation.items import EvaluationTask, Item, Prediction, Prompt
from tasks.records import Record

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
  if not 0 <= shots <= len(pool):
    asked = getattr(records[0], 'where', 'the first item') if records else 'no item'
    raise ConfigError(
      f'{shots} shots cannot be drawn from {len(pool)} examples for {asked}; ask for fewer.'
    )
  rng = random.Random(SHOT_SEED)
  order = list(range(len(records)))
  rng.shuffle(order)
  prompts: list[Any] = [None] * len(records)
  for index in order:
    drawn = tuple(solved(record) for record in rng.sample(pool, shots)) if shots else ()
    prompts[index] = Prompt(question(records[index]), drawn, prefix, separator='\n\n')
  return prompts


def ranked(item: Item, prediction: Prediction, mode: str = FIXED) -> dict[str, float]:
  """Credit of the choice that ranks first, by three readings of its log-probability.

  acc: the sum over tokens; acc_norm: per character of the choice without the space before it;
  acc_token: per token, as seqio's rank_classification. Choices that rank equally first, as those do
  that the tokenizer cannot tell apart, share the credit; in reference mode the first one wins.
  """
  sums = prediction.log_probs
  readings = {
    'acc': sums,
    'acc_norm': [s / max(1, len(c.strip())) for s, c in zip(sums, item.choices, strict=True)],
    'acc_token': [s / max(1, n) for s, n in zip(sums, prediction.lengths, strict=True)],
  }
  found = {}
  for name, values in readings.items():
    best = max(values)
    credit = [score for score, value in zip(item.scores, values, strict=True) if value == best]
    found[name] = credit[0] if mode == REFERENCE else sum(credit) / len(credit)
  return found


def choice_item(
  name: str,
  prompt: Prompt,
  choices: Sequence[str],
  right: int,
  prompts: Sequence[Prompt] = (),
) -> Item:
  """An item with one right choice; one that reads the same, prompt and all, is right as well.

  Args:
    name: of the item.
    prompt: what is asked.
    choices: what may follow.
    right: index of the right choice, not negative.
    prompts: one for each choice, if they differ.
  """
  if not 0 <= right < len(choices):
    raise ConfigError(f'item {name}: choice {right} is not one of {list(choices)}.')
  asked = list(zip(prompts or [prompt] * len(choices), choices, strict=True))
  scores = tuple(float(pair == asked[right]) for pair in asked)
  return Item(name, prompt, tuple(choices), scores, (choices[right],), tuple(prompts))


def ranking_task(
  name: str, metric: str, low: float, mode: str = FIXED, **options: Any
) -> EvaluationTask:
  """A task whose choices are ranked; metric is one of ranked()."""
  measure = functools.partial(ranked, mode=mode)
  return EvaluationTask(name=name, group=name, metric=metric, measure=measure, low=low, **options)
