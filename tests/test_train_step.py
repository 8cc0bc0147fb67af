"""The step: microbatches and meshes do not change it, and a recorded curve holds it in place."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe import partitioning
from openmoe.config import Dispatch, MeshConfig, OptimizerConfig
from openmoe.microbatches import microbatches
from openmoe.models import abstract_params, build_model
from openmoe.optimizer import learning_rate, make_optimizer
from openmoe.running.validation import eval_step
from openmoe.train_step import init_state, state_shardings, train_step
from openmoe.types import Batch
from tests.test_models import small

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'tiny_loss_curve.json'
OPTIMIZER = OptimizerConfig(schedule='rsqrt', learning_rate=0.2, warmup_steps=10)


def synthetic(step: int, rows: int = 16, length: int = 32) -> Batch:
  """Learnable rows: arithmetic progressions, prefix without loss, two segments a row."""
  rng = np.random.default_rng(step)
  start, stride = rng.integers(1, 90, (rows, 1)), rng.integers(1, 4, (rows, 1))
  tokens = 1 + (start + stride * np.arange(length)) % 90
  segments = np.where(np.arange(length) < length // 2, 1, 2)
  inputs = np.roll(tokens, 1, axis=1) * (np.arange(length) % (length // 2) > 0)
  weights = np.arange(length) % (length // 2) >= rng.integers(2, 8, (rows, 1))
  tokens[:, -3:] = 0  # padding
  weights[:, -3:] = 0
  broadcast = np.broadcast_to(segments, tokens.shape) * (tokens > 0)
  as_int = lambda x: jnp.asarray(x, jnp.int32)
  fields = as_int(inputs), as_int(tokens), jnp.asarray(weights, jnp.float32), as_int(broadcast)
  return Batch(*fields, positions=as_int(np.broadcast_to(np.arange(length), tokens.shape)))


def make_step(config, num_microbatches=1, shardings=None, optimizer=OPTIMIZER):
  axes = abstract_params(config)[1]
  transform = make_optimizer(optimizer, axes, learning_rate(optimizer, 20))
  module = build_model(config)
  step = functools.partial(
    train_step,
    model=module,
    config=config,
    optimizer=transform,
    schedule=learning_rate(optimizer, 20),
    num_microbatches=num_microbatches,
    seed=0,
  )
  init = jax.jit(lambda: init_state(module, transform, 0), out_shardings=shardings)
  return init, jax.jit(step)


def with_groups(config, dispatch=Dispatch.SCATTER, size=32):
  return dataclasses.replace(
    config, moe=dataclasses.replace(config.moe, group_size=size, dispatch=dispatch)
  )


def test_microbatches_are_strided_rows():
  pieces = microbatches(synthetic(0), 4)
  np.testing.assert_array_equal(pieces.targets[1], synthetic(0).targets[1::4])


def test_microbatches_do_not_change_the_step():
  """Token-weighted: rows with few targets sit unevenly in the microbatches."""
  config = with_groups(small())
  results = []
  for count in (1, 4):
    init, step = make_step(config, count)
    results.append(step(init(), synthetic(0)))
  (state_1, metrics_1), (state_4, metrics_4) = results
  for name, value in metrics_1['scalars'].items():
    np.testing.assert_allclose(metrics_4['scalars'][name], value, rtol=2e-5, err_msg=name)
  for a, b in zip(jax.tree.leaves(state_1), jax.tree.leaves(state_4), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('shape', 'fsdp', 'dispatch'),
  [
    ((2, 2, 2), True, Dispatch.SCATTER),
    ((2, 4, 1), True, Dispatch.DROPLESS),
    ((1, 4, 2), False, Dispatch.MASK),
  ],
  ids=str,
)
def test_a_sharded_step_equals_an_unsharded_one(shape, fsdp, dispatch):
  """Parameters and optimizer state after two steps, everything split, gradients accumulated."""
  config = with_groups(small(num_heads=4), dispatch)
  init, step = make_step(config, 2)
  state = init()
  want_abstract = jax.eval_shape(init)
  for i in range(2):
    state, metrics = step(state, synthetic(i))
  mesh = partitioning.make_mesh(MeshConfig(shape[1], shape[2], fsdp))
  axes = abstract_params(config)[1]
  shardings = state_shardings(mesh, OPTIMIZER, want_abstract, axes, fsdp)
  init, step = make_step(config, 2, shardings)
  with jax.set_mesh(mesh):
    sharded = init()
    for i in range(2):
      batch = jax.device_put(synthetic(i), partitioning.batch_sharding(mesh))
      sharded, sharded_metrics = step(sharded, batch)
  np.testing.assert_allclose(
    sharded_metrics['scalars']['loss'], metrics['scalars']['loss'], rtol=1e-5
  )
  for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(state), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-3, atol=2e-5)


def test_golden_loss_curve():
  """20 steps of a tiny model; recorded to 6 digits, held to 1e-4 over XLA's versions."""
  init, step = make_step(with_groups(small()))
  state, losses = init(), []
  for i in range(20):
    state, metrics = step(state, synthetic(i))
    losses.append(float(metrics['scalars']['loss']))
  assert losses[-1] < losses[0] - 0.3
  np.testing.assert_allclose(losses, json.loads(GOLDEN.read_text()), rtol=1e-4)


def test_evaluation_sums_over_target_tokens():
  config = with_groups(small())
  init, _ = make_step(config)
  batch = synthetic(0)
  evaluate = jax.jit(functools.partial(eval_step, model=build_model(config), config=config))
  sums = evaluate(init().params, batch)
  assert float(sums['target_tokens']) == float(batch.loss_weights.sum())
  assert 0 <= float(sums['correct']) <= float(sums['target_tokens'])
  assert float(sums['cross_entropy']) / float(sums['target_tokens']) > 3.0
