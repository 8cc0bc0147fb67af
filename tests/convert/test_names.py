"""The name table against the shapes of the model and the counts of the published sizes."""

import dataclasses

import flax.traverse_util
import pytest

from convert import sizes
from convert.core.names import NamesError, check_names, name_table
from convert.core.source import model_shapes
from convert.core.tensors import ConvertError
from convert.formats.zarrays import kvstore
from openmoe.checkpoint.description import model_fields
from openmoe.models import abstract_params
from tests.convert import case


def _ours(config):
  return flax.traverse_util.flatten_dict(abstract_params(config)[0], sep='/')


@pytest.mark.parametrize(
  ('model', 'tensors', 'parameters'),
  [
    ('openmoe_base', 126, 799_663_104),
    ('openmoe_8b', 239, 11_855_046_656),
    ('openmoe_34b', 331, 46_270_737_408),
    ('openllama_base', 111, 497_634_048),
  ],
)
def test_rows_cover_the_published_sizes(model, tensors, parameters):
  config = sizes.named(model)
  rows, shapes = list(name_table(config)), model_shapes(config)
  assert len(rows) == len({r.hf for r in rows}) == len({r.t5x for r in rows}) == tensors
  count = lambda shape: shape[0] * count(shape[1:]) if shape else 1
  assert sum(map(count, shapes.values())) == parameters
  assert {r.ours for r in rows} == set(_ours(config))


def test_a_config_survives_json():
  for model in ('openmoe_34b', 'openllama_base', 'jetmoe_8b'):
    config = sizes.named(model)
    assert sizes.config_from(model_fields(config), model) == config


def test_errors_give_the_nearest_name():
  names = ['model.norm.weight', 'lm_head.weight']
  with pytest.raises(NamesError, match=r'model.nrm.weight does not belong .*model.norm.weight'):
    check_names(['model.nrm.weight', 'lm_head.weight'], names, 'x')
  with pytest.raises(NamesError, match='lm_head.weight is there more than once'):
    check_names(['model.norm.weight', 'lm_head.weight', 'lm_head.weight'], names, 'x')


def test_shapes_of_the_8b_are_the_published_ones():
  """In the common layout, [in, out]; the state_dict of the port has the transposes."""
  shapes = model_shapes(sizes.named('openmoe_8b'))
  layer = 'model.layers.5.'
  assert shapes['model.embed_tokens.weight'] == (256384, 2048)
  assert shapes['lm_head.weight'] == (2048, 256384)
  assert shapes[f'{layer}self_attn.q_proj.weight'] == (2048, 3072)
  assert shapes[f'{layer}self_attn.o_proj.weight'] == (3072, 2048)
  assert shapes[f'{layer}mlp.gate_weight'] == (2048, 32)
  assert shapes[f'{layer}mlp.experts.wi_gate'] == (32, 2048, 16384)
  assert shapes[f'{layer}mlp.experts.wo'] == (32, 8192, 2048)
  assert shapes[f'{layer}extra_mlp.gate_proj.weight'] == (2048, 16384)
  assert shapes['model.layers.4.mlp.up_proj.weight'] == (2048, 8192)


def test_paths_of_object_stores():
  assert kvstore('gs://bucket/run/checkpoint_3') == {
    'driver': 'gcs',
    'bucket': 'bucket',
    'path': 'run/checkpoint_3/',
  }
  assert kvstore('/a/b') == {'driver': 'file', 'path': '/a/b/'}
  with pytest.raises(ConvertError, match='not ftp://'):
    kvstore('ftp://a/b')


def test_routers_with_a_bias_have_no_names_elsewhere():
  moe = dataclasses.replace(case.CONFIG.moe, balance_loss='loss_free')
  with pytest.raises(NamesError, match='tiny: balance_loss=loss_free gives every router a bias'):
    name_table(dataclasses.replace(case.CONFIG, moe=moe))
