"""Synthetic BIG-bench tasks with every quirk, and the original's quadratic sampling in short."""

from __future__ import annotations

import collections
import copy
import json
import pathlib
from typing import Any

import numpy as np


def multiple_choice(count: int, **settings: Any) -> dict[str, Any]:
  """Choices whose order in the file is neither sorted nor shuffled; some with spaces at the end."""
  examples = [
    {'input': f'Which is {i}? ', 'target_scores': {f' z{i}\n': 0, f'a{i}': 1, f'm{i}': 0}}
    for i in range(count)
  ]
  return _task(examples, ['multiple_choice_grade'], 'multiple_choice_grade', settings)


def generative(count: int, **settings: Any) -> dict[str, Any]:
  examples = [
    {'input': f'op {i}', 'target': [str(i), f' {i}. '] if i % 3 else f'{i}'} for i in range(count)
  ]
  return _task(examples, ['exact_str_match', 'rouge'], 'exact_str_match', settings)


def _task(examples, metrics, preferred, settings) -> dict[str, Any]:
  task = {'name': 'made_up', 'metrics': metrics, 'preferred_score': preferred}
  return {**task, **settings, 'examples': examples}


def write(directory: pathlib.Path, name: str, task: Any) -> pathlib.Path:
  path = directory / name / 'task.json'
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(task if isinstance(task, str) else json.dumps(task, ensure_ascii=False))
  return path


def naive_inputs(task: dict[str, Any], shots: int, seed: int = 42) -> list[str]:
  """Prompts by comparing every query with every example, stripped."""
  get, examples, seen = task.get, [], set()
  for example in task['examples']:
    if json.dumps(example) in seen:
      continue
    seen.add(json.dumps(example))
    example = collections.OrderedDict(copy.deepcopy(example))
    if 'target_scores' in example:
      scores = example['target_scores'] = collections.OrderedDict(example['target_scores'])
      shown = np.random.RandomState(42).permutation(sorted(scores))
      if get('append_choices_to_input', True):
        between = get('choice_prefix', '\n  choice: ')
        example['input'] += between + between.join(shown)
      if 'target' not in example:
        example['target'] = max(scores, key=scores.get)
    before, after = get('example_input_prefix', '\nQ: '), get('example_output_prefix', '\nA: ')
    example['input'] = before + example['input'] + after
    if not isinstance(example['target'], list):
      example['target'] = [example['target']]
    examples.append(example)
  separator, prefix = get('few_shot_example_separator', '\n'), get('task_prefix', '')
  texts = [example['input'] for example in examples]
  if shots:
    rng, texts = np.random.RandomState(seed), []
    for query in rng.choice(examples, len(examples), replace=False):
      others = [x for x in examples if x != query]
      chosen = list(rng.choice(others, shots, replace=False))
      context = separator.join([x['input'] + rng.choice(x['target']) for x in chosen])
      texts.append(context + separator + query['input'])
  return [(prefix + text).strip(' \t\n\v\f\r') for text in texts]
