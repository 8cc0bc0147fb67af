"""The task files of BIG-bench-Lite: where they are, whether they are whole, what they say.

A folder <task>/task.json holds examples, or has one folder per subtask. Nothing else of that
package is needed: which metrics a task has follows from its file.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from openmoe.config import ConfigError
from openmoe.data.files import DamagedFile, parse_json, read_text
from tasks.records import whole_text

DEFAULT_DIR = 'runs/bigbench_lite'

# The list bigbench_lite_v1.
TASKS = (
  'auto_debugging',
  'bbq_lite_json',
  'code_line_description',
  'conceptual_combinations',
  'conlang_translation',
  'emoji_movie',
  'formal_fallacies_syllogisms_negation',
  'hindu_knowledge',
  'known_unknowns',
  'language_identification',
  'linguistics_puzzles',
  'logic_grid_puzzle',
  'logical_deduction',
  'misconceptions_russian',
  'novel_concepts',
  'operators',
  'parsinlu_reading_comprehension',
  'play_dialog_same_or_different',
  'repeat_copy_logic',
  'strange_stories',
  'strategyqa',
  'symbol_interpretation',
  'vitaminc_fact_verification',
  'winowhy',
)
# Of all task.json files in the 24 folders of bigbench 1.0.0; see digest().
DIGEST = '0b873f22c5b675a8461c8d6175fcca03d5774bd6ceaf5b38799d46eb48a64cd1'

GENERATIVE = frozenset({'bleu', 'exact_str_match', 'rouge'})
MULTIPLE_CHOICE = frozenset({'multiple_choice_grade'})
# metric: (lowest, highest). The lowest multiple_choice_grade is that of guessing: see Leaf.low.
_RANGES = {
  'exact_str_match': (0.0, 1.0),
  'multiple_choice_grade': (0.0, 1.0),
  'rougeLsum': (0.0, 100.0),
}
_MOST = 1e30  # of a score, far beyond any
_GET = 'python -m scripts.fetch_bigbench_lite'


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A task without subtasks, or one subtask.

  Attributes:
    task: name of the task, as its folder.
    subtask: name of the subtask as seqio sees it, '' if there is none. It comes from the file and
      may differ from the folder: pp_english_from lies in postpositive_english_from.
    data: the JSON of the file, objects in the order they are written in.
    examples: data['examples'] without exact repetitions.
  """

  task: str
  subtask: str
  data: Mapping[str, Any]
  examples: Sequence[Mapping[str, Any]]

  @property
  def types(self) -> tuple[str, ...]:
    """What its metrics ask for of 'gen' (text is generated) and 'mul' (choices are ranked)."""
    metrics = set(self.data['metrics'])
    found = {'gen': metrics & GENERATIVE, 'mul': metrics & MULTIPLE_CHOICE}
    return tuple(name for name, wanted in found.items() if wanted)

  @property
  def metric(self) -> str:
    """The metric that tables show."""
    return self.data['preferred_score']

  @property
  def low(self) -> float:
    """Score of guessing: for multiple choice the mean over examples of the mean target score."""
    if self.metric != 'multiple_choice_grade':
      return _RANGES[self.metric][0]
    means = 0.0
    for example in self.examples:
      scores = example['target_scores'].values()
      means += sum(scores) / len(scores)
    return means / len(self.examples)

  @property
  def high(self) -> float:
    return _RANGES[self.metric][1]


def digest(directory: pathlib.Path) -> str:
  """sha256 over name and content of every task.json of the 24 folders, in order of their names."""
  total = hashlib.sha256()
  for path in sorted(p for name in TASKS for p in (directory / name).rglob('task.json')):
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    total.update(f'{path.relative_to(directory).as_posix()} {content}\n'.encode())
  return total.hexdigest()


def is_complete(directory: str | os.PathLike) -> bool:
  """Whether all 24 folders are there, with exactly the published content."""
  directory = pathlib.Path(directory)
  return all((directory / name).is_dir() for name in TASKS) and digest(directory) == DIGEST


def check_names(names: Iterable[str]) -> None:
  """Raises ConfigError at the first name that is not one of the 24, with the nearest."""
  for name in names:
    if name not in TASKS:
      near = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.4) or TASKS
      raise ConfigError(f'{name!r} is not a task of BIG-bench-Lite. Nearest: {", ".join(near)}.')


def _read(path: pathlib.Path) -> Mapping[str, Any]:
  if not path.exists():
    raise ConfigError(f'{path} is missing; `{_GET}` gets the task files.')
  try:
    text = read_text(path)
    data = parse_json(text, str(path))
    data = whole_text(data, str(path)) if '\\ud' in text.lower() else data
  except DamagedFile as error:
    raise DamagedFile(
      f'{path} is not whole JSON ({error}); delete its folder and get it again with `{_GET}`.'
    ) from error
  if not isinstance(data, dict) or not isinstance(data.get('name'), str):
    raise DamagedFile(f'{path} is no task file: it has no "name". Get it again with `{_GET}`.')
  return data


