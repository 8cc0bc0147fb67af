"""Prompts of BIG-bench tasks, with the draws of BIG-bench's own code.

An example reads: input prefix, input, the choices (shuffled, each after the choice prefix), output
prefix. Few-shot prompts put solved examples before it. Every string, draw and quirk is that of
bigbench 1.0.0 (api/json_task.py, bbseqio/bigbench_bridge.py); only the search for the examples that
may serve as shots is another one: there, every query was compared with every example.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from openmoe.config import ConfigError
from openmoe.evaluation.items import ASCII_WHITESPACE, Item, Prompt
from tasks.bigbench.files import Leaf

# The order of choices is drawn with this one, whatever seed draws the shots.
CHOICE_SEED = 42
SHOT_SEED = 42


@functools.cache
def choice_order(count: int) -> tuple[int, ...]:
  """Positions in sorted order, as shown: drawn anew for every example, so alike for all."""
  return tuple(np.random.RandomState(CHOICE_SEED).permutation(count).tolist())


def shown_choices(leaf: Leaf, example: Mapping[str, Any]) -> list[str]:
  """The choices as the prompt lists them; [] if it does not.

  The setting is taken by truth value: the text "false" of logic_grid_puzzle shows the choices.
  """
  if 'target_scores' not in example or not leaf.data.get('append_choices_to_input', True):
    return []
  ordered = sorted(example['target_scores'])
  return [ordered[i] for i in choice_order(len(ordered))]


def targets(example: Mapping[str, Any]) -> list[str]:
  """Its answers; without any, the first choice of those with the top score."""
  if 'target' in example:
    found = example['target']
    return found if isinstance(found, list) else [found]
  scores = example['target_scores']
  best = max(scores.values())
  return [next(choice for choice, score in scores.items() if score == best)]


def question(leaf: Leaf, example: Mapping[str, Any]) -> str:
  """The text of one example up to where its answer begins."""
  get = leaf.data.get
  choice_prefix = get('choice_prefix', '\n  choice: ')
  choices = ''.join(choice_prefix + choice for choice in shown_choices(leaf, example))
  before, after = get('example_input_prefix', '\nQ: '), get('example_output_prefix', '\nA: ')
  return before + example['input'] + choices + after


def _frozen(value: Any) -> Any:
  """Equal exactly when BIG-bench finds two examples equal: order of keys counts, 1 equals 1.0."""
  if isinstance(value, Mapping):
    return ('object', *((key, _frozen(item)) for key, item in value.items()))
  if isinstance(value, list):
    return ('list', *map(_frozen, value))
  return value


def _identity(leaf: Leaf, example: Mapping[str, Any]) -> Any:
  """The example as it is after formatting, for comparison; see _frozen."""
  formatted = {**example, 'input': question(leaf, example), 'target': targets(example)}
  return _frozen(formatted)


def draw_shots(
  identities: Sequence[Any], targets: Sequence[Sequence[str]], shots: int, seed: int
) -> list[tuple[int, list[tuple[int, str]]]]:
  """Which examples are asked, in which order, and what stands before each.

  The same numbers are drawn from the same generator as by comparing each query with all N
  examples, which is N**2 comparisons of whole examples: a query's equals are looked up instead, and
  the positions that are left are counted past them. What remains is the drawing itself, which
  shuffles N positions for each query.

  Args:
    identities: hashable, one per example; equal ones may not be shots of each other.
    targets: the answers of each example; of a shot, one is drawn.
    shots: at least 1.
    seed: of the generator.

  Returns:
    For each query its index, and (index, answer) of each shot.
  """
  count = len(identities)
  if count < shots + 1:
    raise ConfigError(
      f'{count} examples are too few for {shots} shots; ask for {count - 1} at most.'
    )
  rng = np.random.RandomState(seed)
  places = collections.defaultdict(list)
  for index, identity in enumerate(identities):
    places[identity].append(index)
  drawn = []
  for query in rng.permutation(count).tolist():
    equals = places[identities[query]]
    left = count - len(equals)
    if left < shots:
      raise ConfigError(f'{count} examples, of which {left} differ from one, allow {left} shots.')
    chosen = []
    for position in rng.permutation(left)[:shots].tolist():
      for equal in equals:
        position += position >= equal
      chosen.append(position)
    answers = [targets[i][rng.choice(len(targets[i]))] for i in chosen]
    drawn.append((query, list(zip(chosen, answers, strict=True))))
  return drawn


def _strip(text: str) -> str:
  return text.strip(ASCII_WHITESPACE)


def make_items(leaf: Leaf, shots: int, kind: str, seed: int = SHOT_SEED) -> list[Item]:
  """All examples of a leaf as items, in BIG-bench's order.

  Without shots that is the order of the file; with shots, a permutation.

  Args:
    leaf: a task or subtask.
    shots: solved examples before the question.
    kind: 'mul' for choices to rank, 'gen' for text to generate.
    seed: draws shots and order; not the order of choices.

  Returns:
    Items; inputs, choices and answers without white space at their ends.

  Raises:
    ConfigError: the leaf is not of that kind, or has too few examples.
  """
  if kind not in leaf.types:
    raise ConfigError(f'{leaf.task} {leaf.subtask} has types {leaf.types}, not {kind!r}.')
  questions = [question(leaf, example) for example in leaf.examples]
  answers = [targets(example) for example in leaf.examples]
  if shots:
    identities = [_identity(leaf, example) for example in leaf.examples]
    drawn = draw_shots(identities, answers, shots, seed)
  else:
    drawn = [(query, []) for query in range(len(questions))]
  prefix = str(leaf.data.get('task_prefix', ''))
  separator = leaf.data.get('few_shot_example_separator', '\n')
  items = []
  for query, chosen in drawn:
    solved = tuple(questions[i] + answer for i, answer in chosen)
    scores = leaf.examples[query]['target_scores'] if kind == 'mul' else {}
    items.append(
      Item(
        name=str(query),
        prompt=Prompt(questions[query], solved, prefix, separator, strip=True),
        choices=tuple(_strip(choice) for choice in scores),
        scores=tuple(map(float, scores.values())),
        answers=tuple(map(_strip, answers[query])),
        extra={'shown': shown_choices(leaf, leaf.examples[query])},
      )
    )
  return items
