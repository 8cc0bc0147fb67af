"""A checkpoint as training saves it, with optimizer state, to t5x and back, and to a fsck."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.core.names import name_table
from convert.core.tensors import ConvertError
from convert.formats import hf_config
from convert.run import Options, convert, find_form
from convert.sizes import of_form
from openmoe.checkpoint import checkpointer as checkpoint
from openmoe.checkpoint import description
from openmoe.checkpoint.description import identity
from openmoe.config import (
  CapacityConvention,
  Dispatch,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  Remat,
  RouterLoss,
  RouterOrder,
)
from openmoe.models import abstract_params
from openmoe.optimizer import learning_rate, make_optimizer
from openmoe.train_step import TrainState
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


def described(config, **told) -> dict:
  """The metadata that training writes."""
  return {description.KEY: description.Description(config, **told).plain()}


@pytest.fixture(scope='module')
def trained(state, tmp_path_factory):
  run = tmp_path_factory.mktemp('trained')
  checkpointer = checkpoint.Checkpointer(run, keep=1, identity=identity(case.CONFIG))
  checkpointer.save(case.STEP, state, {'0': b'position'}, described(case.CONFIG))
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
  saver.save(case.STEP, state, {}, described(config))
  saver.close()
  assert of_form(find_form(tmp_path), None) == config


def test_large_parameters_are_saved_in_chunks_of_a_layer(state, tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint, 'LARGEST_CHUNK', 4 << 10)
  saver = checkpoint.Checkpointer(tmp_path, keep=1, identity=identity(case.CONFIG))
  saver.save(case.STEP, state, {}, described(case.CONFIG))
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


# Values of every field that does not shape a parameter, none of them the default.
COMPUTED = {
  'dtype': 'float32',
  'dropout_rate': 0.125,
  'init_scale': 0.3,
  'init_std': 0.2,
  'rope_theta': 5000.0,
  'norm_epsilon': 1e-3,
  'final_norm_epsilon': 1e-2,
  'float32_attention': True,
  'remat': Remat.FULL,
  'vocab_block': 128,
  'logit_z_weight': 0.5,
}
ROUTED = {
  'top_k': 3,
  'group_size': 512,
  'capacity_factor': 2.5,
  'eval_capacity_factor': 3.0,
  'min_expert_capacity': 7,
  'capacity_convention': CapacityConvention.COLOSSALAI,
  'router_order': RouterOrder.TOP_K_SOFTMAX,
  'load_balance_weight': 0.5,
  'router_z_weight': 0.25,
  'router_loss': RouterLoss.SUM,
  'router_init_std': 0.7,
  'jitter_noise': 0.01,
  'ignore_padding': True,
  'dispatch': Dispatch.MASK,
}
SHAPES = {'name', 'vocab_size', 'num_layers', 'embed_dim', 'mlp_dim', 'num_heads', 'head_dim'}
SHAPES |= {'num_sparse_layers', 'moe', 'architecture'}


def unusual() -> ModelConfig:
  """case.CONFIG, every other field changed."""
  moe = dataclasses.replace(case.CONFIG.moe, **ROUTED)
  return dataclasses.replace(case.CONFIG, moe=moe, **COMPUTED)


def test_every_field_has_another_value_than_the_default():
  for kind, changed, shapes in (
    (ModelConfig, COMPUTED, SHAPES),
    (MoEConfig, ROUTED, {'num_experts'}),
  ):
    fields = {f.name: f.default for f in dataclasses.fields(kind) if f.name not in shapes}
    missing = sorted(fields.keys() - changed.keys())
    assert not missing, f'give {missing} a value in this file: it must survive every form'
    same = [n for n, v in changed.items() if v == fields[n] and n != 'dtype']
    assert not same


@pytest.mark.parametrize('kind', ['hf', 't5x'])
def test_every_field_survives_every_form(kind, state, tmp_path):
  config = unusual()
  saver = checkpoint.Checkpointer(tmp_path / 'ours', keep=1, identity=identity(config))
  saver.save(case.STEP, state, {}, described(config))
  saver.close()
  there = convert(find_form(tmp_path / 'ours'), kind, tmp_path / kind, None, Options())
  back = convert(find_form(there.path), 'ours', tmp_path / 'back', None, Options())
  assert of_form(find_form(back.path), None) == config
  reader = checkpoint.Checkpointer(tmp_path / 'back', 1, None, read_only=True)
  assert reader.describe(case.STEP).model == config
  reader.close()


def test_what_jetmoe_cannot_hold_is_refused_by_name():
  for change, name in (
    ({'norm_epsilon': 1e-3}, 'norm_epsilon=0.001'),
    ({'moe': dataclasses.replace(case.JETMOE.moe, router_order=RouterOrder.SOFTMAX_TOP_K)},
     'router_order='),
  ):  # fmt: skip
    with pytest.raises(ConvertError, match=f'--to hf: {name}'):
      hf_config.to_hf(dataclasses.replace(case.JETMOE, **change), 'float32', None, {})


@pytest.mark.parametrize('clip', [None, 1.0])
def test_moments_are_found_where_the_optimizer_puts_them(clip, state, tmp_path):
  """Clipping makes the optimizer a chain, whose state lies one level deeper."""
  record = description.optimizer_record(OptimizerConfig(clip_global_norm=clip))
  whole = state if clip is None else state.replace(opt_state=((), state.opt_state))
  saver = checkpoint.Checkpointer(tmp_path / 'run', keep=1, identity=identity(case.CONFIG))
  saver.save(case.STEP, whole, {}, described(case.CONFIG, optimizer=record))
  saver.close()
  form = find_form(tmp_path / 'run')
  assert form.has_optimizer
  t5x = convert(form, 't5x', tmp_path / 't5x', None, Options(optimizer=True))
  wi_0 = 'state/param_states/decoder/layers_1/mlp/expert/wi_0/kernel'
  assert find_form(t5x.path).tensors()[f'{wi_0}/v_row'].shape == (4, 32)


def test_an_export_carries_no_references_to_code_of_others():
  kept = {'auto_map': {'AutoConfig': 'evil.Config'}, 'eos_token_id': [2, 5], 'bos_token_id': 'x'}
  fields = hf_config.to_hf(case.JETMOE, 'float32', None, kept)
  assert 'auto_map' not in fields
  assert (fields['eos_token_id'], fields['bos_token_id']) == ([2, 5], 0)
