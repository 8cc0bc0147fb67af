"""The router against plain loops, and the documented values of its losses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe.config import CapacityConvention, ConfigError, MoEConfig
from openmoe.layers.moe.router import (
  Router,
  assign_slots,
  expert_capacity,
  load_balance_loss,
  route,
  router_z_loss,
)
from openmoe.plan import upstream_group_size
from tests.layers import naive


@pytest.mark.parametrize(
  ('tokens', 'experts', 'factor', 'slots'),
  [
    (4096, 32, 1.25, 160),
    (4096, 16, 1.25, 320),
    (1024, 32, 2.0, 64),
    (2048, 32, 1.25, 80),
    (64, 8, 1.25, 10),
    (16, 8, 1.25, 4),  # 2.5 rounds to 2, then the minimum of 4
    (36, 8, 1.0, 4),  # 4.5 rounds half to even
    (44, 8, 1.0, 6),  # so does 5.5
  ],
)
def test_capacity_as_released(tokens, experts, factor, slots):
  assert expert_capacity(tokens, experts, factor) == slots


def test_capacity_that_counts_choices():
  with_k = CapacityConvention.WITH_TOP_K
  assert expert_capacity(4096, 32, 1.25, top_k=2, convention=with_k) == 320


@pytest.mark.parametrize(
  ('rows', 'max_size', 'experts', 'devices', 'expert_parts', 'model_parts', 'size'),
  [
    (128, 4096, 16, 64, 16, 1, 4096),  # base
    (128, 4096, 16, 1, 16, 1, 4096),
    (128, 4096, 32, 512, 32, 8, 4096),  # 8B, 8 microbatches
    (64, 4096, 32, 256, 32, 8, 4096),  # 8B, 16 microbatches
    (64, 8192, 32, 512, 32, 16, 4096),  # 34B: its group size of 8192 does not bind
    (32, 8192, 32, 256, 32, 16, 2048),
    (16, 4096, 32, 256, 32, 8, 1024),  # evaluation
  ],
)
def test_group_size_of_the_original(
  rows, max_size, experts, devices, expert_parts, model_parts, size
):
  got = upstream_group_size(
    rows * 2048,
    max_size,
    experts,
    device_count=devices,
    num_expert_partitions=expert_parts,
    num_model_partitions=model_parts,
  )
  assert got == size


def test_group_size_that_the_original_would_pad_is_refused():
  with pytest.raises(ConfigError, match='pad to 64'):
    upstream_group_size(
      60, 4096, 32, device_count=1, num_expert_partitions=1, num_model_partitions=1
    )


def test_first_choices_claim_slots_before_second_ones():
  index_gtk = jnp.array([[[0, 1], [1, 0], [0, 1]]])
  slots = assign_slots(index_gtk, None, num_experts=2)
  assert slots.tolist() == [[[0, 1], [0, 2], [1, 2]]]


def test_padding_takes_no_slot():
  index_gtk = jnp.array([[[0, 1], [0, 1], [0, 1]]])
  valid_gt = jnp.array([[True, False, True]])
  assert assign_slots(index_gtk, valid_gt, 2).tolist() == [[[0, 0], [-1, -1], [1, 1]]]


def test_balanced_losses():
  # Each token likes two experts, and all pairs of neighbours are equally popular.
  experts, tokens = 4, 8
  logits = np.full((1, tokens, experts), -20.0, np.float32)
  for t in range(tokens):
    logits[0, t, [t % experts, (t + 1) % experts]] = 20.0
  probs = jax.nn.softmax(logits, axis=-1)
  chosen = (logits > 0).astype(np.float32)
  np.testing.assert_allclose(load_balance_loss(probs, chosen, None), 2.0, rtol=1e-6)
  z = router_z_loss(jnp.zeros((2, 8, experts)), None)
  np.testing.assert_allclose(z, np.log(experts) ** 2, rtol=1e-6)


def test_collapse_costs_the_number_of_experts():
  logits = np.full((1, 8, 4), -30.0, np.float32)
  logits[..., 0] = 30.0
  stats = route(jnp.asarray(logits), None, MoEConfig(4, top_k=1), None).stats
  np.testing.assert_allclose(stats.load_balance_loss, 4.0, rtol=1e-6)


@pytest.mark.parametrize('capacity', [None, 4, 7])
def test_statistics_against_loops(capacity):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, 16, 8)).astype(np.float32)
  routing = route(jnp.asarray(logits), None, MoEConfig(8), capacity)
  probs = np.asarray(jax.nn.softmax(logits, axis=-1))
  pairs = naive.served(probs, 2, capacity)
  everything = naive.served(probs, 2, None)
  stats = routing.stats
  np.testing.assert_allclose(stats.dropped_fraction, 1 - len(pairs) / (3 * 16 * 2), atol=1e-6)
  left = 3 * 16 - len({(g, t) for g, t, _ in pairs})
  np.testing.assert_allclose(stats.tokens_left_behind, left / (3 * 16), atol=1e-6)
  load = np.bincount([e for *_, e in everything], minlength=8) / len(everything)
  np.testing.assert_allclose(stats.expert_load_e, load, atol=1e-6)
  confidence = np.mean([probs[pair] for pair in pairs])
  np.testing.assert_allclose(stats.router_confidence, confidence, rtol=1e-5)
  usage = 1.0 if capacity is None else len(pairs) / (8 * capacity * 3)
  np.testing.assert_allclose(stats.expert_usage, usage, rtol=1e-6)


def _routed(config: MoEConfig, x, valid, train: bool):
  router = Router(config)
  params = nn.unbox(router.init(jax.random.key(0), x, valid, False))
  return router.apply(params, x, valid, train, rngs={'dropout': jax.random.key(1)})


def test_padding_goes_to_experts_0_and_1_unless_ignored():
  x = jnp.zeros((1, 16, 8))
  valid = jnp.zeros((1, 16), bool)
  as_released = _routed(MoEConfig(4), x, valid, False)
  assert as_released.expert_index_gtk.tolist() == [[[0, 1]] * 16]
  ignored = _routed(MoEConfig(4, ignore_padding=True), x, valid, False)
  assert (ignored.slot_gtk == -1).all()
  assert float(ignored.stats.router_z_loss) == 0.0
  assert float(ignored.combine_weights_gtk.sum()) == 0.0


def test_jitter_is_for_training_only():
  x = jax.random.normal(jax.random.key(2), (1, 16, 8))
  config = MoEConfig(4, jitter_noise=0.5)
  plain = _routed(MoEConfig(4), x, None, True).combine_weights_gtk
  np.testing.assert_array_equal(_routed(config, x, None, False).combine_weights_gtk, plain)
  assert not np.allclose(_routed(config, x, None, True).combine_weights_gtk, plain)


def test_tokens_that_are_not_routed_are_not_left_behind():
  """Two real tokens of eight, both for the same two experts, with room for one."""
  logits = jnp.zeros((1, 8, 4)).at[..., :2].set(5.0)
  valid = jnp.arange(8)[None] < 2
  left = lambda mask: float(route(logits, mask, MoEConfig(4), 1).stats.tokens_left_behind)
  assert left(valid) == 0.5
  assert left(jnp.zeros_like(valid)) == 0
  assert left(None) == 7 / 8


def test_a_group_of_padding_counts_as_one_of_loss_0():
  """Losses are means over groups, as the original takes them; docs/PARITY.md."""
  logits = jax.random.normal(jax.random.key(0), (2, 8, 4))
  valid = jnp.array([[True] * 8, [False] * 8])
  both, one = (
    route(x, m, MoEConfig(4), None).stats for x, m in ((logits, valid), (logits[:1], None))
  )
  for name in ('load_balance_loss', 'router_z_loss'):
    np.testing.assert_allclose(getattr(both, name), getattr(one, name) / 2, rtol=1e-6)
