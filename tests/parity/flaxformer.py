"""Compares this model with values recorded from the original JAX system.

  python -m tests.parity.flaxformer FILE.npz [--dispatch mask|scatter] [--json]

FILE.npz holds parameters, a batch, logits, losses, gradients and two Adafactor steps of the
original flaxformer modules, t5x losses and t5x optimizer (keys as tests/golden/
flaxformer_moe_a.npz; sizes come from config/*). Printed per key: the largest absolute difference,
or for grads_rel and adafactor_rel the largest over tensors of |difference| / |recorded|.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

from convert.core.names import name_table
from openmoe import config as config_lib
from openmoe.models import abstract_params, build_model
from openmoe.optimizer import learning_rate, make_optimizer
from openmoe.plan import upstream_group_size
from openmoe.train_step import loss_fn
from openmoe.types import Batch, PyTree

LIMITS = {
  'train_logits_f32': 2e-5,
  'eval_logits_f32': 2e-5,
  'loss_f32': 1e-5,
  'router_stats': 1e-5,
  'grads_rel': 1e-4,
  'adafactor_rel': 1e-4,
}
# Order of the recorded statistics, after loss, cross-entropy with z-loss, and z-loss.
STATS = (
  'load_balance_loss',
  'expert_usage',
  'tokens_left_behind',
  'router_confidence',
  'router_z_loss',
)


def model_config(file: Mapping, dtype: str, dispatch: str) -> config_lib.ModelConfig:
  """The recorded model; group_size is what the original takes on the recorded device count."""
  get = lambda name: file[f'config/{name}'].item()
  moe = config_lib.MoEConfig(
    num_experts=get('num_experts'),
    top_k=get('top_k'),
    group_size=upstream_group_size(
      file['tgt'].size,
      get('max_group_size'),
      get('num_experts'),
      device_count=get('device_count'),
      num_expert_partitions=get('num_expert_partitions'),
      num_model_partitions=1,
    ),
    capacity_factor=get('train_capacity_factor'),
    eval_capacity_factor=get('eval_capacity_factor'),
    min_expert_capacity=get('min_expert_capacity'),
    load_balance_weight=get('load_balance_factor'),
    router_z_weight=get('router_z_factor'),
    dispatch=dispatch,
  )
  return config_lib.ModelConfig(
    name='recorded',
    vocab_size=get('vocab_size'),
    num_layers=get('num_layers'),
    embed_dim=get('embed_dim'),
    mlp_dim=get('mlp_dim'),
    num_heads=get('num_heads'),
    head_dim=get('head_dim'),
    num_sparse_layers=get('num_moe_layers'),
    moe=moe,
    dtype=dtype,
    vocab_block=48,  # several blocks, the last one overlapping
  )


def import_tree(file: Mapping, prefix: str, config: config_lib.ModelConfig) -> PyTree:
  """Recorded arrays under a prefix as a tree of ours.

  Raises:
    KeyError: a name of the model is missing from the file.
  """
  shapes = flax.traverse_util.flatten_dict(abstract_params(config)[0], sep='/')
  flat = {path: np.full(leaf.shape, np.nan, np.float32) for path, leaf in shapes.items()}
  for row in name_table(config):
    flat[row.ours][row.index] = row.from_t5x(file[f'{prefix}/{row.t5x}'])
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def batch_of(file: Mapping) -> Batch:
  positions = np.broadcast_to(np.arange(file['tgt'].shape[1], dtype=np.int32), file['tgt'].shape)
  return Batch(
    inputs=jnp.asarray(file['inp']),
    targets=jnp.asarray(file['tgt']),
    loss_weights=jnp.asarray(file['w'], jnp.float32),
    segment_ids=jnp.asarray(file['seg']),
    positions=jnp.asarray(positions),
  )


def _largest(a, b) -> float:
  return float(np.max(np.abs(np.asarray(a) - np.asarray(b))))


def _relative(file: Mapping, prefix: str, tree: PyTree, config: config_lib.ModelConfig) -> float:
  """Largest over tensors of |ours - recorded| / |recorded|."""
  flat = flax.traverse_util.flatten_dict(tree, sep='/')
  worst = 0.0
  for row in name_table(config):
    recorded = np.asarray(file[f'{prefix}/{row.t5x}'], np.float64)
    ours = row.to_t5x(np.asarray(flat[row.ours], np.float64))
    worst = max(worst, np.linalg.norm(ours - recorded) / max(np.linalg.norm(recorded), 1e-30))
  return float(worst)


def _logits_and_stats(config, params, batch, train: bool):
  """(logits, the recorded eight scalars in their order) of one forward pass."""
  model = build_model(config)
  normalizer = jnp.sum(batch.loss_weights)

  @jax.jit
  def run(params, batch):
    logits = model.apply({'params': params}, batch, train).logits()
    loss = loss_fn(params, batch, normalizer, jax.random.key(0), model, config, train)
    return logits, loss

  logits, (loss, aux) = run(params, batch)
  scalars, router = aux['scalars'], aux['router']
  z_loss = scalars['logit_z_loss']
  losses = [loss, scalars['cross_entropy'] + z_loss, z_loss]
  return logits, losses, [jnp.mean(getattr(router, name)) for name in STATS]


def _adafactor(file, params, grads, config) -> float:
  """Two recorded steps: gradients g, then 2 g."""
  optimizer_config = config_lib.OptimizerConfig(
    schedule='constant',
    learning_rate=file['config/adafactor_lr'].item(),
    min_dim_size_to_factor=file['config/adafactor_min_dim_size_to_factor'].item(),
  )
  rate = learning_rate(optimizer_config, 2)
  optimizer = make_optimizer(optimizer_config, abstract_params(config)[1], rate)
  state = optimizer.init(params)
  for factor in (1.0, 2.0):
    scaled = jax.tree.map(lambda g, factor=factor: factor * g, grads)
    updates, state = optimizer.update(scaled, state, params)
    params = optax.apply_updates(params, updates)
  return max(
    _relative(file, 'ada2/params', params, config), _moments_relative(file, state.moments, config)
  )


def _moments_relative(file, moments: PyTree, config: config_lib.ModelConfig) -> float:
  """Largest relative difference of the second moments that are in use."""
  flat = flax.traverse_util.flatten_dict(moments, sep='/')
  worst = 0.0
  for row in name_table(config):
    for slot in ('v', 'v_row', 'v_col'):
      ours = getattr(flat[row.ours], slot)
      if ours is None:
        continue
      recorded = np.asarray(file[f'ada2/state/{row.t5x}/{slot}'], np.float64)
      mine = np.asarray(ours, np.float64)[row.index].reshape(recorded.shape)
      worst = max(worst, np.linalg.norm(mine - recorded) / max(np.linalg.norm(recorded), 1e-30))
  return float(worst)


def compare(file: Mapping, dispatch: str = 'scatter') -> dict[str, float]:
  """All differences, see the module's docstring."""
  batch, result, stats_diffs, loss_diffs = batch_of(file), {}, [], []
  for dtype, short in (('float32', 'f32'), ('bfloat16', 'bf16')):
    config = model_config(file, dtype, dispatch)
    params = import_tree(file, 'params', config)
    for train, mode in ((True, 'train'), (False, 'eval')):
      logits, losses, stats = _logits_and_stats(config, params, batch, train)
      result[f'{mode}_logits_{short}'] = _largest(logits, file[f'{short}/{mode}_logits'])
      if short == 'f32':
        recorded = file[f'f32/scal_{mode}']
        loss_diffs.append(_largest(jnp.stack(losses), recorded[:3]))
        stats_diffs.append(_largest(jnp.stack(stats), recorded[3:]))
  result['loss_f32'], result['router_stats'] = max(loss_diffs), max(stats_diffs)

  config = model_config(file, 'float32', dispatch)
  params = import_tree(file, 'params', config)
  key, model, total = jax.random.key(0), build_model(config), jnp.sum(batch.loss_weights)
  loss = lambda p: loss_fn(p, batch, total, key, model, config, True)
  grads, _ = jax.jit(jax.grad(loss, has_aux=True))(params)
  result['grads_rel'] = _relative(file, 'f32/grad', grads, config)
  recorded_grads = import_tree(file, 'f32/grad', config)
  result['adafactor_rel'] = _adafactor(file, params, recorded_grads, config)
  return result


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('file')
  parser.add_argument('--dispatch', choices=('mask', 'scatter'), default='scatter')
  parser.add_argument('--json', action='store_true', help='one JSON object and nothing else')
  args = parser.parse_args(argv)
  with np.load(args.file) as file:
    result = compare({name: file[name] for name in file.files}, args.dispatch)
  if args.json:
    print(json.dumps(result))
  else:
    for name, value in result.items():
      limit = LIMITS.get(name)
      verdict = '' if limit is None else f'  limit {limit:.0e}  {"ok" if value <= limit else "NO"}'
      print(f'{name:18} {value:.3e}{verdict}')
  return int(any(result[name] > limit for name, limit in LIMITS.items()))


if __name__ == '__main__':
  raise SystemExit(main())
