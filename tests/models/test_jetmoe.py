"""JetMoE as a whole: sizes, meshes, packing, classification."""

import dataclasses
import pathlib

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from openmoe import partitioning
from openmoe.classification.step import classification_step
from openmoe.config import ConfigError, MeshConfig, ModelConfig, MoEConfig
from openmoe.models import abstract_params, build_model
from openmoe.models.classifier import SequenceClassifier
from openmoe.plan import active_params, count_params, flops_per_token
from openmoe.train_step import TrainState
from openmoe.types import Batch

ROOT = pathlib.Path(__file__).parents[2]
V, T = 64, 16
MOE = MoEConfig(
  8, group_size=T, dispatch='dropless', router_order='top_k_softmax', router_loss='sum',
  capacity_convention='with_top_k', ignore_padding=True, router_z_weight=1e-3,
)  # fmt: skip
TINY = ModelConfig(
  'tiny', V, 2, 16, 24, 2, 4, 2, MOE, dtype='float32', architecture='jetmoe', init_std=0.3
)


def from_gin(name: str) -> ModelConfig:
  gin.clear_config()
  gin.parse_config_file(str(ROOT / 'gin/models' / f'{name}.gin'))
  config = gin.get_configurable(ModelConfig)()
  gin.clear_config()
  return config


def packed(rows: int = 8) -> Batch:
  """Two segments and some padding in every row."""
  tokens = np.random.default_rng(0).integers(1, V, (rows, T)).astype(np.int32)
  place = np.arange(T)
  segments = np.where(place < 13, 1 + (place >= 7), 0) * np.ones_like(tokens)
  positions = np.where(place < 7, place, place - 7) * np.ones_like(tokens)
  weights = (segments > 0).astype(np.float32)
  return Batch(*map(jnp.asarray, (tokens, tokens, weights, segments, positions)))


def init(config: ModelConfig):
  return nn.unbox(build_model(config).init(jax.random.key(0), packed(), False))['params']


def test_the_published_size():
  config = from_gin('jetmoe_8b')
  shapes, _ = abstract_params(config)
  assert count_params(shapes) == 8_522_237_952
  # The published 2,265,907,200 leaves out the norm after the last block.
  assert active_params(config) == 2_265_907_200 + 2048
  # 6 FLOPs an active parameter and output weight, and causal attention of 32 heads.
  dense = 6 * (2_265_907_200 + 32000 * 2048 - 24 * (3 * 2 * 2048))
  attention = 3 * 24 * 2 * 2 * (4096 / 2) * 32 * 128
  assert flops_per_token(config, 4096) == pytest.approx(dense + attention, rel=1e-4)


def test_the_tiny_size_is_the_same_architecture():
  large, tiny = from_gin('jetmoe_8b'), from_gin('jetmoe_tiny')
  same = ('architecture', 'norm_epsilon', 'final_norm_epsilon', 'rope_theta')
  assert [getattr(large, n) for n in same] == [getattr(tiny, n) for n in same]
  changes = {'group_size': tiny.moe.group_size, 'router_init_std': tiny.moe.router_init_std}
  assert dataclasses.replace(large.moe, **changes) == tiny.moe
  assert len(tiny.router_layers) == 2 * tiny.num_layers


def test_every_block_is_sparse():
  with pytest.raises(ConfigError, match='every block of JetMoE is sparse'):
    dataclasses.replace(TINY, num_sparse_layers=1)


def loss(params, batch, config):
  out = build_model(config).apply({'params': params}, batch, True)
  probe = jax.random.normal(jax.random.key(9), (*batch.inputs.shape, V))
  return jnp.sum(out.logits() * probe) + jnp.sum(out.router_stats.load_balance_loss)


@pytest.mark.parametrize(
  ('dispatch', 'partitions'),
  [
    ('dropless', (4, 2)),
    ('scatter', (4, 2)),
    pytest.param('mask', (4, 2), marks=pytest.mark.slow),
    pytest.param('dropless', (8, 1), marks=pytest.mark.slow),
    pytest.param('scatter', (8, 1), marks=pytest.mark.slow),
  ],
)
def test_sharded_equals_unsharded(dispatch, partitions):
  """Values and gradients on data x expert x model; the capacity forms with drops."""
  config = dataclasses.replace(
    TINY, moe=dataclasses.replace(MOE, dispatch=dispatch, capacity_factor=1.0)
  )
  params, batch = init(config), packed()
  grad = lambda: jax.jit(jax.value_and_grad(lambda p: loss(p, batch, config)))(params)
  want = grad()
  with jax.set_mesh(partitioning.make_mesh(MeshConfig(*partitions))):
    got = grad()
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    b = np.asarray(b)
    np.testing.assert_allclose(np.asarray(a), b, atol=2e-5 * max(1.0, np.abs(b).max()))


def test_packed_examples_do_not_see_each_other():
  batch, params = packed(2), init(TINY)
  run = jax.jit(lambda b: build_model(TINY).apply({'params': params}, b, False).logits())
  logits = run(batch)
  second = lambda x: x[:, 7:13]
  alone = run(jax.tree.map(lambda x: jnp.pad(second(x), ((0, 0), (0, T - 6))), batch))
  np.testing.assert_allclose(second(logits), alone[:, :6], atol=1e-4)
  # Nor what stands in the padding.
  changed = run(batch.replace(inputs=jnp.where(batch.segment_ids == 0, 5, batch.inputs)))
  np.testing.assert_array_equal(logits, changed)


def test_a_classifier_learns():
  """Which of two tokens a row ends with; the rows have different lengths."""
  rng = np.random.default_rng(0)
  lengths, labels = rng.integers(4, T + 1, 16), rng.integers(0, 2, 16)
  tokens = rng.integers(5, V, (16, T)).astype(np.int32)
  tokens[np.arange(16), lengths - 1] = 2 + labels
  segments = (np.arange(T) < lengths[:, None]).astype(np.int32)
  positions = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
  batch = Batch(*map(jnp.asarray, (tokens, tokens, segments * 1.0, segments, positions)))
  config = dataclasses.replace(TINY, init_std=0.05)
  model, optimizer = SequenceClassifier(config, 2), optax.adam(1e-2)
  params = nn.unbox(model.init(jax.random.key(0), batch, False))['params']
  assert set(params) == {'backbone', 'score'}
  state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
  step = jax.jit(
    lambda s: classification_step(
      s, batch, jnp.asarray(labels), model=model, config=config, optimizer=optimizer, seed=0
    )
  )
  state, first = step(state)
  for _ in range(30):
    state, last = step(state)
  assert float(first['cross_entropy']) > 0.5
  assert float(last['cross_entropy']) < 0.1
  assert float(last['accuracy']) == 1.0
