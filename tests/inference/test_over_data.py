"""Inference over data: files that do not depend on how often a run was killed."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

from convert.core.forms import Options
from convert.run import convert, find_form
from openmoe.config import ConfigError
from openmoe.data import examples
from openmoe.inference import over_data
from openmoe.inference.decode import Sampling
from openmoe.inference.model import Score
from openmoe.inference.over_data import InferConfig, Mode, infer
from openmoe.inference.rows import Generation
from tests import run_case
from tests.convert import case as convert_case
from tests.data import case as data_case
from tests.inference import case

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Model:
  """Answers that depend on the seed and on what else is in a batch, as bad ones might."""

  fingerprint, max_length, start_id, eos_ids = 'f' * 64, 64, 0, (1,)

  def generate(self, prompts, max_new_tokens, *, stop, sampling, samples, seed):
    told = f'{prompts} {max_new_tokens} {stop} {sampling} {seed}'.encode()
    text = lambda i, j: f'{zlib.crc32(told)} {i} {j}'
    one = lambda i, j: Generation(text(i, j), (5,), (-0.25 * j, -1.0), 'length')
    return [[one(i, j) for j in range(samples)] for i in range(len(prompts))]

  def score(self, requests):
    one = lambda context, continuation: float(-len(context) - 100 * len(continuation))
    return [Score(one(*request), (), False) for request in requests]


@pytest.fixture(scope='module')
def model():
  return Model()


@pytest.fixture(scope='module')
def data():
  """Ten examples of inputs and targets, two of them alike."""
  rng = np.random.default_rng(0)
  draw = lambda: rng.integers(5, 60, rng.integers(2, 6)).tolist()
  found = [({'number': i}, draw(), draw()) for i in range(9)]
  return [*found, ({'number': 9}, *found[8][1:])]


def config(place, **changes) -> InferConfig:
  options = {'chunk': 3, 'max_new_tokens': 4, 'sampling': Sampling(1.0), 'seed': 5}
  return InferConfig('data', str(place), **(options | changes))


def lines(path) -> list[dict]:
  return [json.loads(line) for line in pathlib.Path(path).read_text('utf-8').splitlines()]


class KilledError(BaseException):
  """Ends a run where no code catches it."""


@pytest.mark.parametrize('writes', range(5))
def test_a_killed_run_ends_in_the_undisturbed_file(model, data, tmp_path, monkeypatch, writes):
  """Before the first chunk, after each, and before the chunks are joined."""
  whole = infer(model, data, config(tmp_path / 'a'))
  left = [writes]

  def write(path, content):
    if not left[0]:
      raise KilledError
    left[0] -= 1
    real(path, content)

  def join(*_):
    raise KilledError

  real = over_data.write_whole
  with monkeypatch.context() as patched:
    patched.setattr(over_data, 'write_whole', write)
    patched.setattr(over_data, '_join', join)
    with pytest.raises(KilledError):
      infer(model, data, config(tmp_path / 'b'))
  assert not config(tmp_path / 'b').file().exists()
  done = []
  again = infer(model, data, config(tmp_path / 'b'), lambda count, new: done.append(new))
  assert again.read_bytes() == whole.read_bytes()
  # The first write is that of the settings.
  before = max(0, writes - 1)
  assert done == [0] * before + [3, 3, 3, 1][before:]
  assert sorted(p.name for p in again.parent.iterdir()) == [
    'data-predict.json',
    'data-predict.jsonl-00000-of-00001',
  ]


def test_shards_together_are_the_whole(model, data, tmp_path):
  score = {'mode': 'score'}
  whole = lines(infer(model, data, config(tmp_path / 'a', **score)))
  parts = []
  for shard in range(3):
    own = config(tmp_path / 'b', num_shards=3, shard_id=shard, **score)
    parts += lines(infer(model, data, own))
  assert sorted(parts, key=lambda line: line['index']) == whole
  assert [line['inputs']['number'] for line in whole] == list(range(10))


def test_every_mode_says_what_the_model_says(model, data, tmp_path):
  greedy = {'sampling': Sampling(), 'chunk': 10}
  inputs = [inputs for _, inputs, _ in data]
  expected = model.generate(inputs, 4, stop=(), sampling=Sampling(), samples=1, seed=5)
  predicted = lines(infer(model, data, config(tmp_path, **greedy)))
  assert [line['prediction'] for line in predicted] == [found[0].text for found in expected]
  scored = lines(infer(model, data, config(tmp_path, mode='score', **greedy)))
  scores = model.score([(inputs, targets) for _, inputs, targets in data])
  assert [line['score'] for line in scored] == [score.log_prob for score in scores]
  aux = config(tmp_path, mode=Mode.PREDICT_WITH_AUX, samples=2, **greedy)
  for line in lines(infer(model, data, aux)):
    assert len(line['prediction']) == 2
    assert line['aux'] == {'scores': [-1.0, -1.25], 'finish': ['length', 'length']}


def test_other_settings_and_other_examples_are_refused(model, data, tmp_path, monkeypatch):
  infer(model, data, config(tmp_path / 'a'))
  with pytest.raises(ConfigError, match='seed 5; now it is 6'):
    infer(model, data, config(tmp_path / 'a', seed=6))
  place = config(tmp_path / 'b')

  def join(*_):
    raise KilledError

  with monkeypatch.context() as patched:
    patched.setattr(over_data, '_join', join)
    with pytest.raises(KilledError):
      infer(model, data, place)
  with pytest.raises(ConfigError, match='the input has changed'):
    infer(model, data[::-1], place)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'shard_id': 2, 'num_shards': 2}, 'less than num_shards'),
    ({'mode': 'guess'}, 'predict'),
    ({'chunk': 0}, 'chunk'),
  ],
)
def test_wrong_settings_are_refused(tmp_path, changes, words):
  with pytest.raises(ConfigError, match=words):
    config(tmp_path, **changes)


def test_nothing_to_do_and_too_long_examples_are_refused(model, data, tmp_path):
  with pytest.raises(ConfigError, match='no examples for shard 10 of 11'):
    infer(model, data, config(tmp_path / 'a', num_shards=11, shard_id=10))
  with pytest.raises(ConfigError, match=r'Example 1 of data needs 72 tokens.*--inputs_length'):
    infer(model, [data[0], ({}, [5] * 70, [])], config(tmp_path / 'b'))


def test_lines_of_a_file(tmp_path):
  path = tmp_path / 'data.jsonl'
  path.write_text('{"inputs": "abc", "targets": "d"}\n\n{"prompt": "ef"}\n{"targets": "g"}\n')
  encode = case.Numbers().encode
  found = list(examples.open_examples(str(path), 'unused', encode, 2))
  ids = [(inputs, targets) for _, inputs, targets in found]
  assert ids == [(encode('bc'), encode('d')), (encode('ef'), []), ([], encode('g'))]
  path.write_text('{"inputs": 3}\n')
  with pytest.raises(ConfigError, match=r'data.jsonl:1 has no text under inputs'):
    list(examples.of_jsonl(str(path), encode))
  path.write_text('[]\n')
  with pytest.raises(ConfigError, match=r'data.jsonl:1: a list'):
    list(examples.of_jsonl(str(path), encode))


def test_examples_of_a_task(tmp_path):
  data_case.make_corpus(tmp_path, 'infer')
  encode = data_case.VOCABULARY.encode
  found = list(examples.of_task('infer_full_lm', 'validation', encode, targets_length=32))
  again = list(examples.of_task('infer_full_lm', 'validation', encode, targets_length=32))
  assert found == again and found
  assert all(inputs == [] and 0 < len(targets) <= 32 for _, inputs, targets in found)
  assert all(json.dumps(record) for record, _, _ in found)
  with pytest.raises(ConfigError, match="no split 'test'"):
    next(examples.of_task('infer_full_lm', 'test', encode))
  with pytest.raises(ConfigError, match='another vocabulary'):
    next(examples.of_task('infer_full_lm', 'train', case.Numbers().encode))


@pytest.mark.slow
def test_a_process_killed_in_the_middle(tmp_path):
  """SIGKILL of scripts.infer, twice, against one run that nobody kills."""
  source = run_case.source_of(run_case.corpus())
  sizes = dataclasses.replace(convert_case.CONFIG, vocab_size=512)
  weights = convert_case.weights(sizes)
  run = convert_case.write_ours(tmp_path / 'dense', weights, config=sizes)
  options = Options(optimizer=False, logits=False)
  folder = convert(find_form(run), 'hf', tmp_path / 'hf', None, options).path
  rows = [{'inputs': f'{word} red blue'} for word in ('one', 'two', 'cat', 'dog') * 5]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))

  def start(out: str) -> subprocess.Popen:
    arguments = [f'--checkpoint={folder}', f'--input={tmp_path}/rows.jsonl', '--chunk=4']
    arguments += [f'--out_dir={tmp_path / out}', f'--vocabulary={source.vocabulary}']
    arguments += ['--max_new_tokens=24', '--temperature=1']
    return subprocess.Popen(
      [sys.executable, '-m', 'scripts.infer', *arguments],
      cwd=ROOT,
      env=os.environ | {'PYTHONPATH': str(ROOT)},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  whole = start('a')
  said = whole.communicate(timeout=1500)[0]
  assert whole.returncode == 0, said
  for chunks in (1, 3):
    process, end = start('b'), time.monotonic() + 1200
    while len(list((tmp_path / 'b').glob('*.partial/chunk_*'))) < chunks:
      assert process.poll() is None and time.monotonic() < end, process.stdout.read()
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
  last = start('b')
  said = last.communicate(timeout=1500)[0]
  assert last.returncode == 0 and 'done before' in said, said
  name = 'rows-predict.jsonl-00000-of-00001'
  assert (tmp_path / 'b' / name).read_bytes() == (tmp_path / 'a' / name).read_bytes()
