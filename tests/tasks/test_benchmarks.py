"""The published benchmarks: prompts of both modes, readings, files, and a run of each."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math

import pyarrow as pa
import pyarrow.parquet
import pytest
import seqio
import tensorflow as tf

from openmoe.config import ConfigError
from openmoe.data import tfds_source
from openmoe.evaluation import run as evaluate
from openmoe.evaluation.items import Item, Prediction, Prompt
from tasks.evaluation import answers, build, catalogue, code, leaderboard, splits
from tests.evaluation_case import FakeModel, Silent
from tests.tasks.benchmark_case import DATA


@pytest.fixture
def data_dir(tmp_path):
  for name, rows in DATA.items():
    path = tmp_path / f'{name}.jsonl'
    path.parent.mkdir(exist_ok=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(tmp_path)


def make(name, mode, data_dir, shots=None):
  return catalogue.BENCHMARKS[name](mode, shots, data_dir)


def first(name, mode, data_dir, shots=None):
  return make(name, mode, data_dir, shots).items()[0]


def test_reference_prompts_keep_the_originals_strings(data_dir):
  get = lambda name: first(name, 'reference', data_dir).prompt.text()
  assert get('triviaqa') == 'Answer the following trivia question:\nQuestion: Who?Answer:'
  # A backslash stays a backslash: the original put passages in by a regular expression.
  assert get('boolq') == 'a \\1 b\n\nQuestion: is it? Tell me yes or no? \n\nAnswer:'
  assert get('lambada') == 'He went to the'
  assert get('arc_challenge') == (
    'Question: Why 0?\n\nOptions:\n(A): w0\n(B): x0\n(C): y0\n(D): z0\n\nAnswer:'
  )
  assert get('humaneval').startswith('Complete the following Python code without any tests or exp')
  assert get('mmlu').startswith(
    'The following are multiple choice questions (with answers) about high school physics.\n\n'
    'q0\nA. w\nB. x\nC. y\nD. z\nAnswer: A\n\n'
  )


def test_fixed_prompts(data_dir):
  get = lambda name, shots=None: first(name, 'fixed', data_dir, shots)
  assert get('triviaqa').prompt.text().endswith('Question: Who?\nAnswer:')
  assert get('boolq').prompt.text() == 'a \\1 b\nQuestion: is it?\nAnswer:'
  assert get('lambada').choices == (' door',)
  arc = get('arc_challenge')
  assert len(arc.prompt.shots) == 25
  assert arc.prompt.text().endswith('\n\nQuestion: Why 0?\nAnswer:')
  assert arc.prompt.shots[0].split('Answer: ')[1][0] in 'wxyz'
  assert arc.choices == (' w0', ' x0', ' y0', ' z0')
  assert arc.scores == (1, 0, 0, 0)
  assert get('hellaswag', 0).prompt.text() == 'Cooking: How to boil 0. Water is hot. The pot'
  assert get('hellaswag').choices[1] == ' sings loud.'
  assert len(get('hellaswag').prompt.shots) == 10
  assert get('piqa').prompt.text() == 'Question: Sit\nAnswer:'
  wino = get('winogrande')
  assert wino.choices == (' fell 0.', ' fell 0.')
  assert [p.query for p in wino.prompts] == ['A hit B, so A', 'A hit B, so B']
  assert wino.scores == (0, 1)
  assert wino.prompt.shots[0].startswith('A ran ')
  truth = get('truthfulqa').prompt.text()
  assert truth.startswith('Q: What is human life expectancy in the United States?\nA: Human')
  assert truth.endswith('1992 Olympics were held in Barcelona, Spain.\n\nQ: Is it?\nA:')
  mbpp = get('mbpp').prompt.text()
  assert mbpp.count('[BEGIN]') == 4
  assert mbpp.count('\nc\n\n[DONE]\n') == 3
  assert mbpp.endswith('tests:\n\nassert one() == 1\n[BEGIN]\n')
  assert len(get('gsm8k').prompt.shots) == 5


def test_shots_are_drawn_alike_every_time_and_differ_by_question(data_dir):
  one, two = (make('arc_challenge', 'fixed', data_dir).items() for _ in range(2))
  assert one == two
  assert one[0].prompt.shots != one[1].prompt.shots
  with pytest.raises(ConfigError, match='31 shots cannot be drawn from 30 examples'):
    make('arc_challenge', 'fixed', data_dir, shots=31).items()


def test_readings_of_answers():
  item = Item('0', Prompt('q'), answers=('The Xi', 'y z'))
  measure = lambda text: answers.measure_trivia(item, Prediction(texts=(text,)))
  assert measure('a "xi".\nmore') == {'em': 1.0, 'f1': 1.0}
  assert measure(' y w, z') == {'em': 0.0, 'f1': 0.8}
  reference = answers.measure_trivia(item, Prediction(texts=(' y w, z',)), 'reference')
  assert reference == {'em': 0.0, 'f1': 0.5}
  assert answers.read_trivia('one\x08two') == 'one'
  assert [answers.read_word(t) for t in (' door, he', 'a\nb', 'x;.', '', '\n')] == [
    'door',
    'a',
    'x;',
    '',
    '',
  ]
  assert answers.read_number('so 3.\n#### 1,234', strict=True) == '1234'
  assert answers.read_number('it is $5.0 then 7', strict=True) is None
  assert answers.read_number('it is 7 or $1,005.0', strict=False) == '1005'
  assert answers.read_number('none', strict=False) is None


def test_ranking_by_sum_character_and_token():
  item = Item('0', Prompt('q'), (' a', ' abcdefgh'), (1.0, 0.0))
  found = build.ranked(item, Prediction(log_probs=(-2.0, -4.0), lengths=(1, 4)))
  assert found == {'acc': 1.0, 'acc_norm': 0.0, 'acc_token': 0.0}


def test_mc2_is_the_share_of_the_true_answers():
  item = Item('0', Prompt('q'), ('a', 'b', 'c'), (1.0, 0.0, 1.0))
  logs = tuple(math.log(p) - 700 for p in (0.1, 0.2, 0.3))
  assert leaderboard.mc2(item, Prediction(logs))['mc2'] == pytest.approx(4 / 6)


def test_programs_are_put_together_and_run(data_dir):
  item = first('humaneval', 'fixed', data_dir)
  task = code.humaneval('fixed', None, data_dir, samples=2, temperature=0.5)
  found = task.measure(item, Prediction(texts=('  return 1\n', '  return 2\n')))
  assert found == {'pass@1': 0.5}
  item = first('mbpp', 'fixed', data_dir)
  texts = ('def one(): return 1', '```python\ndef one():\n  return 1\n```', 'def two(): return 1')
  assert make('mbpp', 'fixed', data_dir).measure(item, Prediction(texts=texts))[
    'pass@1'
  ] == pytest.approx(2 / 3)
  item = dataclasses.replace(item, extra={**item.extra, 'setup': 'import math'})
  texts = ('def one(): return math.floor(1.5)', 'def one(): return cmath.pi')
  rates = make('mbpp', 'fixed', data_dir).measure(item, Prediction(texts=texts))
  assert rates == {'pass@1': 0.5}
  with pytest.raises(ConfigError, match='all the same'):
    code.humaneval('fixed', None, data_dir, samples=5)


@pytest.mark.parametrize('mode', ['reference', 'fixed'])
def test_every_benchmark_runs_to_a_result_file(data_dir, tmp_path, mode):
  names = tuple(catalogue.BENCHMARKS)
  made = catalogue.make_tasks(
    names, prompt_mode=mode, shots=None, bigbench_dir='', data_dir=data_dir
  )
  config = evaluate.EvaluationConfig(
    'none', str(tmp_path / 'out'), names, prompt_mode=mode, max_items=2
  )
  rows = evaluate.evaluate(FakeModel(max_length=9000, reply='  return 1'), made, config, Silent())
  assert [row.group for row in rows] == [*names, 'average']
  assert {row.group: row.score for row in rows}['humaneval'] == 1.0


@pytest.mark.parametrize('mode', ['reference', 'fixed'])
def test_each_is_a_seqio_task(data_dir, mode):
  for name in catalogue.BENCHMARKS:
    task = catalogue.register(name, mode, data_dir, seqio.ByteVocabulary())
    assert task == f'{name}_{mode}'
    row = next(iter(seqio.get_mixture_or_task(task).get_dataset(split='test', shuffle=False)))
    prompt = first(name, mode, data_dir).prompt
    if name != 'winogrande':
      assert row['inputs_pretokenized'].numpy().decode() == prompt.text()
  with pytest.raises(ConfigError, match='no benchmark'):
    catalogue.register('arc', mode, data_dir, seqio.ByteVocabulary())


def test_files_of_every_kind_are_read(tmp_path):
  rows = [{'goal': 'g', 'sol1': 'a', 'sol2': 'b', 'label': i} for i in range(2)]
  folder = tmp_path / 'piqa'
  folder.mkdir()
  (folder / 'a.json').write_text(json.dumps({'data': rows}))
  with gzip.open(folder / 'b.jsonl.gz', 'wt') as file:
    file.writelines(json.dumps(row) + '\n' for row in rows)
  pa.parquet.write_table(pa.Table.from_pylist(rows), folder / 'c.parquet')
  for split in 'abc':
    assert splits.read(str(tmp_path), 'piqa', split) == rows
  (folder / 'd.csv').write_text('goal,label\n"x, y",1\n')
  assert splits.read(str(tmp_path), 'piqa', 'd') == [{'goal': 'x, y', 'label': '1'}]


def test_bad_input_is_named(tmp_path, data_dir):
  with pytest.raises(ConfigError, match=r'needs its test split: there is neither .*boolq'):
    splits.read(data_dir, 'boolq', 'test')
  with pytest.raises(ConfigError, match='nor a prepared TFDS trivia_qa'):
    splits.read(str(tmp_path / 'nowhere'), 'triviaqa', 'validation')
  path = tmp_path / 'piqa' / 'validation.jsonl'
  path.write_text(path.read_text()[:-9])
  with pytest.raises(ConfigError, match='jsonl:1 is no JSON'):
    first('piqa', 'fixed', data_dir)
  path.write_text('')
  with pytest.raises(ConfigError, match='has no records'):
    first('piqa', 'fixed', data_dir)
  path.write_text('{"goal": 1}')
  with pytest.raises(ConfigError, match="no 'sol1'"):
    first('piqa', 'fixed', data_dir)
  path.with_suffix('.parquet').write_bytes(b'PAR1')
  path.unlink()
  with pytest.raises(ConfigError, match='cannot be read'):
    first('piqa', 'fixed', data_dir)


def test_names_are_expanded_and_wrong_ones_are_told_the_nearest():
  assert catalogue.expand(['jetmoe', 'mmlu', 'winowhy'])[-2:] == ['humaneval', 'winowhy']
  assert len(catalogue.expand(['bigbench_lite'])) == 24
  with pytest.raises(ConfigError, match='Nearest: hellaswag'):
    catalogue.expand(['helaswag'])


def test_prepared_tfds_data_is_read(tmp_path, monkeypatch):
  asked = []

  def dataset(self, split, shuffle):
    asked.append((self.tfds_dataset.name, split, shuffle))
    names = ['A', 'B', 'C', 'D']
    return tf.data.Dataset.from_tensor_slices(
      {
        'question': [f'q{i}' for i in range(3)],
        'choices': {
          'text': [[f'{name}{i}' for name in names] for i in range(3)],
          'label': [[0, 1, 2, 3]] * 3,
        },
        'answerKey': [2] * 3,
      }
    )

  monkeypatch.setattr(tfds_source.TfdsDocuments, 'get_dataset', dataset)
  item = first('arc_challenge', 'fixed', str(tmp_path / 'no_files'), shots=1)
  assert item.choices == (' A0', ' B0', ' C0', ' D0')
  assert item.scores == (0, 0, 1, 0)
  assert item.prompt.shots[0].endswith(tuple(f'Answer: C{i}' for i in range(3)))
  name = 'ai2_arc/ARC-Challenge:1.0.0'
  assert asked == [(name, 'test', False), (name, 'train', False)]
