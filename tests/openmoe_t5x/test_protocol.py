"""What t5x asks of a model and its partitioner."""

from __future__ import annotations

import dataclasses

import flax.core
import flax.linen as nn
import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from convert.core.names import name_table
from convert.core.source import model_shapes
from openmoe import train_step
from openmoe.config import ConfigError, ModelConfig, MoEConfig
from openmoe.models import abstract_params, build_model, empty_batch
from openmoe_t5x import names, stubs
from tests.convert import case

CONFIG = ModelConfig(
  't', 64, 2, 16, 32, 2, 8, num_sparse_layers=1, moe=MoEConfig(4, group_size=16), dtype='float32'
)
CONFIGS = pytest.mark.parametrize('config', [CONFIG, case.JETMOE], ids=['openmoe', 'jetmoe'])


class Vocabulary:
  eos_id = 1


def flat(tree) -> dict:
  return traverse.flatten_dict(jax.tree.map(lambda x: x, tree), sep='/')


@pytest.fixture(scope='module')
def model(plugin):
  return plugin[0].OpenMoEModel(CONFIG, Vocabulary(), None, init_seed=0)


@pytest.fixture(scope='module')
def both(model):
  """Initial parameters as t5x gets them, and those of our training with the same seed."""

  def init():
    theirs = model.get_initial_variables(jax.random.PRNGKey(7), {})['params']
    ours = build_model(CONFIG).init(jax.random.key(0), empty_batch(1, 8), train=False)['params']
    return flax.core.unfreeze(theirs), nn.unbox(ours)

  return jax.jit(init)()


@pytest.fixture(scope='module')
def params(both):
  return both[0]


@pytest.fixture(scope='module')
def features():
  targets = np.random.default_rng(0).integers(2, 64, (2, 32)).astype(np.int32)
  causal = np.tile((np.arange(32) < 9).astype(np.int32), (2, 1))
  return {
    'decoder_input_tokens': np.pad(targets[:, :-1], ((0, 0), (1, 0))),
    'decoder_target_tokens': targets,
    'decoder_loss_weights': 1 - causal,
    'decoder_causal_attention': causal,
  }


@CONFIGS
def test_every_parameter_has_axes_of_its_rank(config):
  shapes = jax.eval_shape(lambda p: names.to_t5x(p, config), abstract_params(config)[0])
  axes = flat(names.params_axes(config))
  found = {f'{path}_axes': len(x.shape) for path, x in flat(shapes).items()}
  assert {path: len(x.names) for path, x in axes.items()} == found


@CONFIGS
def test_names_go_round(config):
  shapes = abstract_params(config)[0]
  number = iter(range(1000))
  ours = jax.tree.map(lambda x: np.full(x.shape, next(number)) + np.arange(x.shape[-1]), shapes)
  theirs = names.to_t5x(ours, config)
  again = names.from_t5x(theirs, config)
  assert jax.tree.structure(again) == jax.tree.structure(ours)
  jax.tree.map(np.testing.assert_array_equal, again, ours)


def test_names_and_shapes_are_those_of_the_conversion(params):
  shapes = model_shapes(CONFIG)
  assert {path: x.shape for path, x in flat(params).items()} == {
    row.t5x: shapes[row.name] for row in name_table(CONFIG)
  }


def test_initial_parameters_are_those_of_our_training(both):
  theirs, ours = both
  same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)  # XLA may fuse a scale otherwise
  jax.tree.map(same, names.from_t5x(theirs, CONFIG), ours)


def test_loss_and_gradients_are_those_of_our_step(model, params, features):
  key = jax.random.PRNGKey(0)
  theirs = jax.jit(jax.value_and_grad(lambda p: model.loss_fn(p, features, key)[0]))
  batch = names.to_batch(features)
  count = jnp.sum(batch.loss_weights)

  def loss(p):
    return train_step.loss_fn(p, batch, count, key, build_model(CONFIG), CONFIG, True)[0]

  ours = jax.jit(jax.value_and_grad(loss))
  found, gradients = theirs(params)
  wanted, expected = ours(names.from_t5x(params, CONFIG))
  np.testing.assert_allclose(found, wanted, rtol=1e-6)
  expected = names.to_t5x(expected, CONFIG)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradients, expected)
  _, metrics = jax.eval_shape(lambda p: _plain(model.loss_fn(p, features, key)), params)
  assert {'loss', 'z_loss', 'accuracy', 'experts/auxiliary_loss'} <= set(metrics)


def _plain(found):
  """The loss and a scalar for every metric: the fake's metrics are no pytrees."""
  return found[0], dict.fromkeys(found[1], 0.0)


def test_a_score_is_the_log_likelihood_of_the_targets(model, params, features):
  scores = jax.jit(model.score_batch)(params, features)
  batch = names.to_batch(features)
  logits = _apply(CONFIG, params, batch)
  log_probs = jax.nn.log_softmax(logits)
  chosen = np.take_along_axis(np.asarray(log_probs), batch.targets[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(scores, (chosen * batch.loss_weights).sum(1), rtol=1e-5)
  with pytest.raises(ConfigError, match='return_intermediates'):
    model.score_batch(params, features, return_intermediates=True)


def test_predictions_continue_the_inputs(model, params, features):
  tokens, aux = model.predict_batch_with_aux(params, features)
  assert tokens.shape == (2, 32) and aux['scores'].shape == (2,)
  assert (tokens[:, 32 - 8 :] == 0).all()  # 8 tokens of inputs leave room for 24
  prompt = np.where(features['decoder_causal_attention'] > 0, features['decoder_input_tokens'], 0)
  # As decoding has it, with nothing dropped.
  dropless = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, dispatch='dropless'))
  batch = names.to_batch(features | {'decoder_input_tokens': prompt})
  first = jnp.argmax(_apply(dropless, params, batch)[:, 8], axis=-1)
  np.testing.assert_array_equal(tokens[:, 0], first)
  many, aux = model.predict_batch_with_aux(
    params,
    features,
    num_decodes=3,
    return_all_decodes=True,
    decoder_params={'temperature': 1.0, 'topk': 5},
  )
  assert many.shape == (2, 3, 32) and (np.diff(aux['scores'], axis=1) >= 0).all()
  with pytest.raises(ConfigError, match='beam'):
    model.predict_batch_with_aux(params, features, decoder_params={'beam': 2})


def _apply(config, params, batch):
  apply = lambda p: build_model(config).apply({'params': p}, batch, train=False).logits()
  return jax.jit(apply)(names.from_t5x(params, CONFIG))


def test_a_mesh_without_experts_is_refused(model, params, features):
  mesh = jax.make_mesh((1, 1), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)
  with jax.set_mesh(mesh), pytest.raises(ConfigError, match='OpenMoEPartitioner'):
    model.score_batch(params, features)


def test_the_partitioner_has_our_mesh(plugin):
  partitioner = plugin[1]
  made = partitioner.OpenMoEPartitioner(1, 1)
  assert dict(made.mesh.shape) == {'data': jax.device_count(), 'expert': 1, 'model': 1}
  rules = partitioner.logical_factor_rules()
  assert {'groups', 'gate', 'expert'} <= set(rules)


def test_stand_ins_can_be_imported(tmp_path, monkeypatch):
  assert stubs.main([str(tmp_path)]) == 0
  monkeypatch.syspath_prepend(tmp_path)
  import airio.core
  import jestimator.amos

  assert airio.core.Task and not issubclass(int, airio.core.Task)
  with pytest.raises(NotImplementedError, match='jestimator'):
    jestimator.amos.amos()
