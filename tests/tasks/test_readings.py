"""How answers, labels, options and numbers are read: right whatever their spelling, or refused."""

from __future__ import annotations

import csv
import io
import json

import pytest

from openmoe.config import ConfigError
from openmoe.evaluation.items import Item, Prediction, Prompt
from tasks.evaluation import answers, build, catalogue, code, fields, leaderboard, programs
from tasks.evaluation.numerals import read_number, read_reference
from tasks.records import Record


def items(tmp_path, name, split, *rows, mode='fixed', shots=0):
  path = tmp_path / name / f'{split}.jsonl'
  path.parent.mkdir(exist_ok=True)
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
  return catalogue.BENCHMARKS[name](mode, shots, str(tmp_path)).items()


def refused(tmp_path, name, split, row, said, mode='fixed'):
  with pytest.raises(ConfigError, match=rf'{name}/{split}.jsonl:1: .*{said}'):
    items(tmp_path, name, split, row, mode=mode)


# --- numbers


@pytest.mark.parametrize(
  ('text', 'value'),
  [
    ('#### 72.00', '72'),
    ('The total is $29.00.', '29'),
    ('#### 1,000.00', '1000'),
    ('#### 72.50', '72.5'),
    ('It is .5', '0.5'),
    ('10-5', '5'),
    ('so = -5', '-5'),
    ('so −5', '-5'),
    ('–5 degrees', '-5'),
    ('-$5', '-5'),
    ('$-5.50', '-5.5'),
    ('+5', '5'),
    ('1\u202f000 kg', '1000'),
    ('of 1,2,3', '3'),
    ('1/2', '0.5'),
    ('3 1/2 cups', '3.5'),
    ('2½', '2.5'),
    ('1/3', '1/3'),
    ('2/6', '1/3'),
    ('50 %', '50'),
    (r'$\frac{1}{2}$', '0.5'),
    (r'#### \boxed{72}', '72'),
    ('#### **-3,500**', '-3500'),
    ('on 5/12/2020', '2020'),
    ('1.5e-3', '0.0015'),
    ('-0.0', '0'),
    ('#### x, 7', '7'),
    ('none', None),
    ('1/0', None),
    ('9' * 400, None),
  ],
)
def test_numbers_are_compared_by_value(text, value):
  assert read_number(text, strict=False) == value


def test_only_what_follows_the_mark_counts_where_that_is_asked():
  assert read_number('so 3.\n#### 1,234 and 5', strict=True) == '1234'
  assert read_number('####72', strict=True) == '72'
  assert read_number('it is 7', strict=True) is None
  assert [read_reference(t) for t in ('72', ' $72.0 ', '50%', '72 or 73', 'x', '1,2')] == [
    '72', '72', '50', None, None, None,
  ]  # fmt: skip


@pytest.mark.parametrize('given', ['72', 72, 72.0, 'so 3\n#### 72', '#### $72.00'])
def test_gsm8k_knows_plain_references_and_no_answer_is_never_right(tmp_path, given):
  row = {'question': 'q', 'answer': given}
  (item,) = items(tmp_path, 'gsm8k', 'test', row)
  measure = answers.gsm8k('fixed', 0, str(tmp_path)).measure
  got = [measure(item, Prediction(texts=(t,)))['acc'] for t in ('I do not know', 'It is 72.', '7')]
  assert got == [0.0, 1.0, 0.0]
  strict = answers.gsm8k('reference', 0, str(tmp_path)).measure
  got = [strict(item, Prediction(texts=(t,)))['acc'] for t in ('It is 72.', '#### 72', '####')]
  assert got == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
  ('given', 'said'),
  [
    ('', 'empty'),
    (None, 'empty'),
    ('many', "no number after '####'"),
    ([72], 'no text'),
    (True, ''),
  ],
)
def test_gsm8k_references_without_a_number_are_refused(tmp_path, given, said):
  refused(tmp_path, 'gsm8k', 'test', {'question': 'q', 'answer': given}, f"'answer'.*{said}")


# --- TriviaQA and BoolQ


def trivia(wanted, text, mode='fixed'):
  item = Item('0', Prompt('q'), answers=(wanted,))
  return answers.measure_trivia(item, Prediction(texts=(text,)), mode)['em']


@pytest.mark.parametrize(
  'answer',
  [
    'Dr. No',
    'St. Louis',
    'Washington, D.C.',
    'Martin Luther King, Jr.',
    '1,000',
    '3.14',
    'The The',
  ],
)
def test_trivia_answers_with_stops_can_be_right(answer):
  assert trivia(answer, f' {answer}\nQuestion') == 1.0
  assert trivia(answer, f'{answer}. It is so.') == 1.0
  assert trivia(answer, '') == 0.0
  assert trivia(answer, '.') == 0.0


