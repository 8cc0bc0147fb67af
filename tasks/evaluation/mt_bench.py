"""MT-Bench answers in FastChat's format, for its judge.

Two turns a question; the answer file has one JSON object a line: question_id, answer_id, model_id,
choices [{index, turns}], tstamp. Temperatures by category are FastChat's. Judging is FastChat's
`gen_judgment`, which takes the file as it is.

Columns of the questions: question_id, category, turns (a list; a text alone is one turn).
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from openmoe.config import ConfigError
from openmoe.data import files
from tasks import records
from tasks.evaluation import fields
from tasks.records import Record

TEMPERATURES = {
  'writing': 0.7,
  'roleplay': 0.7,
  'extraction': 0.0,
  'math': 0.0,
  'coding': 0.0,
  'reasoning': 0.0,
  'stem': 0.1,
  'humanities': 0.1,
}
OTHER_TEMPERATURE = 0.7
MAX_NEW_TOKENS = 1024
# What OpenMoE's page gives. Its published scores were made with the longer system text of Llama 2.
OPENMOE_SYSTEM = 'You are a helpful, respectful and honest assistant.'

CHAT, REFERENCE = 'chat', 'openmoe_reference'
CONVERSATIONS = (CHAT, REFERENCE)


def read_questions(path: str | os.PathLike) -> list[Record]:
  """The questions of a file, whose `turns` are lists of texts.

  Raises:
    ConfigError: a record has no id or no turns, or an id is there twice; naming the record.
  """
  found, seen = [], {}
  for record in records.read(path):
    number = fields.get(record, 'question_id')
    if isinstance(number, bool) or not isinstance(number, int | str):
      raise fields.refuse(
        record, f"'question_id' is {fields.shown(number)}, not a number or a text."
      )
    if number in seen:
      raise fields.refuse(record, f"'question_id' {number!r} is that of {seen[number]} as well.")
    seen[number] = record.where
    found.append(Record({**record, 'turns': _turns(record)}, record.where))
  return found


def _turns(record: Record) -> list[str]:
  given = fields.structure(fields.get(record, 'turns'))
  turns = fields.texts(record, [given] if isinstance(given, str) else given, 'turns', least=1)
  if not all(turn.strip() for turn in turns):
    raise fields.refuse(record, f"'turns' has an empty one ({fields.shown(turns)}).")
  return turns


def openmoe_reference(users: Sequence[str], replies: Sequence[str], system: str) -> str:
  """OpenMoE's as the published answers were made: no space before the first question."""
  text = f'<<SYS>>\n{system}\n<</SYS>>\n\n<s>[INST]{users[0]} [/INST]'
  for reply, user in zip(replies, users[1:], strict=True):
    text += f' {reply} </s><s>[INST] {user} [/INST]'
  return text


def messages(users: Sequence[str], replies: Sequence[str], system: str) -> list[dict[str, str]]:
  """The conversation so far as chat templates take it."""
  found = [{'role': 'system', 'content': system}] if system else []
  for user, reply in zip(users, [*replies, None], strict=True):
    found.append({'role': 'user', 'content': user})
    if reply is not None:
      found.append({'role': 'assistant', 'content': reply})
  return found


def _prompt(
  model: Any, users: Sequence[str], replies: Sequence[str], system: str | None, conversation: str
) -> tuple[Sequence[int], Sequence[str]]:
  """(token ids, stop strings) of the next turn."""
  encode, template = model.vocabulary.encode, model.chat_template
  if system is None:
    system = OPENMOE_SYSTEM if template.name == 'openmoe' else ''
  if conversation == REFERENCE:
    return encode(openmoe_reference(users, replies, system)), ('</s>',)
  text = template.text(messages(users, replies, system))
  return template.encode(text, encode, model.vocabulary.eos_id), template.stop


def answer(
  model: Any,
  questions: Sequence[Record],
  sampling: Callable[[float], Any],
  conversation: str = CHAT,
  system: str | None = None,
  seed: int = 0,
) -> Iterator[Mapping[str, Any]]:
  """Answers questions one by one, turn after turn.

  Args:
    model: an openmoe.inference.model.LanguageModel.
    questions: as read_questions gives them.
    sampling: makes the model's sampling settings from a temperature.
    conversation: 'chat' for the model's own template, or 'openmoe_reference'.
    system: system text; None for that of the model's page.
    seed: of draws.

  Yields:
    Answers without time stamp.

  Raises:
    ConfigError: a question leaves no room for an answer.
  """
  for question in questions:
    users, replies = _turns(question), []
    heat = TEMPERATURES.get(str(question.get('category')), OTHER_TEMPERATURE)
    for turn in range(len(users)):
      ids, stop = _prompt(model, users[: turn + 1], replies, system, conversation)
      # The published run lowered the length of an answer where prompt and answer would not fit.
      room = min(MAX_NEW_TOKENS, model.max_length - 1 - len(ids))
      if room < 1:
        raise ConfigError(
          f'question {question["question_id"]} turn {turn + 1} has {len(ids)} tokens; the model '
          f'takes {model.max_length} with the answer. Leave it out of the questions.'
        )
      found = model.generate([ids], room, stop=stop, sampling=sampling(heat), seed=seed)
      replies.append(found[0][0].text.strip())
    yield {
      'question_id': question['question_id'],
      'choices': [{'index': 0, 'turns': replies}],
    }


def read_answers(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Answers of an earlier run; [] if there is no file."""
  if not pathlib.Path(path).exists():
    return []
  found = []
  for where, answer in files.json_lines(path):
    number = answer.get('question_id') if isinstance(answer, dict) else None
    if not isinstance(number, int | str) or 'choices' not in answer:
      raise ConfigError(f'{where} is no answer of MT-Bench; move the file away.')
    found.append(answer)
  return found


def write_answers(path: str | os.PathLike, answers: Sequence[Mapping[str, Any]]) -> None:
  """The whole file, in one rename."""
  path = pathlib.Path(path)
  partial = path.with_name(f'{path.name}.partial')
  path.parent.mkdir(parents=True, exist_ok=True)
  text = ''.join(json.dumps(a, ensure_ascii=False) + '\n' for a in answers)
  partial.write_text(text, encoding='utf-8')
  partial.replace(path)


def stamped(answer: Mapping[str, Any], model_id: str) -> dict[str, Any]:
  """With what FastChat's files have besides; the same answer has the same id."""
  text = json.dumps([model_id, answer], ensure_ascii=False)
  return {
    'question_id': answer['question_id'],
    'answer_id': hashlib.sha256(text.encode()).hexdigest()[:22],
    'model_id': model_id,
    'choices': answer['choices'],
    'tstamp': time.time(),
  }
