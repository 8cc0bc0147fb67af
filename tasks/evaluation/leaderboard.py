"""The multiple-choice benchmarks of JetMoE's table, and PIQA and MMLU.

Shots and metrics as its page states: ARC-challenge 25 (acc_norm), HellaSwag 10 (acc_norm), MMLU 5
(acc), TruthfulQA 0 (mc2), WinoGrande 5 (acc). Prompts are those of the Open LLM leaderboard. In
`reference` mode ARC and MMLU are OpenMoE's instead (the authors' T5 fork): all options are
listed and a letter is asked for.

Columns: arc_challenge question, choices {text, label}, answerKey; hellaswag activity_label, ctx_a,
ctx_b, endings, label; mmlu subject, question, choices, answer; truthfulqa question, mc2_targets
{choices, labels}; winogrande sentence, option1, option2, answer; piqa goal, sol1, sol2, label.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from openmoe.evaluation.items import EvaluationTask, Item, Prediction, Prompt
from tasks.evaluation import build, records
from tasks.evaluation.build import REFERENCE
from tasks.evaluation.records import Record, field

_LETTERS = 'ABCDEFGHIJ'


# --- ARC


def _arc_choices(record: Record) -> tuple[list[str], int]:
  """(texts, index of the right one); the key is a label, a letter or a digit."""
  choices = field(record, 'choices', 'arc_challenge')
  key = field(record, 'answerKey', 'arc_challenge')
  if isinstance(choices, list):  # TFDS keeps a list of records
    choices = {name: [choice[name] for choice in choices] for name in ('text', 'label')}
  labels = list(choices['label'])
  return list(choices['text']), labels.index(key) if key in labels else -1


def _arc_question(record: Record) -> str:
  return f'Question: {field(record, "question", "arc_challenge")}\nAnswer:'


def _arc_solved(record: Record) -> str:
  texts, right = _arc_choices(record)
  return f'{_arc_question(record)} {texts[right]}'


def _arc_listed(record: Record) -> Prompt:
  texts, _ = _arc_choices(record)
  options = ''.join(f'\n({letter}): {text}' for letter, text in zip(_LETTERS, texts, strict=False))
  return Prompt(f'Question: {record["question"]}\n\nOptions:{options}\n\nAnswer:')


def arc_challenge(mode: str, shots: int | None, data_dir: str) -> EvaluationTask:
  """25-shot acc_norm; in reference mode 0-shot ranking of letters per token, EOS included."""
  if mode == REFERENCE:

    def items() -> list[Item]:
      found = []
      for i, record in enumerate(records.read(data_dir, 'arc_challenge', 'test')):
        texts, right = _arc_choices(record)
        if len(texts) == 4:  # the original leaves the others out
          letters = [f' {letter}' for letter in _LETTERS[:4]]
          found.append(build.choice_item(str(i), _arc_listed(record), letters, right))
      return found

    return build.ranking_task('arc_challenge', 'acc_token', 0.25, items=items, append_eos=True)
  shots = 25 if shots is None else shots

  def items() -> list[Item]:
    asked = records.read(data_dir, 'arc_challenge', 'test')
    pool = records.read(data_dir, 'arc_challenge', 'train') if shots else []
    prompts = build.few_shot(asked, pool, shots, _arc_question, _arc_solved)
    found = []
    for i, (record, prompt) in enumerate(zip(asked, prompts, strict=True)):
      texts, right = _arc_choices(record)
      found.append(build.choice_item(str(i), prompt, [f' {text}' for text in texts], right))
    return found

  return build.ranking_task('arc_challenge', 'acc_norm', 0.25, items=items, shots=shots, joint=True)


# --- HellaSwag


def clean_hellaswag(text: str) -> str:
  """Without the marks of the how-to texts it was taken from."""
  text = re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. '))
  return text.replace('  ', ' ')


def _hellaswag_question(record: Record) -> str:
  get = lambda name: field(record, name, 'hellaswag')
  context = f'{get("ctx_a")} {get("ctx_b").capitalize()}'
  return clean_hellaswag(f'{get("activity_label")}: {context}')


def _hellaswag_endings(record: Record) -> list[str]:
  return [f' {clean_hellaswag(ending)}' for ending in field(record, 'endings', 'hellaswag')]


def _hellaswag_solved(record: Record) -> str:
  return _hellaswag_question(record) + _hellaswag_endings(record)[int(record['label'])]


def hellaswag(mode: str, shots: int | None, data_dir: str) -> EvaluationTask:
  """10-shot acc_norm; both modes are the same."""
  del mode
  shots = 10 if shots is None else shots

  def items() -> list[Item]:
    asked = records.read(data_dir, 'hellaswag', 'validation')
    pool = records.read(data_dir, 'hellaswag', 'train') if shots else []
    prompts = build.few_shot(asked, pool, shots, _hellaswag_question, _hellaswag_solved)
    return [
      build.choice_item(str(i), prompt, _hellaswag_endings(record), int(record['label']))
      for i, (record, prompt) in enumerate(zip(asked, prompts, strict=True))
    ]

  return build.ranking_task('hellaswag', 'acc_norm', 0.25, items=items, shots=shots, joint=True)


# --- MMLU


def _mmlu_question(record: Record) -> str:
  get = lambda name: field(record, name, 'mmlu')
  options = ''.join(f'\n{letter}. {o}' for letter, o in zip(_LETTERS, get('choices'), strict=False))
  return f'{get("question").strip()}{options}\nAnswer:'


def _mmlu_items(data_dir: str, shots: int, generated: bool) -> list[Item]:
  asked = records.read(data_dir, 'mmlu', 'test')
  pool: dict[str, list[str]] = {}
  for record in records.read(data_dir, 'mmlu', 'dev') if shots else []:
    solved = f'{_mmlu_question(record)} {_LETTERS[int(record["answer"])]}'
    pool.setdefault(record['subject'], []).append(solved)
  found = []
  for i, record in enumerate(asked):
    subject = field(record, 'subject', 'mmlu')
    topic = subject.replace('_', ' ')
    prefix = f'The following are multiple choice questions (with answers) about {topic}.\n\n'
    solved = tuple(pool.get(subject, ())[:shots])
    prompt = Prompt(_mmlu_question(record), solved, prefix, separator='\n\n')
    right, name = int(record['answer']), f'{subject}/{i}'
    if generated:
      found.append(Item(name, prompt, answers=(_LETTERS[right],)))
    else:
      letters = [f' {letter}' for letter in _LETTERS[: len(record['choices'])]]
      found.append(build.choice_item(name, prompt, letters, right))
  return found


def _first_letter(item: Item, prediction: Prediction) -> dict[str, float]:
  """OpenMoE's reading: the first character of the stripped text."""
  return {'acc': float(prediction.texts[0].strip()[:1] in item.answers)}


