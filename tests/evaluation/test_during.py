"""Benchmarks beside the validation loss of a run."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from openmoe import train as train_lib
from openmoe.config import ConfigError
from openmoe.evaluation import during
from openmoe.evaluation.items import EvaluationTask, Item, Prompt
from openmoe.observe.metrics import read_records
from scripts import gin_flags, while_training
from tests import run_case

ASKED = during.DuringTraining(tasks=('colours',), max_items=3)


def _measure(item, prediction) -> dict[str, float]:
  best = int(np.argmax(prediction.log_probs))
  return {'acc': item.scores[best], 'log_prob': prediction.log_probs[0]}


def colours() -> EvaluationTask:
  words = ('red', 'blue', 'one', 'two')
  items = [Item(w, Prompt(f'the {w}'), (' cat', ' dog'), (1.0, 0.0)) for w in words]
  whole = lambda items, predictions: {'asked': len(predictions)}
  return EvaluationTask('colours', 'colours', lambda: items, 'acc', _measure, whole)


@pytest.fixture
def asked(monkeypatch):
  """Bindings of EVAL_TASKS, and a catalogue that has colours() alone."""
  from tasks.evaluation import catalogue

  given: dict[str, object] = {'tasks': ('colours',), 'max_items': 3}
  monkeypatch.setattr(gin_flags, 'bindings', lambda name: given)
  monkeypatch.setattr(catalogue, 'make_tasks', lambda names, **options: [colours()])
  return given


def with_run(tmp_path, **run) -> dict:
  source = run_case.source_of(run_case.corpus())
  return while_training.with_benchmarks(run_case.arguments(tmp_path, source, **run))


def test_figures_stand_with_every_validation_and_the_best_is_kept(tmp_path, asked):
  run = {'eval_period': 2, 'checkpoint_period': 2, 'keep_checkpoints': 1, 'keep_best': 1}
  given = with_run(tmp_path, total_steps=6, keep_best_by='colours', **run)
  assert given['run'].keep_best_by == 'colours/acc'
  measure, figures = given['more_metrics'], iter((0.9, 0.2, 0.1))
  given['more_metrics'] = lambda params: measure(params) | {'colours/acc': next(figures)}
  result = train_lib.train(**given)
  found = {r['step']: r for r in read_records(tmp_path, 'validation')}
  assert set(found) == {2, 4, 6}
  for record in found.values():
    assert record['colours/asked'] == 3
    assert record['colours/log_prob'] < 0
  assert found[2]['colours/log_prob'] != found[4]['colours/log_prob']
  again = measure(result.params)
  assert {n: found[6][n] for n in again} == again | {'colours/acc': 0.1}
  assert 0 <= again['colours/acc'] <= 1
  assert {path.name for path in tmp_path.glob('checkpoint_*')} == {'checkpoint_2', 'checkpoint_6'}
  saved = json.loads((tmp_path / 'checkpoint_2' / 'metadata' / 'metadata').read_text())
  assert saved['metadata']['validation']['colours/acc'] == 0.9


def test_what_nobody_measures_is_refused(tmp_path, asked):
  with pytest.raises(ConfigError, match=r"KEEP_BEST_BY='boolq' is neither loss nor accuracy, nor"):
    with_run(tmp_path, keep_best_by='boolq')
  with pytest.raises(ConfigError, match='needs EVAL_PERIOD above 0'):
    with_run(tmp_path, eval_period=0)
  asked['tasks'] = ()
  assert 'more_metrics' not in with_run(tmp_path)


def test_several_processes_and_wrong_numbers_are_refused(monkeypatch):
  with pytest.raises(ConfigError, match='max_items'):
    dataclasses.replace(ASKED, max_items=0)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(ConfigError, match='scripts.evaluate'):
    during.benchmarks(ASKED, [], None, None, 32)
