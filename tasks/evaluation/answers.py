"""Benchmarks that are answered in words: TriviaQA, BoolQ, LAMBADA, GSM8K.

`reference` prompts and readings of the first three are OpenMoE's, missing line breaks included
(authors' T5 fork, t5/data/tasks.py and postprocessors.py); GSM8K's are the Open LLM leaderboard's.

Columns: triviaqa question, answer (an object with value and aliases, a list, or one text; also with
the capital letters of its authors' files); boolq passage, question, answer (or SuperGLUE's label);
lambada text (or passage); gsm8k question, answer.
"""

from __future__ import annotations

import collections
import functools
import re
import string
from collections.abc import Mapping, Sequence

from openmoe.evaluation.items import EvaluationTask, Item, Prediction, Prompt
from tasks.evaluation import build, fields, splits
from tasks.evaluation.build import FIXED, REFERENCE
from tasks.evaluation.numerals import read_number, read_reference
from tasks.records import Record

# --- TriviaQA

_PUNCTUATION = re.compile(f'[{re.escape(string.punctuation)}‘’´`_]')


def normalize_trivia(text: str) -> str:
  """TriviaQA's: lower case, punctuation to spaces, no articles, single spaces."""
  text = _PUNCTUATION.sub(' ', text.lower())
  return ' '.join(word for word in text.split() if word not in ('a', 'an', 'the'))


def _f1(answer: str, text: str) -> float:
  wanted, found = (collections.Counter(side.split()) for side in (answer, text))
  common = (wanted & found).total()
  return 2 * common / (wanted.total() + found.total()) if common else 0.0


def _key(text: str) -> str:
  """What is compared; of an answer that is all articles or signs, the words as they are."""
  return normalize_trivia(text) or ' '.join(text.lower().split())


def read_trivia(text: str) -> str:
  """Up to the first full stop, comma, backspace or line break."""
  return re.split(r'[.,\x08\n]', text, maxsplit=1)[0].strip()


def trivia_readings(text: str) -> list[str]:
  """The first line, and what comes before each of its stops.

  A stop is a full stop, comma or the like before a space or the end, so that "Dr. No", "1,000" and
  "Dr. No. He is" can all be right, as can a name that a sentence follows.
  """
  line = re.split(r'[\x08\n\r]', text.strip(), maxsplit=1)[0]
  ends = [found.start() for found in re.finditer(r'[.,;:!?](?=\s|$)', line)]
  return list(dict.fromkeys(line[:end].strip() for end in (*ends, len(line))))


def measure_trivia(item: Item, prediction: Prediction, mode: str = FIXED) -> dict[str, float]:
  """Exact match and word F1 after normalisation, of the best alias; 0 to 1.

  In reference mode of what read_trivia leaves; else of the best reading, and none is never right.
  """
  if mode == REFERENCE:
    text = normalize_trivia(read_trivia(prediction.texts[0]))
    answers = [normalize_trivia(answer) for answer in item.answers]
    return {'em': float(text in answers), 'f1': max(_f1(answer, text) for answer in answers)}
  answers = [key for key in map(_key, item.answers) if key]
  found = [key for key in map(_key, trivia_readings(prediction.texts[0])) if key]
  scores = [_f1(answer, text) for answer in answers for text in found]
  return {'em': float(any(text in answers for text in found)), 'f1': max(scores, default=0.0)}


def _trivia_answers(record: Record) -> tuple[str | None, list[str]]:
  """(value, aliases) of a record; one of them is there.

  Raises:
    DamagedFile: neither is.
  """
  given = fields.structure(fields.get(record, 'answer', 'Answer'))
  value, aliases = given, None
  if isinstance(given, Mapping):
    value, aliases = (
      next((given[name] for name in (name, name.capitalize()) if name in given), None)
      for name in ('value', 'aliases')
    )
  elif isinstance(given, list):
    value, aliases = (given[0] if given else None), given
  aliases = fields.structure(aliases)
  if isinstance(aliases, str):
    aliases = [aliases]
  known = fields.texts(record, aliases, 'aliases', least=0) if aliases is not None else []
  known = [alias for alias in known if alias.strip()]
  if fields.hidden(value):
    value = None
  if value is None and not known:
    raise fields.refuse(
      record, f"'answer' is empty ({fields.shown(given)}): this is a split without answers."
    )
  return (None if value is None else fields.as_text(record, 'answer', value)), known


def triviaqa(mode: str, shots: int | None, data_dir: str) -> EvaluationTask:
  """0-shot exact match. The reference prompt has nothing between question and 'Answer:'."""
  shots = shots or 0
  between = '' if mode == REFERENCE else '\n'
  head = 'Answer the following trivia question:\n'

  def text(record: Record) -> str:
    return f'Question: {fields.text(record, "question", "Question", empty=False)}{between}Answer:'

  def solved(record: Record) -> str:
    value, aliases = _trivia_answers(record)
    return f'{text(record)} {aliases[0] if value is None else value}'

  def items() -> list[Item]:
    asked = splits.read(data_dir, 'triviaqa', 'validation')
    pool = splits.read(data_dir, 'triviaqa', 'train') if shots else []
    prompts = build.few_shot(asked, pool, shots, text, solved, prefix=head)
    found = []
    for i, (record, prompt) in enumerate(zip(asked, prompts, strict=True)):
      value, aliases = _trivia_answers(record)
      first = () if value is None else (value,)
      # The original looks at aliases alone; a record without any would always be wrong.
      known = aliases or first if mode == REFERENCE else dict.fromkeys((*first, *aliases))
      found.append(Item(str(i), prompt, answers=tuple(known)))
    return found

  return EvaluationTask(
    'triviaqa',
    'triviaqa',
    items,
    'em',
    functools.partial(measure_trivia, mode=mode),
    shots=shots,
    max_new_tokens=32,
    stop=('\n',),
  )


