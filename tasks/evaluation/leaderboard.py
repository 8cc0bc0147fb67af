"""The multiple-choice benchmarks of JetMoE's table, and PIQA and MMLU.

Shots and metrics as its page states: ARC-challenge 25 (acc_norm), HellaSwag 10 (acc_norm), MMLU 5
(acc), TruthfulQA 0 (mc2), WinoGrande 5 (acc). Prompts are those of the Open LLM leaderboard. In
`reference` mode ARC and MMLU are OpenMoE's instead (the authors' T5 fork): all options are
listed and a letter is asked for.

Columns: arc_challenge question, choices {text, label}, answerKey (or its authors' question {stem,
choices}); hellaswag activity_label, ctx_a, ctx_b, endings, label; mmlu subject, question, choices
(or A, B, C, D), answer; truthfulqa question, mc2_targets {choices, labels} (or its authors'
{answer: label}); winogrande sentence, option1, option2, answer; piqa goal, sol1, sol2, label.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from openmoe.config import ConfigError
from openmoe.evaluation.items import EvaluationTask, Item, Prediction, Prompt
from tasks.evaluation import build, fields, splits
from tasks.evaluation.build import REFERENCE
from tasks.evaluation.fields import LETTERS
from tasks.records import Record

# --- ARC


def _arc_asked(record: Record) -> tuple[str, object]:
  """(question, choices) as this record has them: the authors' files hold both in one object."""
  question = fields.structure(fields.get(record, 'question'))
  if isinstance(question, Mapping):
    inner = Record(question, record.where)
    return fields.text(inner, 'stem', empty=False), fields.get(inner, 'choices')
  return fields.text(record, 'question', empty=False), fields.get(record, 'choices')


def _arc_choices(record: Record) -> tuple[list[str], int]:
  """(texts, index of the right one); the key is one of the labels: letters or digits."""
  choices = fields.structure(_arc_asked(record)[1])
  if isinstance(choices, list):  # TFDS and the authors keep a list of records
    each = [Record(fields.fields(record, choice, 'choices'), record.where) for choice in choices]
    choices = {name: [fields.get(choice, name) for choice in each] for name in ('text', 'label')}
  choices = Record(fields.fields(record, choices, 'choices'), record.where)
  texts = fields.texts(record, fields.get(choices, 'text'), 'choices.text')
  labels = fields.texts(record, fields.get(choices, 'label'), 'choices.label')
  labels = [label.strip().upper() for label in labels]
  if len(labels) != len(texts) or len(set(labels)) < len(labels):
    raise fields.refuse(record, f'{len(texts)} choices with labels {labels}, not one for each.')
  key = fields.get(record, 'answerKey')
  if fields.hidden(key):
    raise fields.refuse(record, "'answerKey' is empty: this is a split without answers.")
  key = fields.as_text(record, 'answerKey', key).strip().upper()
  if key not in labels:
    raise fields.refuse(record, f"'answerKey' is {key!r}, none of the labels {labels}.")
  return texts, labels.index(key)


def _arc_question(record: Record) -> str:
  return f'Question: {_arc_asked(record)[0]}\nAnswer:'


def _arc_solved(record: Record) -> str:
  texts, right = _arc_choices(record)
  return f'{_arc_question(record)} {texts[right]}'


def _arc_listed(record: Record) -> Prompt:
  texts, _ = _arc_choices(record)
  options = ''.join(f'\n({letter}): {text}' for letter, text in zip(LETTERS, texts, strict=False))
  return Prompt(f'Question: {_arc_asked(record)[0]}\n\nOptions:{options}\n\nAnswer:')


