"""Examples one by one, as inference wants them: a seqio task's, or the lines of a .jsonl file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from openmoe.config import ConfigError
from openmoe.data import files
from openmoe.data.shard import find_provider

# (what is told of it, ids of the inputs, ids of the targets)
Example = tuple[dict[str, Any], list[int], list[int]]
Encode = Callable[[str], Sequence[int]]

JSONL = ('.jsonl', '.jsonl.gz', '.jsonl.zst')
_INPUTS = ('inputs', 'prompt', 'text')  # fields of a line that hold the inputs
# Texts whose ids tell vocabularies apart.
_PROBES = ('The quick brown fox.\n\n  x = 1', 'Ünïcödé 漢字')


def of_jsonl(path: str, encode: Encode, inputs_length: int | None = None) -> Iterator[Example]:
  """Lines with `inputs` (or `prompt`, or `text`) and, to be scored, `targets`.

  Args:
    encode: text to ids.
    inputs_length: most tokens of the inputs, whose beginning is cut; None for no such limit.

  Raises:
    ConfigError: a line is none; with file and line.
  """
  for where, line in files.json_lines(path):
    if not isinstance(line, dict):
      raise files.DamagedFile(f'{where}: a {type(line).__name__}, not a JSON object.')
    name = next((n for n in _INPUTS if n in line), None)
    texts = {key: line.get(key) for key in (name, 'targets') if key in line}
    if not texts or not all(isinstance(text, str) for text in texts.values()):
      raise ConfigError(
        f'{where} has no text under {", ".join(_INPUTS)} or targets, but {sorted(line)}; write '
        '{"inputs": "..."}, with "targets" where they are scored.'
      )
    record = {key: files.without_surrogates(text) for key, text in texts.items()}
    ids = [list(map(int, encode(record.get(key, '')))) for key in (name, 'targets')]
    yield record, ids[0][-inputs_length:] if inputs_length else ids[0], ids[1]


def of_task(
  name: str,
  split: str,
  encode: Encode,
  inputs_length: int | None = None,
  targets_length: int | None = None,
) -> Iterator[Example]:
  """Examples of a registered task or mixture, in its order, unshuffled.

  Args:
    encode: the model's text to ids, which the task's vocabulary must agree with.
    inputs_length, targets_length: as the task's own preprocessors trim; None for what it gives.

  Raises:
    ConfigError: there is no such task, split or data, or its vocabulary is another.
  """
  provider = find_provider(name)
  features = provider.output_features
  vocabulary = features['targets'].vocabulary
  for text in _PROBES:
    if list(map(int, vocabulary.encode(text))) != list(map(int, encode(text))):
      raise ConfigError(
        f'{name} is tokenised with another vocabulary than the model: give the task the vocabulary '
        'of the checkpoint, or a .jsonl file of texts.'
      )
  if split not in provider.splits:
    raise ConfigError(f'{name} has no split {split!r}, only {sorted(provider.splits)}.')
  lengths = {'inputs': inputs_length, 'targets': targets_length}
  given = {key: value for key, value in lengths.items() if value and key in features}
  dataset = provider.get_dataset(given or None, split=split, shuffle=False, seed=42, num_epochs=1)
  for example in dataset.as_numpy_iterator():
    ids = lambda key, example=example: [int(i) for i in example.get(key, ())]
    yield {k: _plain(v) for k, v in example.items()}, ids('inputs'), ids('targets')


def _plain(value: Any) -> Any:
  """A feature as JSON has it."""
  if isinstance(value, bytes):
    return value.decode('utf-8', 'replace')
  if isinstance(value, np.ndarray) and value.dtype == object:
    return [_plain(x) for x in value.tolist()]
  return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def open_examples(
  source: str,
  split: str,
  encode: Encode,
  inputs_length: int | None = None,
  targets_length: int | None = None,
) -> Iterator[Example]:
  """of_jsonl for the name of such a file, else of_task."""
  if source.endswith(JSONL):
    return of_jsonl(source, encode, inputs_length)
  return of_task(source, split, encode, inputs_length, targets_length)
