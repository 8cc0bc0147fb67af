"""A checkpoint as training saves it, with optimizer state, to t5x and back, and to a fsck."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.core.names import name_table
from convert.run import Options, convert, find_form
from convert.sizes import of_form
from openmoe.checkpoint import checkpointer as checkpoint
from openmoe.checkpoint.description import identity, model_fields
from openmoe.config import OptimizerConfig
from openmoe.optimizer import learning_rate, make_optimizer
from openmoe.train_state import TrainState, abstract_params
from tests.convert import case

# Low enough that all matrices are factored, among them gates along either side.
OPTIMIZER = OptimizerConfig(min_dim_size_to_factor=4)


def random_state() -> TrainState:
  shapes, axes = abstract_params(case.CONFIG)
  generator = np.random.default_rng(0)
  fill = lambda leaf: jnp.asarray(generator.standard_normal(leaf.shape, np.float32))
  params = jax.tree.map(fill, shapes)
  optimizer = make_optimizer(OPTIMIZER, axes, learning_rate(OPTIMIZER, 9))
  opt_state = jax.tree.map(lambda x: fill(x) if x.ndim else x, optimizer.init(params))
  opt_state = opt_state._replace(count=jnp.int32(case.STEP))
  return TrainState(jnp.int32(case.STEP), params, opt_state)


@pytest.fixture(scope='module')
def state():
  return random_state()


@pytest.fixture(scope='module')
def trained(state, tmp_path_factory):
  run = tmp_path_factory.mktemp('trained')
  checkpointer = checkpoint.Checkpointer(run, keep=1, identity=identity(case.CONFIG))
  checkpointer.save(case.STEP, state, {'0': b'position'}, {})
  checkpointer.close()
  return run


def test_state_survives_the_way_to_t5x_and_back(trained, state, tmp_path):
  options = Options(optimizer=True)
  t5x = convert(find_form(trained), 't5x', tmp_path / 't5x', None, options)
  form = find_form(t5x.path)
  wi_0 = 'state/param_states/decoder/layers_1/mlp/expert/wi_0/kernel'
  assert form.tensors()[f'{wi_0}/v_row'].shape == (4, 32)
  assert form.tensors()[f'{wi_0}/v_col'].shape == (4, 96)
  assert form.tensors()[f'{wi_0}/v'].shape == (1,)
  model = case.model_file(tmp_path / 'model.json')
  convert(form, 'ours', tmp_path / 'back', model, options)
  reader = checkpoint.Checkpointer(
    tmp_path / 'back', keep=1, identity=identity(case.CONFIG), read_only=True
  )
  assert reader.latest_step() == case.STEP
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
  restored = reader.restore(case.STEP, abstract)[0]
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_a_saved_checkpoint_is_sound_and_exports(trained, state, tmp_path):
  assert 'is sound' in case.cli('fsck', trained)
  hf = case.run_convert(trained, 'hf', tmp_path / 'hf')
  found = case.loaded(hf)
  flat = {
    '/'.join(k.key for k in path): np.asarray(x)
    for path, x in jax.tree_util.tree_flatten_with_path(state.params)[0]
  }
  for row in name_table(case.CONFIG):
    np.testing.assert_array_equal(found[row.hf], row.to_t5x(flat[row.ours]))


def test_a_checkpoint_of_training_tells_what_it_computes(state, tmp_path):
  moe = dataclasses.replace(case.CONFIG.moe, top_k=3)
  config = dataclasses.replace(case.CONFIG, moe=moe, norm_epsilon=1e-4, dtype='bfloat16')
  saver = checkpoint.Checkpointer(tmp_path, keep=1, identity=identity(config))
  saver.save(case.STEP, state, {}, {'model': model_fields(config)})
  saver.close()
  assert of_form(find_form(tmp_path), None) == config


def test_large_parameters_are_saved_in_chunks_of_a_layer(state, tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint, 'LARGEST_CHUNK', 4 << 10)
  saver = checkpoint.Checkpointer(tmp_path, keep=1, identity=identity(case.CONFIG))
  saver.save(case.STEP, state, {}, {})
  saver.close()
  row = next(r for r in name_table(case.CONFIG) if r.hf == 'model.layers.3.mlp.experts.wo')
  form = find_form(tmp_path)
  assert form.parameter(row).unit == 1  # an expert can be read without the others
  assert 'is sound' in case.cli('fsck', tmp_path)
  restored = restored_state(tmp_path, state)
  jax.tree.map(np.testing.assert_array_equal, restored, state)


def restored_state(run, state):
  reader = checkpoint.Checkpointer(run, keep=1, identity=identity(case.CONFIG), read_only=True)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
  return reader.restore(case.STEP, abstract)[0]
