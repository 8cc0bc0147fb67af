"""Benchmarks that are answered in words: TriviaQA, BoolQ, LAMBADA, GSM8K.

`reference` prompts and readings of the first three are OpenMoE's, missing line breaks included
(authors' T5 fork, t5/data/tasks.py and postprocessors.py); GSM8K's are the Open LLM leaderboard's.

Columns: triviaqa question, answer {value, aliases}; boolq passage, question, answer; lambada text
(or passage); gsm8k question, answer.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence

from openmoe.evaluation.items import EvaluationTask, Item, Prediction, Prompt
from tasks.evaluation import build, records
from tasks.evaluation.build import REFERENCE
from tasks.evaluation.records import Record, field

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


def read_trivia(text: str) -> str:
  """Up to the first full stop, comma, backspace or line break."""
  return re.split(r'[.,\x08\n]', text, maxsplit=1)[0].strip()


def measure_trivia(item: Item, prediction: Prediction) -> dict[str, float]:
  """Exact match and word F1 after normalisation, of the best alias; 0 to 1."""
  text = normalize_trivia(read_trivia(prediction.texts[0]))
  answers = [normalize_trivia(answer) for answer in item.answers]
  return {'em': float(text in answers), 'f1': max(_f1(answer, text) for answer in answers)}


def triviaqa(mode: str, shots: int | None, data_dir: str) -> EvaluationTask:
  """0-shot exact match. The reference prompt has nothing between question and 'Answer:'."""
  shots = shots or 0
  between = '' if mode == REFERENCE else '\n'
  head = 'Answer the following trivia question:\n'
  text = lambda record: f'Question: {field(record, "question", "triviaqa")}{between}Answer:'
  answer = lambda record: field(record, 'answer', 'triviaqa')
  solved = lambda record: f'{text(record)} {answer(record)["value"]}'

  def items() -> list[Item]:
    asked = records.read(data_dir, 'triviaqa', 'validation')
    pool = records.read(data_dir, 'triviaqa', 'train') if shots else []
    prompts = build.few_shot(asked, pool, shots, text, solved, prefix=head)
    found = []
    for i, (record, prompt) in enumerate(zip(asked, prompts, strict=True)):
      aliases = tuple(answer(record).get('aliases') or ())
      # The original looks at aliases alone; a record without any would always be wrong.
      value = (answer(record)['value'],)
      known = aliases or value if mode == REFERENCE else tuple(dict.fromkeys(value + aliases))
      found.append(Item(str(i), prompt, answers=known))
    return found

  return EvaluationTask(
    'triviaqa',
    'triviaqa',
    items,
    'em',
    measure_trivia,
    shots=shots,
    max_new_tokens=32,
    stop=('\n',),
  )


# --- BoolQ


def boolq(mode: str, shots: int | None, data_dir: str) -> EvaluationTask:
  """0-shot ranking of ' no' and ' yes'; in reference mode the log-probability per token counts."""
  shots = shots or 0
  asks = '? Tell me yes or no? \n\nAnswer:' if mode == REFERENCE else '?\nAnswer:'
  before = '\n\nQuestion: ' if mode == REFERENCE else '\nQuestion: '

  def text(record: Record) -> str:
    return f'{field(record, "passage", "boolq")}{before}{field(record, "question", "boolq")}{asks}'

  right = lambda record: int(str(field(record, 'answer', 'boolq')).lower() in ('true', '1', 'yes'))
  choices = (' no', ' yes')
  solved = lambda record: text(record) + choices[right(record)]

  def items() -> list[Item]:
    asked = records.read(data_dir, 'boolq', 'validation')
    pool = records.read(data_dir, 'boolq', 'train') if shots else []
    prompts = build.few_shot(asked, pool, shots, text, solved)
    return [
      build.choice_item(str(i), prompt, choices, right(record))
      for i, (record, prompt) in enumerate(zip(asked, prompts, strict=True))
    ]

  metric = 'acc_token' if mode == REFERENCE else 'acc'
  return build.ranking_task('boolq', metric, 0.5, items=items, shots=shots, joint=mode != REFERENCE)


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
    for i, record in enumerate(records.read(data_dir, 'lambada', 'test')):
      name = 'passage' if 'passage' in record else 'text'
      before, _, word = field(record, name, 'lambada').strip().rpartition(' ')
      if mode == REFERENCE:
        found.append(Item(str(i), Prompt(before), answers=(word,)))
      else:
        found.append(Item(str(i), Prompt(before), (f' {word}',), (1.0,), (word,)))
    return found

  if mode == REFERENCE:
    return EvaluationTask('lambada', 'lambada', items, 'acc', _last_word, max_new_tokens=16)
  return EvaluationTask('lambada', 'lambada', items, 'acc', _greedy_word, joint=True)


# --- GSM8K

_NUMBER = r'-?\$?[0-9][0-9,]*(?:\.[0-9]+)?'


def read_number(text: str, strict: bool) -> str | None:
  """The answer of a solution: what follows '####', or (not strict) else the last number."""
  marked = re.search(rf'#### ?({_NUMBER})', text)
  found = [marked.group(1)] if marked else []
  if not found and not strict:
    found = re.findall(_NUMBER, text)
  return found[-1].replace(',', '').replace('$', '').removesuffix('.0') if found else None


def gsm8k(mode: str, shots: int | None, data_dir: str) -> EvaluationTask:
  """5-shot accuracy of the final number; in reference mode it has to follow '####'."""
  shots = 5 if shots is None else shots
  text = lambda record: f'Question: {field(record, "question", "gsm8k")}\nAnswer:'
  solved = lambda record: f'{text(record)} {field(record, "answer", "gsm8k")}'

  def items() -> list[Item]:
    asked = records.read(data_dir, 'gsm8k', 'test')
    pool = records.read(data_dir, 'gsm8k', 'train') if shots else []
    prompts = build.few_shot(asked, pool, shots, text, solved)
    return [
      Item(str(i), prompt, answers=(record['answer'],))
      for i, (record, prompt) in enumerate(zip(asked, prompts, strict=True))
    ]

  def measure(item: Item, prediction: Prediction) -> dict[str, float]:
    wanted = read_number(item.answers[0], strict=True)
    return {'acc': float(read_number(prediction.texts[0], mode == REFERENCE) == wanted)}

  stop: Sequence[str] = ('Question:',)
  return EvaluationTask(
    'gsm8k', 'gsm8k', items, 'acc', measure, shots=shots, max_new_tokens=256, stop=tuple(stop)
  )
