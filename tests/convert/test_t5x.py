"""A checkpoint that t5x itself wrote: names, optimizer slots, values."""

import shutil
import tarfile

import numpy as np
import pytest

from convert.core.names import name_table
from convert.run import Options, convert, find_form
from openmoe.config import ModelConfig, MoEConfig
from tests.convert import case
from tests.parity import t5x as parity

CONFIG = ModelConfig(
  name='golden',
  vocab_size=192,
  num_layers=4,
  embed_dim=48,
  mlp_dim=64,
  num_heads=3,
  head_dim=24,
  num_sparse_layers=2,
  moe=MoEConfig(num_experts=8),
  dtype='float32',
)


@pytest.fixture(scope='module')
def golden(tmp_path_factory):
  place = tmp_path_factory.mktemp('golden')
  with tarfile.open(case.GOLDEN / 't5x_checkpoint_a.tar.gz') as archive:
    archive.extractall(place, filter='data')
  return place / 'checkpoint_3'


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return case.model_file(tmp_path_factory.mktemp('golden') / 'model.json', CONFIG)


def test_state_round_trip_is_bit_exact_with_optimizer(golden, model, tmp_path):
  options = Options(optimizer=True)
  run = convert(find_form(golden), 'ours', tmp_path / 'run', model, options)
  back = convert(find_form(run.path), 't5x', tmp_path / 'back', None, options)
  before, after = find_form(golden), find_form(back.path)
  assert (before.step, after.step) == (3, 3)
  assert before.tensors().keys() == after.tensors().keys()
  for name, stored in before.tensors().items():
    there = after.tensors()[name]
    assert (stored.shape, stored.dtype) == (there.shape, there.dtype), name
    assert stored.sha256() == there.sha256(), name
  used = [n for n, s in before.tensors().items() if '/param_states/' in n and s.shape != (1,)]
  assert len(used) == 49 + 2 * 3  # one slot a tensor, two of each of the six expert stacks


def test_without_optimizer_only_parameters_come_along(golden, model, tmp_path):
  run = convert(find_form(golden), 'ours', tmp_path / 'run', model, Options())
  form = find_form(run.path)
  assert not form.has_optimizer
  assert run.tensors == len(list(name_table(CONFIG)))
  assert int(form.tensors()['state/step'].whole()) == 3


def test_fsck_of_the_golden_checkpoint_and_of_damaged_ones(golden, model, tmp_path):
  assert 'is sound' in case.cli('fsck', golden, '--model', model)
  lost = shutil.copytree(golden, tmp_path / 'lost' / 'checkpoint_3')
  (lost / 'target.decoder.layers_1.mlp.expert.wo.kernel' / '2.0.0').unlink()
  text = case.cli('fsck', lost, '--model', model, expect=1)
  assert 'target/decoder/layers_1/mlp/expert/wo/kernel: chunk 2.0.0 is missing' in text
  stray = shutil.copytree(golden, tmp_path / 'stray' / 'checkpoint_3')
  kernel = 'target.decoder.layers_1.self_attention.out.kernel'
  shutil.copytree(stray / kernel, stray / kernel.replace('_1', '_9'))
  assert 'layers_9' in case.cli('fsck', stray, '--model', model, expect=1)


def test_experts_in_a_chunk_each_are_read_one_by_one(golden):
  stored = find_form(golden).tensors()['target/decoder/layers_1/mlp/expert/wi_0/kernel']
  assert stored.unit == 2  # two experts to a chunk, as t5x sharded them
  whole = stored.whole()
  np.testing.assert_array_equal(stored.read(3, 4)[0], whole[3])


def test_parity_with_the_state_that_t5x_had_in_memory(golden):
  result = parity.compare(golden, parity.load(case.GOLDEN / 't5x_state_a.npz'))
  assert all(result[name] <= limit for name, limit in parity.LIMITS.items()), result
