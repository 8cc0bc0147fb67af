"""Balance losses against their sources' formulas in plain loops, and what converts into what."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe.config import BALANCE_LOSSES, ConfigError, ModelConfig, MoEConfig, OptimizerConfig
from openmoe.layers.moe import balance
from openmoe.layers.moe.router import Router, route
from openmoe.losses import router_losses
from openmoe.models import build_model, empty_batch
from openmoe.optimizer import learning_rate, make_optimizer
from openmoe.train_step import abstract_state, init_state, train_step

G, T, E, K, L = 3, 8, 4, 2, 2
SCALARS = [name for name in BALANCE_LOSSES if name not in ('mixtral', 'loss_free')]


def logits(layers=L, groups=G, seed=0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(layers, groups, T, E)).astype(np.float32)


def softmax(x):
  return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


# Each from its source's text: (probabilities [g, t, e], choices [g, t, k] best first) -> number.
def naive_st_moe(p, c):
  total = 0.0
  for g in range(len(p)):
    for e in range(E):
      f = sum(e in c[g][t] for t in range(T)) / T
      total += E * f * sum(p[g][t][e] for t in range(T)) / T
  return total / len(p)


def naive_switch(p, c):
  total = 0.0
  for g in range(len(p)):
    for e in range(E):
      f = sum(c[g][t][0] == e for t in range(T)) / T
      total += E * f * sum(p[g][t][e] for t in range(T)) / T
  return total / len(p)


def naive_gshard(p, c):
  total = 0.0
  for g in range(len(p)):
    counts = [sum(c[g][t][0] == e for t in range(T)) for e in range(E)]
    means = [sum(p[g][t][e] for t in range(T)) / T for e in range(E)]
    total += sum(counts[e] / T * means[e] for e in range(E)) / E
  return total / len(p)


def naive_megablocks(p, c):
  tokens = len(p) * T
  per_expert = [sum(e in c[g][t] for g in range(len(p)) for t in range(T)) for e in range(E)]
  scores = [sum(p[g][t][e] for g in range(len(p)) for t in range(T)) / tokens for e in range(E)]
  return E / (tokens * K) * sum(n * s for n, s in zip(per_expert, scores, strict=True))


def naive_jetmoe(p, c):
  probability = [sum(p[g][t][e] for g in range(len(p)) for t in range(T)) for e in range(E)]
  frequency = [sum(e in c[g][t] for g in range(len(p)) for t in range(T)) for e in range(E)]
  norm = lambda x: [v / sum(x) for v in x]
  return E * sum(a * b for a, b in zip(norm(probability), norm(frequency), strict=True))


def naive_olmo_core(p, c):
  loss = 0.0
  for g in range(len(p)):
    for e in range(E):
      size = sum(e in c[g][t] for t in range(T))
      loss += size * sum(p[g][t][e] for t in range(T)) / T
  return E / (len(p) * T * K) * loss


def naive_deepseek_sequence(p, c):
  found = []
  for g in range(len(p)):
    ce = [0.0] * E
    for t in range(T):
      for e in c[g][t]:
        ce[e] += 1 / (T * K / E)
    found.append(sum(ce[e] * sum(p[g][t][e] for t in range(T)) / T for e in range(E)))
  return sum(found) / len(found)


def naive_mixtral(all_p, all_c):
  """Tokens of all layers together; one mean per rank and expert."""
  p = all_p.reshape(-1, E)
  c = all_c.reshape(-1, K)
  loss = 0.0
  for rank in range(K):
    for e in range(E):
      loss += np.mean(c[:, rank] == e) * np.mean(p[:, e])
  return E * loss


def config(name='st_moe', **fields) -> MoEConfig:
  return MoEConfig(E, balance_loss=name, **({'top_k': K} | fields))


@functools.partial(jax.jit, static_argnums=1)
def decided(x_lgte, moe):
  """Routing statistics of layers, stacked."""
  stats = [route(x_gte, None, moe, None).stats for x_gte in x_lgte]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats)


@pytest.mark.parametrize('name', SCALARS)
def test_a_loss_is_its_source_s_formula(name):
  x = logits(1)
  choices = np.argsort(-x[0], axis=-1, kind='stable')[..., :K]
  expected = globals()[f'naive_{name}'](softmax(x[0].astype(float)), choices)
  found = decided(jnp.asarray(x), config(name)).load_balance_loss[0]
  assert float(found) == pytest.approx(expected, rel=1e-5)


def test_mixtral_puts_the_tokens_of_all_layers_together():
  x = logits()
  choices = np.argsort(-x, axis=-1, kind='stable')[..., :K]
  expected = naive_mixtral(softmax(x.astype(float)), choices)
  moe = config('mixtral', load_balance_weight=1.0)
  found = router_losses(decided(jnp.asarray(x), moe), moe)['load_balance_loss']
  assert float(found) == pytest.approx(expected, rel=1e-5)
  half = jax.tree.map(lambda leaf: leaf * 0.5, decided(jnp.asarray(x), moe))
  assert float(router_losses(half, moe)['load_balance_loss']) == pytest.approx(expected / 2)


@pytest.mark.parametrize('name', [n for n in BALANCE_LOSSES if n != 'loss_free'])
def test_the_value_at_balance(name):
  """Every expert equally often first and second, with equal probabilities."""
  x = np.zeros((1, 1, E, E), np.float32)
  for t in range(E):
    x[0, 0, t, t], x[0, 0, t, (t + 1) % E] = 2, 1
  moe = config(name, load_balance_weight=1.0)
  found = router_losses(decided(jnp.asarray(x), moe), moe)['load_balance_loss']
  assert float(found) == pytest.approx(balance.KINDS[name].balance(E, K), rel=1e-5)


@pytest.mark.parametrize('padding', [False, True])
@pytest.mark.parametrize('name', SCALARS)
def test_padding_that_is_not_routed_counts_in_nothing(name, padding):
  """The last two tokens of each group left out is the same as groups without them."""
  x = jnp.asarray(logits(1)[0])
  valid = jnp.broadcast_to(jnp.arange(T) < T - 2, (G, T)) if padding else None
  short = x[:, : T - 2] if padding else x
  values = [
    float(route(a, mask, config(name), None).stats.load_balance_loss)
    for a, mask in ((x, valid), (short, None))
  ]
  assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize(
  ('name', 'top_k', 'groups', 'layers'),
  [
    ('st_moe', 2, 3, 2),
    ('switch', 1, 3, 2),
    ('gshard', 1, 3, 2),
    ('mixtral', 2, 1, 1),
    ('megablocks', 2, 1, 3),
    ('jetmoe', 2, 1, 3),
    ('olmo_core', 2, 3, 2),
    ('deepseek_sequence', 2, 3, 2),
  ],
)
def test_gradients_agree_after_conversion(name, top_k, groups, layers):
  """Their weight and their way over layers; ours times the factor of the table."""
  theirs_sum = balance.KINDS[name].layers == 'sum'
  theirs = config(name, top_k=top_k, load_balance_weight=0.01,
                  router_loss='sum' if theirs_sum else 'mean')  # fmt: skip
  weight = 0.01 * balance.factor(name, E, top_k, layers)
  ours = config(top_k=top_k, load_balance_weight=weight)
  x = jnp.asarray(logits(layers, groups))
  loss = lambda moe: lambda x: router_losses(decided(x, moe), moe)['load_balance_loss']
  # One programme each: op by op a gradient takes seconds.
  values, gradients = zip(
    *(jax.jit(jax.value_and_grad(loss(moe)))(x) for moe in (theirs, ours)), strict=True
  )
  assert float(values[0]) == pytest.approx(float(values[1]), rel=1e-5)
  np.testing.assert_allclose(*gradients, atol=1e-7)
  assert np.abs(gradients[0]).max() > 1e-5


def test_the_bias_moves_choices_and_not_weights():
  moe = dataclasses.replace(config('loss_free'), load_balance_weight=1.0)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 64, 6)), jnp.float32)
  router = Router(moe)
  params = {'kernel': jnp.asarray(np.random.default_rng(1).normal(size=(6, E)), jnp.float32),
            'bias': jnp.zeros(E)}  # fmt: skip
  run = jax.jit(lambda params: router.apply({'params': params}, x, None, True))
  before = run(params)
  pushed = run(params | {'bias': jnp.array([2.0, 0, 0, 0])})
  assert (pushed.expert_index_gtk == 0).any(axis=-1).all()
  probs = jax.nn.softmax(jnp.einsum('gtd,de->gte', x, params['kernel']))
  taken = jnp.take_along_axis(probs, pushed.expert_index_gtk, axis=-1)
  np.testing.assert_allclose(pushed.combine_weights_gtk, taken, atol=1e-6)

  def total(params):
    stats = jax.tree.map(lambda leaf: leaf[None], run(params).stats)
    return router_losses(stats, moe)['load_balance_loss']

  value, gradient = jax.value_and_grad(total)(params)
  load = np.bincount(np.ravel(before.expert_index_gtk), minlength=E)
  assert value == 0
  np.testing.assert_array_equal(gradient['bias'], np.sign(load - load.mean()))
  np.testing.assert_array_equal(gradient['kernel'], 0)


def _train(name: str, steps: int) -> tuple[list[dict], dict]:
  moe = MoEConfig(E, group_size=16, balance_loss=name, load_balance_weight=0.1)
  sizes = {'vocab_size': 32, 'num_layers': 1, 'embed_dim': 8, 'mlp_dim': 8, 'head_dim': 4}
  model = ModelConfig('t', num_heads=2, num_sparse_layers=1, dtype='float32', moe=moe, **sizes)
  optimizer = OptimizerConfig('adamw', 'constant', learning_rate=0.01, warmup_steps=0)
  _, axes = abstract_state(model, optimizer)
  schedule, module = learning_rate(optimizer, 10), build_model(model)
  transform = make_optimizer(optimizer, axes, schedule)
  state = jax.jit(lambda: init_state(module, transform, 0))()
  batch = empty_batch(4, 16)
  tokens = jax.random.randint(jax.random.key(1), (4, 16), 1, 32)
  batch = batch.replace(inputs=tokens, targets=tokens, loss_weights=jnp.ones((4, 16)),
                        segment_ids=jnp.ones((4, 16), jnp.int32))  # fmt: skip
  step = jax.jit(lambda state: train_step(
    state, batch, model=module, config=model, optimizer=transform, schedule=schedule,
    num_microbatches=2, seed=0))  # fmt: skip
  seen = []
  for _ in range(steps):
    state, metrics = step(state)
    seen.append({k: float(v) for k, v in metrics['scalars'].items()})
  return seen, state.params


@pytest.mark.parametrize(
  'name',
  [pytest.param(n, marks=() if n == 'loss_free' else pytest.mark.slow)
   for n in BALANCE_LOSSES],
)  # fmt: skip
def test_training_with_each_runs(name):
  seen, params = _train(name, 3)
  assert seen[-1]['cross_entropy'] < seen[0]['cross_entropy']
  assert all(np.isfinite(list(one.values())).all() for one in seen)
  bias = params['decoder']['sparse']['moe']['router'].get('bias')
  assert (bias is not None and np.abs(bias).max() > 0) if name == 'loss_free' else bias is None


def test_an_unknown_name_is_refused():
  with pytest.raises(ConfigError, match="balance_loss='swich' is not one of"):
    config('swich')


def test_the_table_names_every_loss():
  assert tuple(balance.KINDS) == BALANCE_LOSSES
  rows = {row['balance_loss']: row for row in balance.table(64, 8, 16)}
  assert rows['megablocks']['their 0.01 is our'] == '0.00125'
  assert rows['deepseek_sequence']['their 0.01 is our'] == '0.02'
  assert rows['switch']['their 0.01 is our'] == rows['loss_free']['their 0.01 is our'] == '-'