def test_trivia_in_reference_mode_is_the_originals():
  assert trivia('Dr. No', 'Dr. No', 'reference') == 0.0
  assert trivia('Dr', 'Dr. No', 'reference') == 1.0
  assert trivia('The The', '', 'reference') == 1.0
  assert trivia('1', '1,000') == 0.0


@pytest.mark.parametrize(
  ('answer', 'known'),
  [
    ({'value': 'P', 'aliases': ['Q', 'P']}, ('P', 'Q')),
    ({'value': 'P', 'aliases': None}, ('P',)),
    ({'value': 'P', 'aliases': 'Q'}, ('P', 'Q')),
    ({'aliases': ['Q']}, ('Q',)),
    ("['P', 'Q']", ('P', 'Q')),
    ('{"value": "P", "aliases": ["Q"]}', ('P', 'Q')),
    (['P', 'Q'], ('P', 'Q')),
    ('Paris', ('Paris',)),
    (1984, ('1984',)),
  ],
)
def test_trivia_answers_in_all_layouts(tmp_path, answer, known):
  (item,) = items(tmp_path, 'triviaqa', 'validation', {'question': 'q', 'answer': answer})
  assert item.answers == known


def test_trivia_as_its_authors_publish_it(tmp_path):
  (tmp_path / 'triviaqa').mkdir()
  data = [{'Question': 'q?', 'Answer': {'Value': 'v', 'Aliases': ['v', 'w']}}]
  path = tmp_path / 'triviaqa' / 'validation.json'
  path.write_text(json.dumps({'Data': data, 'Version': 1.0}, indent=1))
  (item,) = answers.triviaqa('fixed', 0, str(tmp_path)).items()
  assert (item.prompt.query, item.answers) == ('Question: q?\nAnswer:', ('v', 'w'))


@pytest.mark.parametrize('answer', [None, '', [], {'value': '', 'aliases': []}, {}, {'x': 1}])
def test_hidden_trivia_answers_are_refused(tmp_path, answer):
  row = {'question': 'q', 'answer': answer}
  refused(tmp_path, 'triviaqa', 'validation', row, 'split without answers')


@pytest.mark.parametrize(
  ('value', 'right'),
  [
    (True, ' yes'), ('True', ' yes'), (' true', ' yes'), (1, ' yes'), (1.0, ' yes'),
    ('1.0', ' yes'), ('YES', ' yes'),
    (False, ' no'), ('false ', ' no'), (0, ' no'), ('0', ' no'), ('No', ' no'),
  ],
)  # fmt: skip
def test_boolq_spellings(tmp_path, value, right):
  for column in ('answer', 'label'):
    row = {'passage': 'p', 'question': 'q', column: value}
    assert items(tmp_path, 'boolq', 'validation', row)[0].answers == (right,)


@pytest.mark.parametrize('value', [None, 'maybe', 'y', -1, 2, '', [True], 0.5])
def test_what_boolq_does_not_understand_is_refused(tmp_path, value):
  row = {'passage': 'p', 'question': 'q', 'answer': value}
  refused(tmp_path, 'boolq', 'validation', row, "'answer' is")


def test_lambada_keeps_what_stands_before_the_last_word(tmp_path):
  (item,) = items(tmp_path, 'lambada', 'test', {'text': 'He said\nBob '})
  assert (item.prompt.query, item.choices, item.answers) == ('He said', ('\nBob',), ('Bob',))
  refused(tmp_path, 'lambada', 'test', {'text': 'Bob'}, 'one word')


# --- labels and options


@pytest.mark.parametrize('value', [1, 1.0, '1', ' 1 ', '1.0', 'B', 'b', '(B)', 'B.', 'b)', '(b).'])
def test_labels_in_every_spelling(value):
  if value == '(b).':
    with pytest.raises(ConfigError, match='or a letter up to D'):
      fields.label(Record({'answer': value}, 'f:1'), 'answer', count=4, by_letter=True)
    return
  assert fields.label(Record({'answer': value}, 'f:1'), 'answer', count=4, by_letter=True) == 1


@pytest.mark.parametrize('value', [-1, '-1', '', None, ' ', float('nan')])
def test_hidden_labels_are_named(value):
  with pytest.raises(ConfigError, match="f:1: 'label' is empty or -1 .* split without answers"):
    fields.label(Record({'label': value}, 'f:1'), 'label', count=2)


@pytest.mark.parametrize('value', [2, '3', 'A', True, [0], {}, 1.5, '9' * 30, 10**400])
def test_labels_of_no_choice_are_refused(value):
  with pytest.raises(ConfigError, match='f:1: .* not 0 to 1'):
    fields.label(Record({'label': value}, 'f:1'), 'label', count=2)


