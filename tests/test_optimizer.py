"""Schedules, factoring rules, and that every stacked layer and expert is treated on its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from openmoe.config import ConfigError, OptimizerConfig
from openmoe.optimizer import factoring, learning_rate, make_optimizer, optimizer_axes

GATED = ('embed', 'gate', 'mlp')


def rate(step, **fields):
  return float(learning_rate(OptimizerConfig(**fields), total_steps=1000)(step))


def test_rsqrt_is_flat_then_decays():
  released = {'schedule': 'rsqrt', 'learning_rate': 1.0, 'warmup_steps': 10000}
  assert rate(0, **released) == pytest.approx(0.01)
  assert rate(9999, **released) == pytest.approx(0.01)
  assert rate(100_000, **released) == pytest.approx(0.003162, rel=1e-3)
  assert rate(500_000, **released) == pytest.approx(0.001414, rel=1e-3)


def test_warmup_cosine_and_wsd():
  warm = {'learning_rate': 2.0, 'warmup_steps': 100}
  assert rate(49, schedule='linear_warmup', **warm) == pytest.approx(1.0)
  assert rate(700, schedule='linear_warmup', **warm) == pytest.approx(2.0)
  assert rate(550, schedule='cosine', final_fraction=0.1, **warm) == pytest.approx(1.1)
  assert rate(1000, schedule='cosine', final_fraction=0.1, **warm) == pytest.approx(0.2)
  wsd = {'schedule': 'wsd', 'decay_steps': 200, 'final_fraction': 0.01, **warm}
  assert rate(800, **wsd) == pytest.approx(2.0)
  assert rate(900, **wsd) == pytest.approx(0.2)  # half way of an exponential from 2 to 0.02
  assert rate(1000, **wsd) == pytest.approx(0.02)
  with pytest.raises(ConfigError, match='decay_steps'):
    OptimizerConfig(schedule='wsd')


@pytest.mark.parametrize(
  ('shape', 'axes', 'row', 'column'),
  [
    ((256384, 2048), ('vocab', 'embed'), (1,), (0,)),
    ((2048, 256384), ('embed', 'vocab'), (0,), (1,)),
    ((3072, 2048), ('heads', 'embed'), (1,), (0,)),
    ((768, 768), ('embed', 'heads'), (0,), (1,)),  # square: the first is the row
    ((4, 5, 2048, 2, 8192), ('groups', 'layers', *GATED), (2,), (3, 4)),
    ((4, 32, 2048, 2, 8192), ('groups', 'expert', *GATED[:2], 'expert_mlp'), (2,), (3, 4)),
    ((4, 32, 8192, 2048), ('groups', 'expert', 'expert_mlp', 'embed'), (3,), (2,)),
    ((8, 16, 32), ('expert', 'embed', 'expert_mlp'), (1,), (2,)),  # experts whatever their size
    ((4, 2048, 32), ('groups', 'embed', 'router'), None, None),
    ((4, 5, 2048), ('groups', 'layers', 'embed'), None, None),
  ],
)
def test_factoring_rules(shape, axes, row, column):
  rule = factoring(shape, axes, 128)
  assert (rule.row, rule.column) == (row, column)


def _step(config, params, grads, axes):
  optimizer = make_optimizer(config, axes, learning_rate(config, 10))
  state = optimizer.init(params)
  updates, state = optimizer.update(grads, state, params)
  updates, state = optimizer.update(grads, state, optax.apply_updates(params, updates))
  return updates, state


def test_layers_and_experts_stand_alone():
  """A stack of parameters is updated as its slices would be."""
  config = OptimizerConfig(schedule='constant', min_dim_size_to_factor=4)
  shape, names = (3, 2, 8, 6), ('groups', 'expert', 'embed', 'expert_mlp')
  scale = jnp.array([1e-4, 1.0, 1e4])[:, None, None, None]  # so that one clip for all would show
  params = {'w': jax.random.normal(jax.random.key(0), shape)}
  grads = {'w': jax.random.normal(jax.random.key(1), shape) * scale}
  got, _ = _step(config, params, grads, {'w': names})
  for g in range(3):
    for e in range(2):
      one, _ = _step(
        config, {'w': params['w'][g, e]}, {'w': grads['w'][g, e]}, {'w': ('embed', 'expert_mlp')}
      )
      np.testing.assert_allclose(got['w'][g, e], one['w'], rtol=1e-5)


@pytest.mark.parametrize('name', ['adafactor', 'adamw'])
@pytest.mark.parametrize('clip', [None, 1.0])
def test_state_axes_have_the_shape_of_the_state(name, clip):
  axes = {'w': ('groups', 'expert', 'embed', 'expert_mlp'), 'n': ('embed',)}
  params = {'w': jnp.ones((2, 4, 8, 6)), 'n': jnp.ones(8)}
  config = OptimizerConfig(name=name, clip_global_norm=clip, min_dim_size_to_factor=4)
  _, state = _step(config, params, params, axes)
  names = optimizer_axes(config, state, params, axes)
  ranks = jax.tree.map(lambda leaf, axis: leaf.ndim == len(axis), state, names)
  assert all(jax.tree.leaves(ranks))


def test_adamw_does_not_decay_norms():
  config = OptimizerConfig(name='adamw', schedule='constant', learning_rate=0.1, weight_decay=0.5)
  params = {'w': jnp.ones((2, 3, 3)), 'scale': jnp.ones((2, 3))}
  axes = {'w': ('groups', 'embed', 'mlp'), 'scale': ('groups', 'embed')}
  updates, _ = _step(config, params, jax.tree.map(jnp.zeros_like, params), axes)
  assert float(jnp.abs(updates['scale']).max()) == 0.0
  assert float(updates['w'].max()) < 0.0
