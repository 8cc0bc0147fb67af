"""The name table against the shapes of the model and the counts of the published sizes."""

import flax.traverse_util
import pytest

from convert import ours, sizes
from convert.convert import model_shapes
from convert.names import NamesError, check_names, expected_shapes, name_table
from openmoe import train
from openmoe.train_state import abstract_params


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
  ours_shapes = flax.traverse_util.flatten_dict(abstract_params(config)[0], sep='/')
  ours_shapes = {path: leaf.shape for path, leaf in ours_shapes.items()}
  assert expected_shapes(rows, ours_shapes) == shapes
  assert {r.ours for r in rows} == set(ours_shapes)


def test_identity_is_that_of_training():
  for model in ('openmoe_8b', 'openllama_base'):
    config = sizes.named(model)
    assert ours.identity(config) == train.identity(config)


def test_a_config_survives_json():
  for model in ('openmoe_34b', 'openllama_base'):
    config = sizes.named(model)
    assert sizes.config_from(sizes.to_json(config), model) == config


def test_errors_give_the_nearest_name():
  names = ['model.norm.weight', 'lm_head.weight']
  with pytest.raises(NamesError, match=r'model.nrm.weight does not belong .*model.norm.weight'):
    check_names(['model.nrm.weight', 'lm_head.weight'], names, 'x')
  with pytest.raises(NamesError, match='lm_head.weight is there more than once'):
    check_names(['model.norm.weight', 'lm_head.weight', 'lm_head.weight'], names, 'x')