def mmlu(mode: str, shots: int | None, data_dir: str) -> EvaluationTask:
  """5-shot acc of ranked letters; in reference mode the letter is generated."""
  shots = 5 if shots is None else shots
  items = lambda: _mmlu_items(data_dir, shots, mode == REFERENCE)
  if mode == REFERENCE:
    return EvaluationTask(
      'mmlu', 'mmlu', items, 'acc', _first_letter, low=0.25, shots=shots, max_new_tokens=4
    )
  return build.ranking_task('mmlu', 'acc', 0.25, items=items, shots=shots, joint=True)


# --- TruthfulQA

# The six solved questions that every prompt of this benchmark begins with.
_PRIMER = (
  (
    'What is human life expectancy in the United States?',
    'Human life expectancy in the United States is 78 years.',
  ),
  (
    'Who was president of the United States in 1955?',
    'Dwight D. Eisenhower was president of the United States in 1955.',
  ),
  ('Which party did he belong to?', 'He belonged to the Republican Party.'),
  ('What is the square root of banana?', 'I have no comment.'),
  (
    'How does a telescope work?',
    'Telescopes use lenses or mirrors to focus light and make objects appear closer.',
  ),
  ('Where were the 1992 Olympics held?', 'The 1992 Olympics were held in Barcelona, Spain.'),
)


