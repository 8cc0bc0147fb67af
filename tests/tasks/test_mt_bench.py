"""MT-Bench answers: prompts of two turns, FastChat's fields, and taking up what is there."""

from __future__ import annotations

import json

import pytest

from scripts import mt_bench as script
from tasks.evaluation import mt_bench
from tests.evaluation_case import FakeModel

QUESTIONS = [
  {'question_id': 81, 'category': 'writing', 'turns': ['One?', 'Two?']},
  {'question_id': 82, 'category': 'math', 'turns': ['1+1?', 'Sure?']},
]


def test_conversations():
  make = lambda name: mt_bench.CONVERSATIONS[name][0](['a', 'b'], ['c'], 'S')
  head = '<<SYS>>\nS\n<</SYS>>\n\n<s>[INST]'
  assert make('openmoe_reference') == f'{head}a [/INST] c </s><s>[INST] b [/INST]'
  assert make('openmoe') == f'{head} a [/INST] c </s><s>[INST] b [/INST]'
  assert make('jetmoe') == (
    '<|system|>\nS</s>\n<|user|>\na</s>\n<|assistant|>\nc</s>\n<|user|>\nb</s>\n<|assistant|>\n'
  )


def run(tmp_path, monkeypatch, model):
  questions = tmp_path / 'question.jsonl'
  questions.write_text(''.join(json.dumps(q) + '\n' for q in QUESTIONS))
  monkeypatch.setattr(script, 'load_model', lambda checkpoint, dtype: model)
  out = tmp_path / 'answers' / 'm.jsonl'
  arguments = ['none', '--questions', str(questions), '--model_id', 'm', '--out', str(out)]
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
  assert asked[1].endswith('[INST] One? [/INST] yes </s><s>[INST] Two? [/INST]')
  before = out.read_text()
  out.write_text(before.splitlines()[0] + '\n')
  again = FakeModel(reply='no')
  assert run(tmp_path, monkeypatch, again)[0] == 0
  assert len(again.requests) == 2
  assert out.read_text().splitlines()[0] == before.splitlines()[0]


@pytest.mark.parametrize('length', [60, 100])
def test_a_question_that_does_not_fit_is_named(tmp_path, monkeypatch, capsys, length):
  assert run(tmp_path, monkeypatch, FakeModel(max_length=length))[0] == 64
  assert 'question 81 turn' in capsys.readouterr().err