CELLS = [
  "['1', \"it's\", '3, 4', '4']",
  '["1", "it\'s", "3, 4", "4"]',
  "['1' \"it's\"\n '3, 4' '4']",
]


@pytest.mark.parametrize('cell', CELLS)
def test_mmlu_lists_in_csv_cells(tmp_path, cell):
  folder = tmp_path / 'mmlu'
  folder.mkdir()
  text = io.StringIO()
  csv.writer(text).writerows([['question', 'subject', 'choices', 'answer'], ['q', 's', cell, '1']])
  (folder / 'test.csv').write_text('\ufeff' + text.getvalue(), encoding='utf-8')
  (item,) = leaderboard.mmlu('fixed', 0, str(tmp_path)).items()
  assert item.prompt.query == "q\nA. 1\nB. it's\nC. 3, 4\nD. 4\nAnswer:"
  assert (item.choices, item.scores) == ((' A', ' B', ' C', ' D'), (0, 1, 0, 0))


@pytest.mark.parametrize('cell', [r'["a\ud83d", "b"]', r"['a\ud83d' 'b']"])
def test_halves_of_surrogate_pairs_in_cells_are_replaced(cell):
  record = Record({'choices': cell}, 'f:1')
  assert fields.texts(record, cell, 'choices') == ['a\ufffd', 'b']


@pytest.mark.parametrize(
  'choices', ['1 2 3 4', "['1', '2'", "['a']", 'x', 3, None, ['a'], [1, None]]
)
def test_what_is_no_list_is_refused(tmp_path, choices):
  row = {'question': 'q', 'subject': 's', 'choices': choices, 'answer': 0}
  refused(tmp_path, 'mmlu', 'test', row, "'choices'")


def test_mmlu_in_columns_and_with_too_few_examples(tmp_path):
  row = {'subject': 's', 'question': 'q', **dict(zip('ABCD', 'wxyz', strict=True)), 'answer': 'C'}
  (item,) = items(tmp_path, 'mmlu', 'test', row)
  assert item.prompt.query.endswith('\nD. z\nAnswer:') and item.scores == (0, 0, 1, 0)
  items(tmp_path, 'mmlu', 'dev', row)
  with pytest.raises(ConfigError, match="subject 's' has 1 examples in the dev split, not 2"):
    leaderboard.mmlu('fixed', 2, str(tmp_path)).items()


def arc(**changes):
  row = {
    'question': 'q',
    'choices': {'text': list('wxyz'), 'label': list('ABCD')},
    'answerKey': 'B',
  }
  return row | changes


def test_arc_in_all_layouts(tmp_path):
  each = [{'text': t, 'label': n} for t, n in zip('wxyz', 'ABCD', strict=True)]
  digits = {'text': list('wxyz'), 'label': list('1234')}
  for row in (
    arc(),
    arc(answerKey='b '),
    arc(choices=each),
    arc(choices=digits, answerKey=2),
    arc(question={'stem': 'q', 'choices': each}, choices=None),
    arc(choices=json.dumps(arc()['choices'])),
  ):
    (item,) = items(tmp_path, 'arc_challenge', 'test', row)
    assert (item.prompt.query, item.scores) == ('Question: q\nAnswer:', (0, 1, 0, 0))
  refused(tmp_path, 'arc_challenge', 'test', arc(answerKey='E'), 'none of the labels')
  refused(tmp_path, 'arc_challenge', 'test', arc(answerKey=''), 'split without answers')
  bad = {'text': list('wxyz'), 'label': list('AABC')}
  refused(tmp_path, 'arc_challenge', 'test', arc(choices=bad), 'not one for each')


def test_arc_in_reference_mode_says_that_nothing_is_left(tmp_path):
  row = arc(choices={'text': list('wxy'), 'label': list('ABC')})
  with pytest.raises(ConfigError, match='arc_challenge: no item is left'):
    items(tmp_path, 'arc_challenge', 'test', row, mode='reference')


