"""MT-Bench answers: prompts of two turns, FastChat's fields, and taking up what is there."""

from __future__ import annotations

import json

import pytest

from openmoe.config import ConfigError
from scripts import mt_bench as script
from tasks.evaluation import mt_bench
from tests.evaluation_case import FakeModel

QUESTIONS = [
  {'question_id': 81, 'category': 'writing', 'turns': ['One?', 'Two?']},
  {'question_id': 82, 'category': 'math', 'turns': ['1+1?', 'Sure?']},
]


class Template:
  """Stands in for openmoe.inference.chat's."""

  name, stop = 'openmoe', ('</s>',)

  def text(self, messages):
    return ''.join(f'{m["role"][0]}({m["content"]})' for m in messages)

  def encode(self, text, encode, eos_id):
    assert eos_id == 1
    return encode(text)


def test_the_published_answers_have_no_space_before_the_first_question():
  found = mt_bench.openmoe_reference(['a', 'b'], ['c'], 'S')
  head = '<<SYS>>\nS\n<</SYS>>\n\n<s>[INST]'
  assert found == f'{head}a [/INST] c </s><s>[INST] b [/INST]'


def test_messages_alternate():
  found = mt_bench.messages(['a', 'b'], ['c'], 'S')
  assert [(m['role'], m['content']) for m in found] == [
    ('system', 'S'),
    ('user', 'a'),
    ('assistant', 'c'),
    ('user', 'b'),
  ]


def run(tmp_path, monkeypatch, model, *more):
  model.chat_template = Template()
  questions = tmp_path / 'question.jsonl'
  questions.write_text(''.join(json.dumps(q) + '\n' for q in QUESTIONS))
  monkeypatch.setattr(script, 'load_model', lambda checkpoint, dtype: model)
  out = tmp_path / 'answers' / 'm.jsonl'
  arguments = ['none', '--questions', str(questions), '--model_id', 'm', '--out', str(out), *more]
  return script.main(arguments), out


def test_answers_are_fastchats_and_kept(tmp_path, monkeypatch):
  model = FakeModel(reply=' yes\n')
  code, out = run(tmp_path, monkeypatch, model)
  assert code == 0
  lines = [json.loads(line) for line in out.read_text().splitlines()]
  assert [line['question_id'] for line in lines] == [81, 82]
  assert lines[0]['choices'] == [{'index': 0, 'turns': ['yes', 'yes']}]
  assert {'answer_id', 'model_id', 'tstamp'} <= lines[0].keys()
  asked = [model.vocabulary.decode(list(prompt)) for prompt, _ in model.requests]
  assert len(asked) == 4
  assert asked[1] == f's({mt_bench.OPENMOE_SYSTEM})u(One?)a(yes)u(Two?)'
  before = out.read_text()
  out.write_text(before.splitlines()[0] + '\n')
  again = FakeModel(reply='no')
  assert run(tmp_path, monkeypatch, again)[0] == 0
  assert len(again.requests) == 2
  assert out.read_text().splitlines()[0] == before.splitlines()[0]


def test_the_reference_conversation_is_asked_for_by_name(tmp_path, monkeypatch):
  model, system = FakeModel(), tmp_path / 'system'
  system.write_text('Long.\n')
  more = ['--conversation', 'openmoe_reference', '--system_file', str(system)]
  assert run(tmp_path, monkeypatch, model, *more)[0] == 0
  first = model.vocabulary.decode(list(model.requests[0][0]))
  assert first == '<<SYS>>\nLong.\n<</SYS>>\n\n<s>[INST]One? [/INST]'


def ask(tmp_path, *rows):
  path = tmp_path / 'q.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return mt_bench.read_questions(path)


def test_a_text_alone_is_one_turn(tmp_path):
  (question,) = ask(tmp_path, {'question_id': 'a', 'category': ['x'], 'turns': 'Hello?'})
  model = FakeModel(reply=' ok')
  model.chat_template = Template()
  for given in (question, {'question_id': 'a', 'turns': 'Hello?'}):
    (found,) = mt_bench.answer(model, [given], lambda heat: heat)
    assert found['choices'] == [{'index': 0, 'turns': ['ok']}]


@pytest.mark.parametrize(
  ('row', 'said'),
  [
    ({'turns': ['a']}, "no 'question_id'"),
    ({'question_id': None, 'turns': ['a']}, "'question_id' is None"),
    ({'question_id': [1], 'turns': ['a']}, "'question_id' is .1., not a number"),
    ({'question_id': 1}, "no 'turns'"),
    ({'question_id': 1, 'turns': []}, "'turns' must be a list of at least 1"),
    ({'question_id': 1, 'turns': ['a', None]}, "'turns' is empty"),
    ({'question_id': 1, 'turns': ['a', ' ']}, "'turns' has an empty one"),
    ({'question_id': 1, 'turns': {'a': 1}}, "'turns' must be a list"),
  ],
)
def test_questions_of_another_form_are_named(tmp_path, row, said):
  with pytest.raises(ConfigError, match=f'q.jsonl:1: .*{said}'):
    ask(tmp_path, row)


def test_a_question_twice_is_named(tmp_path):
  row = {'question_id': 1, 'turns': ['a']}
  with pytest.raises(ConfigError, match='q.jsonl:2: .*1 is that of .*q.jsonl:1 as well'):
    ask(tmp_path, row, row)


def test_answers_are_read_whatever_characters_they_hold(tmp_path):
  path = tmp_path / 'm' / 'a.jsonl'
  answer = {'question_id': 1, 'choices': [{'index': 0, 'turns': ['é\u2028\x85\x0cx']}]}
  mt_bench.write_answers(path, [answer])
  assert mt_bench.read_answers(path) == [answer]
  path.write_text('{"question_id": [1], "choices": []}\n')
  with pytest.raises(ConfigError, match='a.jsonl:1 is no answer of MT-Bench'):
    mt_bench.read_answers(path)


def test_a_template_that_refuses_says_why(tmp_path, monkeypatch, capsys):
  def refuse(self, messages):
    raise ConfigError('The chat template refuses these messages: no system message.')

  monkeypatch.setattr(Template, 'text', refuse)
  assert run(tmp_path, monkeypatch, FakeModel())[0] == 64
  assert 'no system message' in capsys.readouterr().err


@pytest.mark.parametrize('length', [30, 64])
def test_a_question_that_does_not_fit_is_named(tmp_path, monkeypatch, capsys, length):
  assert run(tmp_path, monkeypatch, FakeModel(max_length=length))[0] == 64
  assert 'question 81 turn' in capsys.readouterr().err
