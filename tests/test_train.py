"""The run around the step: resume after any stop, refusals, divergence, and what is left behind."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from openmoe import train as train_lib
from openmoe.config import ConfigError, ModelConfig, MoEConfig, TrainConfig
from openmoe.feed import Feed
from openmoe.observe.metrics import read_records, read_router
from openmoe.programme import Programme, Stage
from openmoe.running.observation import NonFiniteLoss
from tests.run_case import ROOT, arguments, corpus, curve, source_of, timeless


@pytest.fixture(scope='module')
def source():
  return source_of(corpus())


@pytest.fixture(scope='module')
def undisturbed(source, tmp_path_factory):
  """A complete run: (directory, Result)."""
  folder = tmp_path_factory.mktemp('undisturbed')
  return folder, train_lib.train(**arguments(folder, source))


def test_a_run_leaves_everything_behind(undisturbed):
  folder, result = undisturbed
  assert (result.step, result.complete, result.resumed_from) == (12, True, None)
  assert 0 < result.validation_loss < 7
  assert result.unigram_entropy > 0
  names = {path.name for path in folder.iterdir()}
  assert names >= {'checkpoint_8', 'checkpoint_12', 'metrics.jsonl', 'loss.png', 'experts.png'}
  assert 'checkpoint_4' not in names  # keep_checkpoints=2
  assert [step for step, *_ in curve(folder)] == list(range(1, 13))
  load = read_router(folder)['expert_load']
  assert load.shape == (6, 1, 4)
  np.testing.assert_allclose(load.sum(-1), 1.0, rtol=1e-5)
  validated = [r['step'] for r in read_records(folder, 'validation')]
  assert validated == [6, 12]


class Killed(BaseException):
  """Stands for SIGKILL: nothing of the run may react to it."""


def test_a_killed_run_continues_exactly(undisturbed, source, tmp_path, monkeypatch):
  """Killed between checkpoints; the repeated steps and all later ones give the same numbers."""
  take, taken = Feed.__next__, []

  def dies(self):
    taken.append(1)
    if len(taken) == 7:
      raise Killed
    return take(self)

  monkeypatch.setattr(Feed, '__next__', dies)
  with pytest.raises(Killed):
    train_lib.train(**arguments(tmp_path, source))
  monkeypatch.setattr(Feed, '__next__', take)
  result = train_lib.train(**arguments(tmp_path, source))
  assert result.resumed_from == 4
  assert timeless(tmp_path) == timeless(undisturbed[0])
  for a, b in zip(
    jax.tree.leaves(result.params), jax.tree.leaves(undisturbed[1].params), strict=True
  ):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_sigterm_saves_and_the_same_command_continues(undisturbed, source, tmp_path, monkeypatch):
  take, taken = Feed.__next__, []

  def interrupted(self):
    taken.append(1)
    if len(taken) == 6:
      os.kill(os.getpid(), signal.SIGTERM)
    return take(self)

  monkeypatch.setattr(Feed, '__next__', interrupted)
  stopped = train_lib.train(**arguments(tmp_path, source))
  assert (stopped.step, stopped.complete) == (6, False)
  monkeypatch.setattr(Feed, '__next__', take)
  result = train_lib.train(**arguments(tmp_path, source))
  assert (result.step, result.resumed_from) == (12, 6)
  assert timeless(tmp_path) == timeless(undisturbed[0])


def test_a_complete_run_says_so(undisturbed, source):
  folder, _ = undisturbed
  before = curve(folder)
  result = train_lib.train(**arguments(folder, source))
  assert (result.step, result.complete, result.resumed_from) == (12, True, 12)
  assert curve(folder) == before


def test_divergence_names_step_batch_and_checkpoint(source, tmp_path):
  with pytest.raises(NonFiniteLoss) as error:
    train_lib.train(**arguments(tmp_path, source, learning_rate=1e38))
  text = str(error.value)
  assert 'Step ' in text
  assert 'the last good checkpoint: none' in text
  (batch,) = tmp_path.glob('nonfinite_step_*.npz')
  assert str(batch) in text
  assert np.load(batch)['targets'].shape == (8, 32)
  assert not list(tmp_path.glob('checkpoint_*'))


def test_a_checkpoint_of_another_model_is_refused(undisturbed, source):
  folder, _ = undisturbed
  wrong = arguments(folder, source)
  wrong['model'] = ModelConfig(
    'run_test', 512, 2, 24, 16, 2, 8, num_sparse_layers=1, moe=MoEConfig(4, group_size=32)
  )
  with pytest.raises(ConfigError, match='embed_dim is 16 there and 24 here'):
    train_lib.train(**wrong)


def test_other_data_needs_consent(source, tmp_path):
  """A second stage in one directory: refused, then allowed, then resumed like any run."""
  first = arguments(tmp_path, source, total_steps=2, eval_period=0)
  train_lib.train(**first)
  changes = {'total_steps': 4, 'eval_period': 0}
  second = arguments(tmp_path, source, **changes)
  second['data'] = dataclasses.replace(
    second['data'], mixture_or_task_name='run_test_full_lm_reference'
  )
  with pytest.raises(ConfigError, match='mixture is run_test_full_lm there'):
    train_lib.train(**second)
  second['run'] = dataclasses.replace(second['run'], allow_data_change=True)
  assert train_lib.train(**second).resumed_from == 2
  second['run'] = dataclasses.replace(second['run'], total_steps=5, allow_data_change=False)
  assert train_lib.train(**second).resumed_from == 4


def staged(model_dir, source):
  """Three steps on the corpus as language model, three with UL2 at another length and rate."""
  given = arguments(model_dir, source, total_steps=6, eval_period=0, checkpoint_period=1)
  first = dataclasses.replace(given['data'], num_shards=1)
  second = dataclasses.replace(
    first, mixture_or_task_name='run_test_ul2', task_feature_lengths={'inputs': 32, 'targets': 32}
  )
  rate = dataclasses.replace(given['optimizer'], learning_rate=0.05, schedule='wsd', decay_steps=3)
  stages = (
    Stage('lm', 3 * 8 * 32, first),
    Stage('ul2', 3 * 8 * 64, second, dataclasses.replace(rate, warmup_steps=2)),
  )
  return given | {'data': Programme(stages)}


@pytest.fixture(scope='module')
def undisturbed_stages(source, tmp_path_factory):
  folder = tmp_path_factory.mktemp('stages')
  train_lib.train(**staged(folder, source))
  return folder


def test_a_programme_switches_at_the_exact_step(undisturbed_stages):
  rows = read_records(undisturbed_stages, 'train')
  tokens = [256, 512, 768, 768 + 512, 768 + 1024, 768 + 1536]
  assert [row['tokens_seen'] for row in rows] == tokens
  decay = [0.05 * min(1, (s + 1) / 2) * 0.1 ** (s / 3) for s in range(3)]
  np.testing.assert_allclose([r['learning_rate'] for r in rows], [0.1] * 3 + decay, rtol=1e-5)


def test_a_programme_killed_around_its_switch(undisturbed_stages, source, tmp_path, monkeypatch):
  """Killed just before, at, and just after the switch: the curve of the run that was not."""
  take = Feed.__next__
  for killed_after in (2, 3, 4):

    def dies(self, killed_after=killed_after):
      if self._stream._step == killed_after:
        raise Killed
      return take(self)

    monkeypatch.setattr(Feed, '__next__', dies)
    with pytest.raises(Killed):
      train_lib.train(**staged(tmp_path, source))
    assert len(curve(tmp_path)) == killed_after
  monkeypatch.setattr(Feed, '__next__', take)
  assert train_lib.train(**staged(tmp_path, source)).resumed_from == 4
  assert curve(tmp_path) == curve(undisturbed_stages)


def test_a_programme_too_short_for_the_run_is_refused(source, tmp_path):
  given = staged(tmp_path, source)
  given['run'] = dataclasses.replace(given['run'], total_steps=7)
  with pytest.raises(ConfigError, match=r'3 \(lm\) \+ 3 \(ul2\) = 6 steps'):
    train_lib.train(**given)
  other = dataclasses.replace(given['optimizer'], name='adamw')
  wrong = Programme((Stage('x', 8 * 32 * 6, given['data'].stages[0].data, other),))
  with pytest.raises(ConfigError, match='may change schedule'):
    train_lib.train(**(given | {'data': wrong, 'run': TrainConfig(str(tmp_path), 6)}))


# --- real processes


def command(model_dir, data_dir, *more: str) -> list[str]:
  files = ('models/openmoe_tiny', 'runs/pretrain', 'experiments/demo')
  small = ('TRAIN_STEPS=24', 'LOG_PERIOD=1', 'CHECKPOINT_PERIOD=4', 'EVAL_PERIOD=8')
  model = ('config.ModelConfig.num_layers=2', 'config.ModelConfig.num_sparse_layers=1')
  return [
    sys.executable,
    '-m',
    'scripts.train',
    *(f'--gin_file=gin/{name}.gin' for name in files),
    *(f'--gin.{binding}' for binding in (*small, *model)),
    f"--gin.MODEL_DIR='{model_dir}'",
    *more,
  ]


@pytest.mark.slow
def test_sigkill_at_random_moments(tmp_path):
  """A run killed again and again, also during saves, ends with the curve of one that was not."""
  data = tmp_path / 'data'
  environment = os.environ | {'OPENMOE_DATA_DIR': str(data)}
  call = lambda args: subprocess.run(args, cwd=ROOT, env=environment, check=True)
  call([sys.executable, '-m', 'scripts.prepare_demo'])
  call(command(tmp_path / 'a', data))
  rng, kills = np.random.default_rng(), 0
  while kills < 6:
    process = subprocess.Popen(command(tmp_path / 'b', data), cwd=ROOT, env=environment)
    records = tmp_path / 'b' / 'metrics.jsonl'
    seen = records.stat().st_size if records.exists() else 0
    while process.poll() is None and (not records.exists() or records.stat().st_size <= seen):
      time.sleep(0.05)  # start-up and compilation are the same every time: kill after a step
    try:
      process.wait(timeout=rng.uniform(0.0, 6.0))
      break
    except subprocess.TimeoutExpired:
      process.send_signal(signal.SIGKILL)
      process.wait()
      kills += 1
  call(command(tmp_path / 'b', data))
  assert curve(tmp_path / 'b') == curve(tmp_path / 'a')
  assert len(curve(tmp_path / 'a')) == 24
  assert not [p for p in (tmp_path / 'b').iterdir() if 'tmp' in p.name or 'partial' in p.name]