def arc_challenge(mode: str, shots: int | None, data_dir: str) -> EvaluationTask:
  """25-shot acc_norm; in reference mode 0-shot ranking of letters per token, EOS included."""
  if mode == REFERENCE:

    def items() -> list[Item]:
      found = []
      for i, record in enumerate(splits.read(data_dir, 'arc_challenge', 'test')):
        texts, right = _arc_choices(record)
        if len(texts) == 4:  # the original leaves the others out
          letters = [f' {letter}' for letter in LETTERS[:4]]
          found.append(build.choice_item(str(i), _arc_listed(record), letters, right))
      if not found:
        raise ConfigError(
          'arc_challenge: no item is left, as reference mode leaves out questions that have not '
          'four choices; use PROMPT_MODE=fixed, or the published test split.'
        )
      return found

    return build.ranking_task(
      'arc_challenge', 'acc_token', 0.25, mode, items=items, append_eos=True
    )
  shots = 25 if shots is None else shots

  def items() -> list[Item]:
    asked = splits.read(data_dir, 'arc_challenge', 'test')
    pool = splits.read(data_dir, 'arc_challenge', 'train') if shots else []
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
  topic, begin, end = (fields.text(record, n) for n in ('activity_label', 'ctx_a', 'ctx_b'))
  return clean_hellaswag(f'{topic}: {begin} {end.capitalize()}')


def _hellaswag_endings(record: Record) -> tuple[list[str], int]:
  """(endings, index of the right one)."""
  endings = fields.texts(record, fields.get(record, 'endings'), 'endings')
  right = fields.label(record, 'label', count=len(endings))
  return [f' {clean_hellaswag(ending)}' for ending in endings], right


def _hellaswag_solved(record: Record) -> str:
  endings, right = _hellaswag_endings(record)
  return _hellaswag_question(record) + endings[right]


def hellaswag(mode: str, shots: int | None, data_dir: str) -> EvaluationTask:
  """10-shot acc_norm; both modes are the same."""
  del mode
  shots = 10 if shots is None else shots

  def items() -> list[Item]:
    asked = splits.read(data_dir, 'hellaswag', 'validation')
    pool = splits.read(data_dir, 'hellaswag', 'train') if shots else []
    prompts = build.few_shot(asked, pool, shots, _hellaswag_question, _hellaswag_solved)
    return [
      build.choice_item(str(i), prompt, *_hellaswag_endings(record))
      for i, (record, prompt) in enumerate(zip(asked, prompts, strict=True))
    ]

  return build.ranking_task('hellaswag', 'acc_norm', 0.25, items=items, shots=shots, joint=True)


# --- MMLU


def _mmlu_parts(record: Record) -> tuple[str, str, int, int]:
  """(subject, question with options, index of the right one, number of options)."""
  subject, question = (fields.text(record, name) for name in ('subject', 'question'))
  if 'choices' in record or 'A' not in record:
    options = fields.texts(record, fields.get(record, 'choices'), 'choices')
  else:
    options = [fields.text(record, name) for name in 'ABCD']
  if len(options) > len(LETTERS):
    raise fields.refuse(record, f'{len(options)} choices are more than {len(LETTERS)}.')
  right = fields.label(record, 'answer', count=len(options), by_letter=True)
  listed = ''.join(f'\n{letter}. {o}' for letter, o in zip(LETTERS, options, strict=False))
  return subject, f'{question.strip()}{listed}\nAnswer:', right, len(options)


def _mmlu_items(data_dir: str, shots: int, generated: bool) -> list[Item]:
  asked = splits.read(data_dir, 'mmlu', 'test')
  pool: dict[str, list[str]] = {}
  for record in splits.read(data_dir, 'mmlu', 'dev') if shots else []:
    subject, question, right, _ = _mmlu_parts(record)
    pool.setdefault(subject, []).append(f'{question} {LETTERS[right]}')
  found = []
  for i, record in enumerate(asked):
    subject, question, right, count = _mmlu_parts(record)
    topic = subject.replace('_', ' ')
    prefix = f'The following are multiple choice questions (with answers) about {topic}.\n\n'
    solved = tuple(pool.get(subject, ())[:shots])
    if len(solved) < shots:
      raise fields.refuse(
        record,
        f'subject {subject!r} has {len(solved)} examples in the dev split, not {shots}; copy it '
        'whole, or ask for fewer shots.',
      )
    prompt = Prompt(question, solved, prefix, separator='\n\n')
    name = f'{subject}/{i}'
    if generated:
      found.append(Item(name, prompt, answers=(LETTERS[right],)))
    else:
      letters = [f' {letter}' for letter in LETTERS[:count]]
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