def _distinct(examples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """Without exact repetitions, each where it stood first. Order of keys counts."""
  return list({json.dumps(example): example for example in examples}.values())


_SETTINGS = (
  'task_prefix',
  'example_input_prefix',
  'example_output_prefix',
  'choice_prefix',
  'few_shot_example_separator',
  'stop_string',
  'output_regex',
)


def _is_texts(value: Any) -> bool:
  return bool(value) and isinstance(value, list) and all(isinstance(x, str) for x in value)


def _is_scores(value: Any) -> bool:
  """Whether it gives every choice a finite number."""
  good = lambda x: isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < _MOST
  return bool(value) and isinstance(value, dict) and all(map(good, value.values()))


def _wrong(data: Mapping[str, Any]) -> str | None:
  """What is not as in every task file of BIG-bench, or None."""
  for key in ('examples', 'metrics', 'preferred_score'):
    if not data.get(key):
      return f'has no {key!r}, which every task must have'
  if not _is_texts(data['metrics']) or not isinstance(data['preferred_score'], str):
    return "has 'metrics' that are no list of names, or a 'preferred_score' that is none"
  for key in _SETTINGS:
    if not isinstance(data.get(key), str | None):
      return f'has {key!r} {data[key]!r}, which must be a text'
  try:
    re.compile(data.get('output_regex') or '')
  except re.error as error:
    return f"has an 'output_regex' that is none ({error})"
  if not isinstance(data['examples'], list):
    return "has 'examples' that are no list"
  return None


def _wrong_example(example: Any, types: Sequence[str]) -> str | None:
  """What an example lacks that tasks of these types need, or None."""
  if not isinstance(example, dict):
    return 'is no object'
  wanted = {'gen': 'target', 'mul': 'target_scores'}
  missing = [key for key in ('input', *(wanted[t] for t in types)) if key not in example]
  if missing:
    return f'has no {missing}'
  if not isinstance(example['input'], str):
    return "has an 'input' that is no text"
  target = example.get('target', '')
  if not isinstance(target, str) and not _is_texts(target):
    return "has a 'target' that is neither a text nor a list of some"
  if 'target_scores' in example and not _is_scores(example['target_scores']):
    return "has 'target_scores' that are not a number for each choice"
  return None


def _leaf(task: str, subtask: str, path: pathlib.Path, data: Mapping[str, Any]) -> Leaf:
  if wrong := _wrong(data):
    raise DamagedFile(f'{path} {wrong}; get it again: `{_GET}`.')
  known = GENERATIVE | MULTIPLE_CHOICE
  if not set(data['metrics']) <= known or data['preferred_score'] not in _RANGES:
    raise ConfigError(
      f'{path} is scored by {data["metrics"]} ({data["preferred_score"]}); BIG-bench-Lite needs '
      f'only {sorted(known)} and nothing else is known here. Is this one of the 24 tasks?'
    )
  leaf = Leaf(task, subtask, data, _distinct(data['examples']))
  for index, example in enumerate(leaf.examples):
    if wrong := _wrong_example(example, leaf.types):
      raise DamagedFile(f'{path}: example {index} {wrong}; get the file again: `{_GET}`.')
  if leaf.metric in MULTIPLE_CHOICE and 'mul' not in leaf.types:
    raise DamagedFile(f'{path} is scored by {leaf.metric}, which is none of its metrics.')
  if not leaf.low < leaf.high:
    raise DamagedFile(f'{path}: every choice is right, so nothing can be scored.')
  return leaf


def _seqio_name(name: str) -> str:
  """First everything outside ASCII becomes '?', then whatever seqio refuses becomes '_'."""
  return re.sub(r'[^\w.:]', '_', name.encode('ascii', errors='replace').decode())


def load_task(directory: str | os.PathLike, name: str) -> list[Leaf]:
  """The leaves of a task, in BIG-bench's order.

  Args:
    directory: holds the folders of the tasks.
    name: of the 24.

  Raises:
    ConfigError: naming the folder or file and what is wrong with it.
  """
  check_names([name])
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise ConfigError(f'{directory} is no folder; `{_GET} --out {directory}` puts the tasks there.')
  path = directory / name / 'task.json'
  data = _read(path)
  if 'examples' in data:
    return [_leaf(name, '', path, data)]
  below = sorted(path.parent.glob('*/task.json'))
  if not below:
    raise ConfigError(f'{path} has neither examples nor subtasks; get it again with `{_GET}`.')
  leaves = []
  for path in below:
    data = _read(path)
    leaves.append(_leaf(name, _seqio_name(data['name']), path, data))
  return leaves
