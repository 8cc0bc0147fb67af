"""A checkpoint as training saves it, with optimizer state, to t5x and back, and to a fsck."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.core.names import name_table
from convert.core.tensors import ConvertError
from convert.formats import hf_jetmoe
from convert.run import Options, convert, find_form
from convert.sizes import of_form
from convert.upcycle import dense_config, described_as
from openmoe.checkpoint import arrays, description
from openmoe.checkpoint import checkpointer as checkpoint
from openmoe.checkpoint.description import identity
from openmoe.config import (
  ConfigError,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
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
  monkeypatch.setattr(arrays, 'LARGEST_CHUNK', 4 << 10)
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


def test_every_field_has_another_value_than_the_default():
  for kind, changed, shapes in (
    (ModelConfig, case.COMPUTED, case.SHAPES),
    (MoEConfig, case.ROUTED, {'num_experts'}),
  ):
    fields = {f.name: f.default for f in dataclasses.fields(kind) if f.name not in shapes}
    missing = sorted(fields.keys() - changed.keys())
    assert not missing, f'give {missing} a value in this file: it must survive every form'
    same = [n for n, v in changed.items() if v == fields[n] and n != 'dtype']
    assert not same


@pytest.mark.parametrize('kind', ['hf', 't5x'])
def test_every_field_survives_every_form(kind, state, tmp_path):
  config = case.unusual()
  saver = checkpoint.Checkpointer(tmp_path / 'ours', keep=1, identity=identity(config))
  told = {'row_length': 4096, 'pad_id': 3, 'start_id': 4, 'eos_ids': (5, 6)}
  told['chat'] = description.ChatRecord('folder', '{{ messages }}é', '<s>', '</s>')
  saver.save(case.STEP, state, {}, described(config, **told))
  saver.close()
  there = convert(find_form(tmp_path / 'ours'), kind, tmp_path / kind, None, Options())
  back = convert(find_form(there.path), 'ours', tmp_path / 'back', None, Options())
  assert of_form(find_form(back.path), None) == config
  reader = checkpoint.Checkpointer(tmp_path / 'back', 1, None, read_only=True)
  found = reader.describe(case.STEP)
  reader.close()
  chat = dataclasses.replace(found.chat, name='folder')  # a name is the folder's
  assert dataclasses.replace(found, chat=chat) == description.Description(config, **told)


def test_the_way_over_t5x_keeps_what_training_said(state, tmp_path):
  record = description.vocabulary_record('sentencepiece', '/gone/spiece.model', 20, b'pieces')
  record = dataclasses.replace(record, added=(description.AddedToken('<|end|>', 63),))
  told = {'tokens_seen': 12345, 'objective': 'prefix', 'vocabulary': record}
  saver = checkpoint.Checkpointer(tmp_path / 'ours', keep=1, identity=identity(case.CONFIG))
  saver.save(case.STEP, state, {}, described(case.CONFIG, **told))
  saver.close()
  description.keep_vocabulary(tmp_path / 'ours', record, b'pieces')
  there = convert(
    find_form(tmp_path / 'ours'), 't5x', tmp_path / 't5x', None, Options(logits=False)
  )
  back = convert(find_form(there.path), 'ours', tmp_path / 'back', None, Options(logits=False))
  assert find_form(back.path).description == description.Description(case.CONFIG, **told)
  assert (tmp_path / 'back' / record.file_name).read_bytes() == b'pieces'


def test_what_jetmoe_cannot_hold_is_refused_by_name():
  for change, name in (
    ({'norm_epsilon': 1e-3}, 'norm_epsilon=0.001'),
    ({'moe': dataclasses.replace(case.JETMOE.moe, router_order=RouterOrder.SOFTMAX_TOP_K)},
     'router_order='),
  ):  # fmt: skip
    with pytest.raises(ConvertError, match=f'--to hf: {name}'):
      hf_jetmoe.to_hf(dataclasses.replace(case.JETMOE, **change))


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
  back = convert(find_form(t5x.path), 'ours', tmp_path / 'back', None, Options(optimizer=True))
  restored = restored_state(tmp_path / 'back', whole)
  jax.tree.map(np.testing.assert_array_equal, restored, whole)
  assert find_form(back.path).description.optimizer == record


def test_a_folder_points_at_no_code_but_its_own(state, tmp_path):
  """Whatever a checkpoint's metadata say, an export takes tokens from it as numbers alone."""
  saver = checkpoint.Checkpointer(tmp_path / 'run', keep=1, identity=identity(case.CONFIG))
  evil = {'auto_map': {'AutoConfig': 'evil-repo--mod.Class'}, 'bos_token_id': 3}
  about = {'model': description.model_fields(case.CONFIG), 'hf_fields': evil}
  saver.save(case.STEP, state, {}, about)
  saver.close()
  made = convert(find_form(tmp_path / 'run'), 'hf', tmp_path / 'hf', None, Options(logits=False))
  text = (made.path / 'config.json').read_text('utf-8')
  assert 'evil' not in text and '"bos_token_id": 3' in text


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'num_hidden_layers': None}, 'num_hidden_layers=None must be a whole number of at least 1'),
    ({'num_hidden_layers': '2'}, "num_hidden_layers='2' must be a whole number"),
    ({'vocab_size': 2.0}, 'vocab_size=2.0 must be a whole number'),
    ({'head_dim': True}, 'head_dim=True must be a whole number'),
    ({'moe_layer_interval': 3}, 'moe_layer_interval=3 must be a divisor of num_hidden_layers=4'),
    ({'moe_layer_interval': None}, 'moe_layer_interval=None must be a whole number'),
    ({'num_experts': -1}, 'num_experts=-1 must be a whole number of at least 0'),
    ({'num_key_value_heads': 1}, 'num_key_value_heads=1 must be num_attention_heads=2'),
    ({'router_topk': '2'}, "router_topk='2' must be a whole number"),
    ({'router_capacity_factor_train': None}, 'router_capacity_factor_train=None must be a finite'),
    ({'router_order': 3}, 'router_order=3 must be one of'),
    ({'rms_norm_eps': 'small'}, "rms_norm_eps='small' must be a finite number"),
    ({'rms_norm_eps': float('nan')}, 'rms_norm_eps=nan must be a finite number'),
    ({'rope_theta': []}, r'rope_theta=\[\] must be a finite number'),
    ({'architectures': {'a': 1}, 'model_type': None}, 'model_type=None .*; give a folder of'),
    ({'bos_token_id': 64}, 'bos_token_id=64 must be a token below vocab_size=64'),
    ({'pad_token_id': 'x'}, "pad_token_id='x' must be a token below"),
    ({'eos_token_id': [1, None, -1]}, 'eos_token_id=-1 must be a token below'),
    ({'max_position_embeddings': 'long'}, "max_position_embeddings='long' must be a whole number"),
  ],
)
def test_odd_values_of_a_folder_are_named(changes, message, hf, tmp_path):
  refused(hf, changes, message, tmp_path)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'num_local_experts': None}, 'num_local_experts=None must be a whole number'),
    ({'kv_channels': '16'}, "kv_channels='16' must be a whole number"),
    ({'num_experts_per_tok': 0}, 'num_experts_per_tok=0 must be a whole number of at least 1'),
    ({'rms_norm_eps': 'x'}, "rms_norm_eps='x' must be a finite number"),
    ({'rope_parameters': 3}, 'rope_parameters=3 must be an object'),
    ({'rope_parameters': {'rope_theta': 'x'}}, "rope_theta='x' must be a finite number"),
    ({'aux_loss_coef': None}, 'aux_loss_coef=None must be a finite number'),
  ],
)
def test_odd_values_of_a_jetmoe_folder_are_named(changes, message, jetmoe_hf, tmp_path):
  refused(jetmoe_hf, changes, message, tmp_path)


def refused(folder, changes, message, tmp_path):
  """A folder with these changes to config.json cannot be opened, and is told so."""
  other = tmp_path / 'hf'
  other.mkdir()
  for file in folder.iterdir():
    (other / file.name).hardlink_to(file)
  fields = json.loads((folder / 'config.json').read_text('utf-8'))
  (other / 'config.json').unlink()
  (other / 'config.json').write_text(json.dumps(fields | changes), 'utf-8')
  form = find_form(other)
  with pytest.raises(ConvertError, match=f'{message}.*(repair|OpenMoE|take)'):
    form.describe(of_form(form, None))


def test_an_upcycled_checkpoint_computes_as_the_dense_one(tmp_path):
  dense = dense_config(case.CONFIG)
  told = description.Description(dense, eos_ids=(1, 5), row_length=77)
  found = described_as(told, case.CONFIG, dense, 'run')
  assert (found.model, found.eos_ids, found.row_length) == (case.CONFIG, (1, 5), 77)
  other = description.Description(dataclasses.replace(dense, norm_epsilon=1e-3))
  with pytest.raises(ConfigError, match='norm_epsilon is 0.001 there and 1e-06 in tiny'):
    described_as(other, case.CONFIG, dense, 'run')
