"""Our figures as metrics of seqio tasks, so that seqio.Evaluator and t5x's eval.py compute them.

Rows of such a task have `idx`, [item, choice]. The postprocessor makes it the target, so a metric
knows what each prediction or score is about, whatever part of the rows an evaluator takes.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio

from openmoe.config import ConfigError
from openmoe.evaluation.items import EvaluationTask, Item, Prediction

Index = tuple[int, int]


def index_of(output: Any, example: Mapping[str, Any], is_target: bool = False) -> Any:
  """postprocess_fn of the tasks: the target is the row's place, a prediction its text."""
  return tuple(int(i) for i in example['idx']) if is_target else output


def metric(make: Callable[[], EvaluationTask], ranks: bool, vocabulary: seqio.Vocabulary):
  """A metric function of seqio for a task.

  Args:
    make: the task; called when there is something to measure.
    ranks: whether choices are scored, or texts generated. seqio tells the two apart by the name of
      the function's second argument.
    vocabulary: tells how many tokens a choice has.
  """
  task = functools.cache(make)

  def of_texts(targets: Sequence[Index], predictions: Sequence[str]) -> dict[str, float]:
    texts = collections.defaultdict(list)
    for (item, _), text in zip(targets, predictions, strict=True):
      texts[item].append(str(text))
    return _figures(task(), {i: Prediction(texts=tuple(t)) for i, t in texts.items()})

  def of_scores(targets: Sequence[Index], scores: Sequence[float]) -> dict[str, float]:
    found: dict[int, dict[int, float]] = collections.defaultdict(dict)
    for (item, choice), score in zip(targets, scores, strict=True):
      found[item][choice] = float(score)
    items, answered = list(task().items()), {}
    for index, sums in found.items():
      choices = items[index].choices
      if len(sums) < len(choices):
        continue  # an evaluator that takes so many rows may cut an item's choices
      answered[index] = Prediction(
        log_probs=tuple(sums[i] for i in range(len(choices))),
        lengths=tuple(len(vocabulary.encode(choice)) for choice in choices),
        greedy=(False,) * len(choices),  # scores do not tell
      )
    return _figures(task(), answered)

  return of_scores if ranks else of_texts


def _figures(task: EvaluationTask, found: Mapping[int, Prediction]) -> dict[str, float]:
  """Means of the task's figures over the items that were answered, and its whole-task figures.

  Raises:
    ConfigError: there is none.
  """
  if not found:
    raise ConfigError(f'{task.name}: no item was answered in full; give the evaluator more rows.')
  items = list(task.items())
  answered: list[tuple[Item, Prediction]] = [(items[i], found[i]) for i in sorted(found)]
  rows = [task.measure(item, prediction) for item, prediction in answered]
  figures = {name: sum(float(row[name]) for row in rows) / len(rows) for name in rows[0]}
  if task.measure_all:
    whole = task.measure_all([item for item, _ in answered], [p for _, p in answered])
    figures |= {name: float(value) for name, value in whole.items()}
  return figures
