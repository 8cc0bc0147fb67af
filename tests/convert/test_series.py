"""A family of checkpoints as revisions: names, receipts, and what is refused before anything."""

import json

import pytest

from convert.core.forms import RECEIPT
from convert.series import checkpoints, revision_name
from tests.convert import case


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  path = tmp_path_factory.mktemp('series') / 'run'
  for step in (20, 7):
    case.write_ours(path, step=step)
  return path


def test_every_checkpoint_of_a_run_becomes_a_revision(run, tmp_path):
  arguments = (
    'series',
    run,
    tmp_path / 'family',
    '--tokens_per_step',
    4_000_000_000,
    '--no_logits',
  )
  said = case.cli(*arguments)
  names = ['step7-tokens28B', 'step20-tokens80B']
  assert [line.split(':')[0] for line in said.splitlines()] == names
  for name in names:
    receipt = json.loads((tmp_path / 'family' / name / RECEIPT).read_text())
    assert receipt['each_source_tensor_used_once']
  assert [path.name for path in checkpoints(tmp_path / 'family')] == names
  before = case.contents(tmp_path / 'family')
  assert case.cli(*arguments).count('complete already') == 2
  assert case.contents(tmp_path / 'family') == before


def test_a_checkpoint_that_does_not_tell_its_tokens_is_refused(run, tmp_path):
  said = case.cli('series', run, tmp_path / 'family', expect=64)
  assert 'give --tokens_per_step' in said
  assert not (tmp_path / 'family').exists()


def test_two_checkpoints_of_one_name_are_refused(run, tmp_path):
  said = case.cli('series', run, run / 'checkpoint_7', tmp_path / 'family', '--tokens_per_step', 1,
                  expect=64)  # fmt: skip
  assert 'would both be step7' in said
  assert not (tmp_path / 'family').exists()


def test_names_tell_small_runs_apart():
  assert revision_name(200, 819_200) == 'step200-tokens0.0008B'
  assert revision_name(100_000, 400_000_000_000) == 'step100000-tokens400B'