def test_hidden_and_wrong_labels_of_the_others(tmp_path):
  hella = {'activity_label': 'X', 'ctx_a': 'a', 'ctx_b': '', 'endings': list('1234')}
  refused(tmp_path, 'hellaswag', 'validation', hella | {'label': ''}, 'split without answers')
  refused(tmp_path, 'hellaswag', 'validation', hella | {'label': '4'}, 'not 0 to 3')
  wino = {'sentence': 'a _ b', 'option1': 'x', 'option2': 'y'}
  refused(tmp_path, 'winogrande', 'validation', wino | {'answer': ''}, 'split without answers')
  refused(tmp_path, 'winogrande', 'validation', wino | {'answer': 0}, 'not 1 to 2')
  refused(tmp_path, 'winogrande', 'validation', wino | {'answer': 1, 'sentence': 'a'}, 'no blank')
  piqa = {'goal': 'g', 'sol1': 'a', 'sol2': 'b'}
  refused(tmp_path, 'piqa', 'validation', piqa | {'label': -1}, 'split without answers')
  refused(tmp_path, 'piqa', 'validation', piqa, "no 'label'")
  truth = {'question': 'q', 'mc2_targets': {'choices': ['a', 'b'], 'labels': [0, 0]}}
  refused(tmp_path, 'truthfulqa', 'validation', truth, 'with both among them')
  truth = {'question': 'q', 'mc2_targets': {'yes': 1, 'no': 0}}
  (item,) = items(tmp_path, 'truthfulqa', 'validation', truth)
  assert (item.choices, item.scores) == ((' yes', ' no'), (1.0, 0.0))


def test_equal_choices_are_equally_right():
  predicted = Prediction(log_probs=(-1.0, -1.0, -5.0), lengths=(1, 1, 1))
  for right in (0, 1):
    item = build.choice_item('0', Prompt('q'), (' same', ' same', ' x'), right)
    assert build.ranked(item, predicted) == {'acc': 1.0, 'acc_norm': 1.0, 'acc_token': 1.0}
  prompts = (Prompt('a'), Prompt('b'))
  assert build.choice_item('0', prompts[0], (' x', ' x'), 1, prompts).scores == (0.0, 1.0)


def test_choices_that_rank_alike_share_the_credit_but_not_in_reference_mode():
  item = build.choice_item('0', Prompt('q'), (' a', ' b', ' c'), 1)
  predicted = Prediction(log_probs=(-1.0, -1.0, -5.0), lengths=(1, 1, 1))
  assert build.ranked(item, predicted)['acc'] == 0.5
  assert build.ranked(item, predicted, 'reference')['acc'] == 0.0
  with pytest.raises(ConfigError, match='choice -1 is not one of'):
    build.choice_item('0', Prompt('q'), (' a', ' b'), -1)


# --- programs

ADD = 'def add(a, b):\n  return a + b\n'


@pytest.mark.parametrize(
  'text',
  [
    ADD,
    *(
      f'```{info}\n{ADD}```'
      for info in ('', 'python', 'py', 'Python', 'python3', ' python title=x')
    ),
    f'```python\r\n{ADD}```'.replace('\n', '\r\n').replace('\r\r', '\r'),
    f'```python\n{ADD}',
    f'~~~\n{ADD}~~~\nDone.',
    f'````python\n{ADD}````',
    'Here:\n  ```\n  def add(a, b):\n    return a + b\n  ```',
    f'For example:\n```\nadd(1, 2)\n```\nThe code:\n```python\n{ADD}```\n```\nother = 1\n```',
    f'```python\n{ADD.rstrip()}```',
  ],
)
def test_programs_are_found_in_fences(text):
  scope = {}
  exec(programs.program(text, programs.called('assert add(1, 2) == 3')), scope)
  assert scope['add'](1, 2) == 3


def test_mbpp_files_that_would_let_everything_pass_are_refused(tmp_path):
  row = {'task_id': '11', 'text': 't', 'code': '', 'test_list': "['assert add(1, 2) == 3']"}
  (item,) = items(tmp_path, 'mbpp', 'test', row)
  assert (item.name, item.extra['tests']) == ('11', ['assert add(1, 2) == 3'])
  refused(
    tmp_path, 'mbpp', 'test', row | {'test_list': []}, "'test_list' must be a list of at least"
  )
  refused(tmp_path, 'mbpp', 'test', row | {'task_id': 'x'}, 'not a number')


def test_humaneval_bodies_in_fences():
  prompt = 'def one():\n   """One."""\n'
  for text in (
    '   return 1',
    '```python\nreturn 1\n```',
    '```\n   return 1',
    '```\ndef one():\n return 1',
  ):
    scope = {}
    exec(prompt + code._body(text, prompt, 'one'), scope)
    assert scope['one']() == 1


def test_humaneval_records_are_checked(tmp_path):
  row = {'task_id': 'a', 'prompt': 'def f():\n', 'test': 'def check(f): pass', 'entry_point': 'f'}
  assert items(tmp_path, 'humaneval', 'test', row)[0].name == 'a'
  refused(tmp_path, 'humaneval', 'test', row | {'test': 'pass'}, 'must define check')
  refused(tmp_path, 'humaneval', 'test', row | {'entry_point': 'f)'}, 'be a name')