# --- BoolQ

_YES, _NO = ('true', 'yes', '1', '1.0'), ('false', 'no', '0', '0.0')


def _is_yes(record: Record) -> int:
  """1 for yes and 0 for no, in the usual spellings.

  Raises:
    DamagedFile: the answer is neither, or hidden.
  """
  value = fields.get(record, 'answer', 'label')
  if fields.hidden(value):
    raise fields.refuse(
      record,
      f"'answer' is empty or -1 ({fields.shown(value)}): this is a split without answers; take one "
      'with them.',
    )
  spelt = str(value).strip().lower()
  if spelt not in _YES + _NO:
    raise fields.refuse(record, f"'answer' is {fields.shown(value)}, neither true nor false.")
  return int(spelt in _YES)


def boolq(mode: str, shots: int | None, data_dir: str) -> EvaluationTask:
  """0-shot ranking of ' no' and ' yes'; in reference mode the log-probability per token counts."""
  shots = shots or 0
  asks = '? Tell me yes or no? \n\nAnswer:' if mode == REFERENCE else '?\nAnswer:'
  before = '\n\nQuestion: ' if mode == REFERENCE else '\nQuestion: '

  def text(record: Record) -> str:
    passage, question = (fields.text(record, name) for name in ('passage', 'question'))
    return f'{passage}{before}{question}{asks}'

  choices = (' no', ' yes')
  solved = lambda record: text(record) + choices[_is_yes(record)]

  def items() -> list[Item]:
    asked = splits.read(data_dir, 'boolq', 'validation')
    pool = splits.read(data_dir, 'boolq', 'train') if shots else []
    prompts = build.few_shot(asked, pool, shots, text, solved)
    return [
      build.choice_item(str(i), prompt, choices, _is_yes(record))
      for i, (record, prompt) in enumerate(zip(asked, prompts, strict=True))
    ]

  metric = 'acc_token' if mode == REFERENCE else 'acc'
  return build.ranking_task(
    'boolq', metric, 0.5, mode, items=items, shots=shots, joint=mode != REFERENCE
  )


# --- LAMBADA


def read_word(text: str) -> str:
  """The first word of the first line, without one ; . or , at its end."""
  word = text.strip().split('\n')[0].split(' ')[0]
  return word[:-1] if word[-1:] in (';', '.', ',') and word else word


def _last_word(item: Item, prediction: Prediction) -> dict[str, float]:
  return {'acc': float(read_word(prediction.texts[0]) in item.answers)}


def _greedy_word(item: Item, prediction: Prediction) -> dict[str, float]:
  return {'acc': float(prediction.greedy[0]), 'log_prob': prediction.log_probs[0]}


def lambada(mode: str, shots: int | None, data_dir: str) -> EvaluationTask:
  """Whether the last word of a passage is what the model would write; 0-shot.

  In reference mode a text is generated and its first word compared; else the word is scored, and
  right if each of its tokens is the likeliest.
  """
  del shots

  def items() -> list[Item]:
    found = []
    for i, record in enumerate(splits.read(data_dir, 'lambada', 'test')):
      whole = fields.text(record, 'text', 'passage', empty=False).strip()
      parts = whole.rsplit(' ' if mode == REFERENCE else None, 1)
      if len(parts) < 2:
        raise fields.refuse(record, f"'text' is one word ({fields.shown(whole)}); remove it.")
      before, word = parts
      if mode == REFERENCE:
        found.append(Item(str(i), Prompt(before), answers=(word,)))
      else:
        found.append(Item(str(i), Prompt(before), (whole[len(before) :],), (1.0,), (word,)))
    return found

  if mode == REFERENCE:
    return EvaluationTask('lambada', 'lambada', items, 'acc', _last_word, max_new_tokens=16)
  return EvaluationTask('lambada', 'lambada', items, 'acc', _greedy_word, joint=True)


# --- GSM8K


def gsm8k(mode: str, shots: int | None, data_dir: str) -> EvaluationTask:
  """5-shot accuracy of the final number; in reference mode it has to follow '####'."""
  shots = 5 if shots is None else shots
  text = lambda record: f'Question: {fields.text(record, "question", empty=False)}\nAnswer:'
  solved = lambda record: f'{text(record)} {fields.text(record, "answer", empty=False)}'

  def answer(record: Record) -> str:
    found = fields.text(record, 'answer')
    if not found.strip():
      raise fields.refuse(record, "'answer' is empty: this is a split without answers.")
    if read_reference(found) is None:
      raise fields.refuse(
        record, f"'answer' has no number after '####' and is none ({fields.shown(found)})."
      )
    return found

  def items() -> list[Item]:
    asked = splits.read(data_dir, 'gsm8k', 'test')
    pool = splits.read(data_dir, 'gsm8k', 'train') if shots else []
    prompts = build.few_shot(asked, pool, shots, text, solved)
    return [
      Item(str(i), prompt, answers=(answer(record),))
      for i, (record, prompt) in enumerate(zip(asked, prompts, strict=True))
    ]

  def measure(item: Item, prediction: Prediction) -> dict[str, float]:
    wanted = read_reference(item.answers[0])
    found = read_number(prediction.texts[0], mode == REFERENCE)
    return {'acc': float(found is not None and found == wanted)}

  stop: Sequence[str] = ('Question:',)
  return EvaluationTask(
    'gsm8k', 'gsm8k', items, 'acc', measure, shots=shots, max_new_tokens=256, stop=tuple(stop)
  )