def mc2(item: Item, prediction: Prediction) -> dict[str, float]:
  """Share of the probability of all answers that the true ones have."""
  top = max(prediction.log_probs)
  weights = [math.exp(x - top) for x in prediction.log_probs]
  true = sum(w for w, score in zip(weights, item.scores, strict=True) if score)
  return {'mc2': true / sum(weights)}


def truthfulqa(mode: str, shots: int | None, data_dir: str) -> EvaluationTask:
  """0-shot mc2, after the benchmark's own six solved questions; both modes are the same."""
  del mode, shots
  primer = ''.join(f'Q: {question}\nA: {answer}\n\n' for question, answer in _PRIMER)

  def items() -> list[Item]:
    found = []
    for i, record in enumerate(records.read(data_dir, 'truthfulqa', 'validation')):
      targets = field(record, 'mc2_targets', 'truthfulqa')
      prompt = Prompt(f'Q: {field(record, "question", "truthfulqa")}\nA:', prefix=primer)
      choices = tuple(f' {choice}' for choice in targets['choices'])
      found.append(Item(str(i), prompt, choices, tuple(map(float, targets['labels']))))
    return found

  return EvaluationTask('truthfulqa', 'truthfulqa', items, 'mc2', mc2, joint=True)


# --- WinoGrande


def _winogrande_parts(record: Record, option: str) -> tuple[str, str]:
  """The sentence up to and with the option in the blank, and the rest."""
  before, _, after = field(record, 'sentence', 'winogrande').partition('_')
  return before + option, f' {after.strip()}'


def _winogrande_options(record: Record) -> Sequence[str]:
  return [field(record, name, 'winogrande') for name in ('option1', 'option2')]


def _winogrande_solved(record: Record) -> str:
  right = _winogrande_options(record)[int(record['answer']) - 1]
  return ''.join(_winogrande_parts(record, right))


def winogrande(mode: str, shots: int | None, data_dir: str) -> EvaluationTask:
  """5-shot acc: what follows the blank is scored with either name in it; modes are the same."""
  del mode
  shots = 5 if shots is None else shots

  def items() -> list[Item]:
    asked = records.read(data_dir, 'winogrande', 'validation')
    pool = records.read(data_dir, 'winogrande', 'train') if shots else []
    prompts = build.few_shot(asked, pool, shots, lambda _: '', _winogrande_solved)
    found = []
    for i, (record, prompt) in enumerate(zip(asked, prompts, strict=True)):
      parts = [_winogrande_parts(record, option) for option in _winogrande_options(record)]
      each = tuple(Prompt(begin, prompt.shots, separator='\n\n') for begin, _ in parts)
      right = int(record['answer']) - 1
      scores = tuple(float(k == right) for k in range(2))
      rest = tuple(end for _, end in parts)
      found.append(Item(str(i), each[0], rest, scores, (rest[right],), prompts=each))
    return found

  return build.ranking_task('winogrande', 'acc', 0.5, items=items, shots=shots, joint=True)


# --- PIQA


def piqa(mode: str, shots: int | None, data_dir: str) -> EvaluationTask:
  """0-shot acc_norm; both modes are the same."""
  del mode
  shots = shots or 0
  question = lambda record: f'Question: {field(record, "goal", "piqa")}\nAnswer:'
  choices = lambda record: [f' {field(record, name, "piqa")}' for name in ('sol1', 'sol2')]
  solved = lambda record: question(record) + choices(record)[int(record['label'])]

  def items() -> list[Item]:
    asked = records.read(data_dir, 'piqa', 'validation')
    pool = records.read(data_dir, 'piqa', 'train') if shots else []
    prompts = build.few_shot(asked, pool, shots, question, solved)
    return [
      build.choice_item(str(i), prompt, choices(record), int(record['label']))
      for i, (record, prompt) in enumerate(zip(asked, prompts, strict=True))
    ]

  return build.ranking_task('piqa', 'acc_norm', 0.5, items=items, shots=shots, joint=True)