def _truthfulqa_targets(record: Record) -> tuple[list[str], tuple[float, ...]]:
  """(answers, 1.0 for each that is true)."""
  targets = fields.fields(record, fields.get(record, 'mc2_targets'), 'mc2_targets')
  if 'choices' not in targets:  # the authors' files
    targets = {'choices': list(targets), 'labels': list(targets.values())}
  inner = Record(targets, record.where)
  choices = fields.texts(record, targets['choices'], 'mc2_targets.choices')
  labels = fields.structure(fields.get(inner, 'labels'))
  labels = [fields.whole(label) for label in labels] if isinstance(labels, list) else []
  if len(labels) != len(choices) or set(labels) != {0, 1}:
    raise fields.refuse(
      record,
      f"'mc2_targets' has labels {fields.shown(labels)}, not 0 or 1 for each of {len(choices)} "
      'answers with both among them.',
    )
  return choices, tuple(map(float, labels))


def truthfulqa(mode: str, shots: int | None, data_dir: str) -> EvaluationTask:
  """0-shot mc2, after the benchmark's own six solved questions; both modes are the same."""
  del mode, shots
  primer = ''.join(f'Q: {question}\nA: {answer}\n\n' for question, answer in _PRIMER)

  def items() -> list[Item]:
    found = []
    for i, record in enumerate(splits.read(data_dir, 'truthfulqa', 'validation')):
      question = fields.text(record, 'question', empty=False)
      choices, scores = _truthfulqa_targets(record)
      prompt = Prompt(f'Q: {question}\nA:', prefix=primer)
      found.append(Item(str(i), prompt, tuple(f' {choice}' for choice in choices), scores))
    return found

  return EvaluationTask('truthfulqa', 'truthfulqa', items, 'mc2', mc2, joint=True)


# --- WinoGrande


def _winogrande_parts(record: Record) -> tuple[list[str], str, int]:
  """(the sentence up to and with either option in the blank, the rest, index of the right one)."""
  sentence = fields.text(record, 'sentence')
  before, blank, after = sentence.partition('_')
  if not blank:
    raise fields.refuse(record, f"'sentence' has no blank _ ({fields.shown(sentence)}).")
  begins = [before + fields.text(record, n, empty=False) for n in ('option1', 'option2')]
  return begins, f' {after.strip()}', fields.label(record, 'answer', count=2, first=1)


def _winogrande_solved(record: Record) -> str:
  begins, rest, right = _winogrande_parts(record)
  return begins[right] + rest


def winogrande(mode: str, shots: int | None, data_dir: str) -> EvaluationTask:
  """5-shot acc: what follows the blank is scored with either name in it; modes are the same."""
  del mode
  shots = 5 if shots is None else shots

  def items() -> list[Item]:
    asked = splits.read(data_dir, 'winogrande', 'validation')
    pool = splits.read(data_dir, 'winogrande', 'train') if shots else []
    prompts = build.few_shot(asked, pool, shots, lambda _: '', _winogrande_solved)
    found = []
    for i, (record, prompt) in enumerate(zip(asked, prompts, strict=True)):
      begins, rest, right = _winogrande_parts(record)
      each = tuple(Prompt(begin, prompt.shots, separator='\n\n') for begin in begins)
      found.append(build.choice_item(str(i), each[0], (rest, rest), right, each))
    return found

  return build.ranking_task('winogrande', 'acc', 0.5, items=items, shots=shots, joint=True)


# --- PIQA


def piqa(mode: str, shots: int | None, data_dir: str) -> EvaluationTask:
  """0-shot acc_norm; both modes are the same."""
  del mode
  shots = shots or 0
  question = lambda record: f'Question: {fields.text(record, "goal")}\nAnswer:'
  choices = lambda record: [f' {fields.text(record, name)}' for name in ('sol1', 'sol2')]
  right = lambda record: fields.label(record, 'label', count=2)
  solved = lambda record: question(record) + choices(record)[right(record)]

  def items() -> list[Item]:
    asked = splits.read(data_dir, 'piqa', 'validation')
    pool = splits.read(data_dir, 'piqa', 'train') if shots else []
    prompts = build.few_shot(asked, pool, shots, question, solved)
    return [
      build.choice_item(str(i), prompt, choices(record), right(record))
      for i, (record, prompt) in enumerate(zip(asked, prompts, strict=True))
    ]

  return build.ranking_task('piqa', 'acc_norm', 0.5, items=items, shots=shots, joint=True)
