"""The tiny models in all their forms, made once for a test process."""

import pytest

from tests.convert import case


@pytest.fixture(scope='session')
def ours(tmp_path_factory):
  return case.write_ours(tmp_path_factory.mktemp('convert') / 'run') / f'checkpoint_{case.STEP}'


@pytest.fixture(scope='session')
def hf(ours, tmp_path_factory):
  return case.run_convert(ours, 'hf', tmp_path_factory.mktemp('convert') / 'hf')


@pytest.fixture(scope='session')
def t5x(ours, tmp_path_factory):
  return case.run_convert(ours, 't5x', tmp_path_factory.mktemp('convert') / 't5x')


@pytest.fixture(scope='session')
def jetmoe(tmp_path_factory):
  run = case.write_ours(tmp_path_factory.mktemp('convert') / 'run', config=case.JETMOE)
  return run / f'checkpoint_{case.STEP}'


@pytest.fixture(scope='session')
def jetmoe_hf(jetmoe, tmp_path_factory):
  return case.run_convert(jetmoe, 'hf', tmp_path_factory.mktemp('convert') / 'hf')


@pytest.fixture(scope='session')
def model(tmp_path_factory):
  """--model for the tiny model."""
  return case.model_file(tmp_path_factory.mktemp('convert') / 'model.json')
