"""Runs that start from a checkpoint of t5x's or Hugging Face's form."""

from __future__ import annotations

import dataclasses
import pathlib
import tarfile

import jax
import numpy as np
import pytest

from convert import starting
from convert.core.names import name_table
from convert.run import find_form
from openmoe.config import ConfigError, TrainConfig
from tests.convert import case
from tests.convert.test_t5x import CONFIG


@pytest.fixture(scope='module')
def golden(tmp_path_factory) -> pathlib.Path:
  place = tmp_path_factory.mktemp('golden')
  with tarfile.open(case.GOLDEN / 't5x_checkpoint_a.tar.gz') as archive:
    archive.extractall(place, filter='data')
  return place / 'checkpoint_3'


def started(tmp_path, checkpoint, state='params', config=CONFIG) -> TrainConfig:
  run = TrainConfig(
    str(tmp_path / 'run'), 10, initial_checkpoint=str(checkpoint), initial_state=state
  )
  return starting.with_own_checkpoint(run, config)


def same_weights(one, other, config) -> None:
  a, b = case.loaded(pathlib.Path(one), config), case.loaded(pathlib.Path(other), config)
  for row in name_table(config):
    np.testing.assert_array_equal(a[row.name], b[row.name])


def test_a_checkpoint_of_t5x_goes_on_with_its_optimizer(golden, tmp_path):
  run = started(tmp_path, golden, 'all')
  assert run.initial_checkpoint == str(tmp_path / 'run/imported/checkpoint_3')
  form = find_form(run.initial_checkpoint)
  assert (form.kind, form.step, form.has_optimizer) == ('ours', 3, True)
  assert form.receipt() is not None
  same_weights(run.initial_checkpoint, golden, CONFIG)
  again = started(tmp_path, golden, 'all')
  assert again == run


def test_a_folder_of_hugging_face_gives_parameters(tmp_path):
  ours = case.write_ours(tmp_path / 'ours')
  folder = case.run_convert(ours, 'hf', tmp_path / 'hf')
  with pytest.raises(ConfigError, match="no optimizer state.*INITIAL_STATE = 'params'"):
    started(tmp_path, folder, 'all', case.CONFIG)
  run = started(tmp_path, folder, config=case.CONFIG)
  same_weights(run.initial_checkpoint, ours, case.CONFIG)


def test_another_model_is_refused(golden, tmp_path):
  other = dataclasses.replace(CONFIG, embed_dim=64)
  with pytest.raises(ConfigError, match=r'initial_checkpoint=.*checkpoint_3'):
    started(tmp_path, golden, config=other)


def test_several_processes_are_told_the_command(golden, tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(ConfigError, match='python -m convert import --from t5x --optimizer --model'):
    started(tmp_path, golden, 'all')


def test_our_own_checkpoints_and_what_is_not_there_stay_as_they_are(tmp_path, golden):
  run = TrainConfig('nowhere', 10)
  assert starting.with_own_checkpoint(run, CONFIG) is run
  ours = case.write_ours(tmp_path / 'ours') / f'checkpoint_{case.STEP}'
  assert started(tmp_path, ours, config=case.CONFIG).initial_checkpoint == str(ours)
  assert started(tmp_path, tmp_path / 'none').initial_checkpoint == str(tmp_path / 'none')
  case.write_ours(tmp_path / 'run')  # the run has a checkpoint of its own, from which it goes on
  assert started(tmp_path, golden).initial_checkpoint == str(golden)
