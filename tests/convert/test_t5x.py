"""A checkpoint that t5x itself wrote: names, optimizer slots, values."""

import pathlib
import shutil
import tarfile

import numpy as np
import pytest
import tensorstore

from convert import workplace
from convert.core.names import name_table
from convert.core.tensors import ConvertError
from convert.run import Options, convert, find_form
from openmoe.config import ModelConfig, MoEConfig
from tests.convert import case
from tests.parity import t5x as parity
from tests.parity.t5x_train import read_by_orbax

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


def directories(path):
  return {p.name for p in path.iterdir() if p.is_dir()}


def expected_directories(form):
  """What t5x reads from directories: leaves with named axes."""
  for path, stored in form.tensors().items():
    slot = path.rsplit('/', 1)[-1]
    factored = slot in ('v_row', 'v_col') and '/expert/' in path
    if path.startswith('target/') or ((slot == 'v' or factored) and stored.shape != (1,)):
      yield path.replace('/', '.')


def test_slots_lie_where_t5x_reads_them_from(golden, model, tmp_path, monkeypatch):
  options = Options(optimizer=True, logits=False)
  assert directories(golden) == set(expected_directories(find_form(golden)))
  run = convert(find_form(golden), 'ours', tmp_path / 'run', model, options)
  back = convert(find_form(run.path), 't5x', tmp_path / 'back', None, options)
  assert directories(pathlib.Path(back.path)) == directories(golden)

  real, done = workplace.move, []

  def until_killed(job):
    done.append(job)
    return real(job) if len(done) < 100 else pytest.fail('killed')

  monkeypatch.setattr(workplace, 'move', until_killed)
  monkeypatch.setattr(workplace, 'THREADS', 1)
  with pytest.raises(pytest.fail.Exception):
    convert(find_form(run.path), 't5x', tmp_path / 'again', None, options)
  monkeypatch.setattr(workplace, 'move', real)
  again = convert(find_form(run.path), 't5x', tmp_path / 'again', None, options)
  assert case.contents(pathlib.Path(again.path)) == case.contents(pathlib.Path(back.path))


def test_what_is_written_as_orbax_is_read_by_orbax(golden, model, tmp_path, monkeypatch):
  options = Options(optimizer=True, logits=False, orbax=True)
  run = convert(find_form(golden), 'ours', tmp_path / 'run', model, Options(optimizer=True))
  real, done = workplace.move, []

  def until_killed(job):
    done.append(job)
    return real(job) if len(done) < 60 else pytest.fail('killed')

  monkeypatch.setattr(workplace, 'move', until_killed)
  with pytest.raises(pytest.fail.Exception):
    convert(find_form(run.path), 't5x', tmp_path / 'back', None, options)
  monkeypatch.setattr(workplace, 'move', real)
  back = convert(find_form(run.path), 't5x', tmp_path / 'back', None, options)
  before, after = find_form(golden).tensors(), find_form(back.path).tensors()
  assert before.keys() == after.keys()
  theirs = read_by_orbax(pathlib.Path(back.path))
  assert theirs.keys() == before.keys()
  for path, stored in before.items():
    x = stored.whole()
    for found in (after[path].whole(), theirs[path]):
      assert (found.dtype, found.shape) == (x.dtype, x.shape), path
      np.testing.assert_array_equal(found, x, err_msg=path)
  assert 'is sound' in case.cli('fsck', back.path, '--model', model)
  with pytest.raises(ConvertError, match='--orbax goes with --to t5x'):
    convert(find_form(run.path), 'hf', tmp_path / 'hf', None, Options(orbax=True))


def test_what_t5x_saves_through_orbax_is_read(golden, model, tmp_path):
  """There `state/` is one OCDBT database of all leaves, by their names with dots."""
  place = tmp_path / 'checkpoint_3' / 'state'
  place.mkdir(parents=True)
  before = find_form(golden)
  for path, stored in before.tensors().items():
    x = stored.whole()
    base = {'driver': 'file', 'path': f'{place}/'}
    kvstore = {'driver': 'ocdbt', 'base': base, 'path': path.replace('/', '.') + '/'}
    spec = {'driver': 'zarr', 'kvstore': kvstore, 'dtype': x.dtype.name}
    spec['metadata'] = {'shape': list(x.shape), 'chunks': list(x.shape)}
    spec['store_data_equal_to_fill_value'] = True
    tensorstore.open(spec, create=True).result().write(x).result()
  form = find_form(tmp_path)
  assert (form.kind, form.step) == ('t5x', 3)
  for path, stored in before.tensors().items():
    np.testing.assert_array_equal(form.tensors()[path].whole(), stored.whole())
  options = Options(optimizer=True, logits=False)
  a = convert(before, 'ours', tmp_path / 'a', model, options)
  b = convert(form, 'ours', tmp_path / 'b', model, options)
  digests = lambda result: [line['sha256_after'] for line in result.receipt['tensors']]
  assert digests(a) == digests(b)
  assert 'is sound' in case.cli('fsck', tmp_path / 'checkpoint_3', '--model', model)
