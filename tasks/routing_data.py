"""Texts whose routing is recorded: files, conversations, seqio tasks; each with its labels."""

from __future__ import annotations

import dataclasses
import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from openmoe.config import ConfigError
from openmoe.data import documents
from tasks import records
from tasks.evaluation import fields, mt_bench

LABELS = ('source', 'domain', 'language')
_PIECE = 1 << 20  # bytes of a .txt file that are one document
_NUMBERS = re.compile(r'([-_.]?(train|validation|test|part|\d+|of))+$')


@dataclasses.dataclass(frozen=True)
class Text:
  """A document that is not tokenised yet.

  Attributes:
    name: file and line.
    content: text, messages of a conversation, or token ids.
    labels: of LABELS.
  """

  name: str
  content: str | list[dict[str, str]] | list[int]
  labels: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Fields:
  """Which fields of a record are what; a dot goes into an object: meta.redpajama_set_name."""

  text: str = 'text'
  source: str = 'source'
  domain: str = 'domain'
  language: str = 'language'


def file_names(patterns: Sequence[str]) -> list[str]:
  """Files that match patterns.

  Raises:
    ConfigError: none does.
  """
  found = sorted({name for pattern in patterns for name in glob.glob(pattern, recursive=True)})
  if not found:
    raise ConfigError(f'No file matches {list(patterns)}; check --data.')
  return found


def source_of(path: str) -> str:
  """What a file is a part of: its name without numbers and endings.

  >>> source_of('/data/code-train-00000-of-00004.jsonl.gz')
  'code'
  """
  stem = os.path.basename(path).split('.')[0]
  return _NUMBERS.sub('', stem) or stem


def _inner(record: Mapping[str, Any], name: str) -> Any:
  value: Any = record
  for part in name.split('.'):
    value = value.get(part) if isinstance(value, Mapping) else None
  return value


def of_files(patterns: Sequence[str], names: Fields = Fields()) -> Iterator[Text]:
  """Documents of .txt, .jsonl, .json, .csv and .parquet files, in order of names.

  A record with `messages` in place of a text is a conversation.

  Raises:
    ConfigError: nothing matches, or a record has neither; naming file and line.
  """
  for path in file_names(patterns):
    source = source_of(path)
    if documents_are_text(path):
      for i, raw in enumerate(documents.raw_records(path, _PIECE, '')):
        text = documents.parse(path, i, raw, '').decode()
        yield Text(f'{path}:{i + 1}', text, {'source': source})
      continue
    for record in records.read(path):
      content = _inner(record, names.text)
      if not isinstance(content, str):
        content = record.get('messages')
      if not isinstance(content, str | list) or not content:
        raise ConfigError(
          f'{record.where} has neither a text in {names.text!r} nor messages; give --text_field.'
        )
      labels = {label: _inner(record, getattr(names, label)) for label in LABELS}
      labels = {label: str(value) for label, value in labels.items() if value not in (None, '')}
      yield Text(record.where, content, {'source': source} | labels)


def documents_are_text(path: str) -> bool:
  """Whether a file is plain text."""
  return re.search(r'\.txt(\.gz|\.zst)?$', path) is not None


def of_mt_bench(questions: str, answers: str | None) -> Iterator[Text]:
  """Conversations of MT-Bench with their history; the category is the domain.

  Args:
    questions, answers: files in FastChat's format; without answers, the questions alone.
  """
  told = {}
  if answers is not None:
    told = {
      one['question_id']: one['choices'][0]['turns'] for one in mt_bench.read_answers(answers)
    }
  for question in mt_bench.read_questions(questions):
    number, users = question['question_id'], question['turns']
    replies = told.get(number, [])
    if answers is not None and len(replies) < len(users):
      raise fields.refuse(question, f'question {number!r} has no answer to each of its turns.')
    messages = []
    for i, user in enumerate(users):
      messages.append({'role': 'user', 'content': user})
      messages += [{'role': 'assistant', 'content': replies[i]}] if replies else []
    yield Text(question.where, messages, {'source': 'mt_bench', 'domain': question['category']})


def of_task(name: str, split: str, vocabulary: Any) -> Iterator[Text]:
  """Examples of a seqio task or mixture as token ids, inputs and targets one behind the other.

  The task is the source label; tasks of a mixture come one after the other.

  Args:
    vocabulary: of the model, whose ids must be those of the task.

  Raises:
    ConfigError: there is no such task, or it has another vocabulary.
  """
  import seqio

  try:
    tasks = seqio.get_subtasks(seqio.get_mixture_or_task(name))
  except ValueError as error:
    raise ConfigError(
      f'{name} is no task or mixture ({error}); name one, or give --data.'
    ) from error
  for task in tasks:
    probe = 'The quick brown fox.\n\n  x = 1'
    own = list(map(int, task.output_features['targets'].vocabulary.encode(probe)))
    if own != list(map(int, vocabulary.encode(probe))):
      raise ConfigError(f'{task.name} has another vocabulary than the model; record its texts.')
    dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False)
    for i, example in enumerate(dataset.as_numpy_iterator()):
      parts = [example[key] for key in ('inputs', 'targets') if key in example]
      ids = [int(token) for part in parts for token in part]
      yield Text(f'{task.name}:{i + 1}', ids, {'source': task.name})
