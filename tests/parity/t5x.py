"""Imports a checkpoint that t5x wrote and compares it with what t5x had in memory.

  python -m tests.parity.t5x CHECKPOINT_DIR STATE.npz [--json]

STATE.npz holds the train state (keys state/<path>), a batch and the logits of the original model on
it. Printed: `param_mismatches` and `optimizer_mismatches`, tensors that are not bit-exact after
import to our form or after export back to t5x's; `logits_eval`, the largest absolute difference of
our model's logits in evaluation.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import numpy as np

from convert.core.names import name_table
from convert.run import Options, convert, find_form
from openmoe import config as config_lib
from openmoe.checkpoint.checkpointer import Checkpointer
from openmoe.checkpoint.description import model_fields
from openmoe.models import abstract_params, build_model
from openmoe.optimizer import learning_rate, make_optimizer
from openmoe.plan import upstream_group_size
from openmoe.train_step import TrainState
from openmoe.types import Batch, PyTree

LIMITS = {'param_mismatches': 0, 'optimizer_mismatches': 0, 'logits_eval': 2e-5}


def model_config(file: Mapping[str, np.ndarray]) -> config_lib.ModelConfig:
  """The recorded model: sizes from the arrays, heads from config/*, the rest as released."""
  params = 'state/target/'
  layers = {name.split('/')[3] for name in file if name.startswith(f'{params}decoder/layers_')}
  routers = [name for name in file if name.startswith(params) and name.endswith('/w/kernel')]
  vocab_size, embed_dim = file[f'{params}token_embedder/embedding'].shape
  experts = file[routers[0]].shape[-1]
  return config_lib.ModelConfig(
    name='recorded',
    vocab_size=vocab_size,
    num_layers=len(layers),
    embed_dim=embed_dim,
    mlp_dim=file[f'{params}decoder/layers_0/mlp/wo/kernel'].shape[0],
    num_heads=file['config/num_heads'].item(),
    head_dim=file['config/head_dim'].item(),
    num_sparse_layers=len(routers),
    moe=config_lib.MoEConfig(
      num_experts=experts,
      group_size=upstream_group_size(
        file['inputs'].size,
        4096,
        experts,
        device_count=1,
        num_expert_partitions=1,
        num_model_partitions=1,
      ),
      dispatch='mask',
    ),
    dtype='float32',
  )


def _mismatches(found: dict[str, np.ndarray], file: Mapping, prefix: str) -> set[str]:
  """Recorded tensors under a prefix that are absent or not bit-exact, and unknown ones."""
  recorded = {k.removeprefix(prefix): v for k, v in file.items() if k.startswith(prefix)}
  wrong = set(found) ^ set(recorded)
  for name in set(found) & set(recorded):
    a, b = found[name], recorded[name]
    if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
      wrong.add(name)
  return wrong


def _restore(run: pathlib.Path, step: int, config, optimizer: bool) -> TrainState:
  """Through our own Checkpointer, as training would."""
  shapes, axes = abstract_params(config)
  identity = json.loads((run / f'checkpoint_{step}/metadata/metadata').read_text())['identity']
  checkpointer = Checkpointer(run, keep=1, identity=identity, read_only=True)
  assert checkpointer.latest_step() == step
  if not optimizer:
    return TrainState(step, checkpointer.restore_params(step, shapes), None)
  optimizer_config = config_lib.OptimizerConfig()
  transformation = make_optimizer(optimizer_config, axes, learning_rate(optimizer_config, 1))
  state = lambda p: TrainState(jnp.zeros((), jnp.int32), p, transformation.init(p))
  abstract = jax.eval_shape(state, shapes)
  return checkpointer.restore(step, abstract)[0]


def _flat(tree: PyTree) -> dict[str, np.ndarray]:
  join = lambda path: '/'.join(str(getattr(k, 'key', getattr(k, 'name', k))) for k in path)
  return {join(path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _imported(state: TrainState, config) -> tuple[dict, dict]:
  """(parameters, optimizer) of a restored state under t5x's names and shapes."""
  params, moments = _flat(state.params), _flat(state.opt_state.moments)
  target, slots = {}, {'step': np.asarray(state.step)}
  for row in name_table(config):
    target[row.t5x] = row.to_t5x(params[row.ours])
    used = {s: moments.get(f'{row.ours}/{s}') for s in ('v', 'v_row', 'v_col')}
    for slot in ('m', 'v', 'v_row', 'v_col'):
      name = f'param_states/{row.t5x}/{slot}'
      x = used.get(slot)
      if x is None:
        slots[name] = np.zeros((1,), np.float32)
        continue
      x = x[row.index]
      gate = row.gated and x.ndim - int(row.experts) > 1
      slots[name] = x.reshape(*x.shape[:-2], -1) if gate else x
  return target, slots


def _eval_logits(params: PyTree, file: Mapping, config) -> float:
  shape = file['inputs'].shape
  positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
  ones = jnp.ones(shape)
  inputs, targets = jnp.asarray(file['inputs']), jnp.asarray(file['targets'])
  batch = Batch(inputs, targets, ones, ones.astype(jnp.int32), jnp.asarray(positions))
  logits = build_model(config).apply({'params': params}, batch, False).logits()
  return float(np.max(np.abs(np.asarray(logits) - file['logits_eval'])))


def compare(checkpoint: str | os.PathLike, file: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Imports, restores, exports, and counts; see the module's docstring."""
  config = model_config(file)
  has_slots = any(name.startswith('state/state/param_states/') for name in file)
  with tempfile.TemporaryDirectory() as place:
    place = pathlib.Path(place)
    model = place / 'model.json'
    model.write_text(json.dumps(model_fields(config)))
    options = Options(optimizer=has_slots)
    ours = convert(find_form(checkpoint, 't5x'), 'ours', place / 'run', str(model), options)
    step = int(ours.path.name.split('_')[1])
    state = _restore(place / 'run', step, config, has_slots)
    back = convert(find_form(ours.path), 't5x', place / 'back', None, options)
    tensors = {n: np.asarray(t.whole()) for n, t in find_form(back.path).tensors().items()}
  exported = lambda part: {
    n.removeprefix(part): x for n, x in tensors.items() if n.startswith(part)
  }
  if has_slots:
    params, optimizer = _imported(state, config)
    wrong = _mismatches(optimizer, file, 'state/state/')
    wrong |= _mismatches(exported('state/'), file, 'state/state/')
  else:
    flat = _flat(state.params)
    params, wrong = {r.t5x: r.to_t5x(flat[r.ours]) for r in name_table(config)}, set()
  wrong_params = _mismatches(params, file, 'state/target/')
  wrong_params |= _mismatches(exported('target/'), file, 'state/target/')
  return {
    'param_mismatches': len(wrong_params),
    'optimizer_mismatches': len(wrong),
    'logits_eval': _eval_logits(state.params, file, config),
  }


def load(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """The arrays of an .npz; values that are no arrays (pickled objects) are left alone."""
  with np.load(path, allow_pickle=False) as archive:
    found = {}
    for name in archive.files:
      try:
        found[name] = archive[name]
      except ValueError:
        if not name.startswith('config/'):
          raise
    return found


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('checkpoint')
  parser.add_argument('state')
  parser.add_argument('--json', action='store_true', help='one JSON object and nothing else')
  args = parser.parse_args(argv)
  result = compare(args.checkpoint, load(args.state))
  if args.json:
    print(json.dumps(result))
  else:
    for name, value in result.items():
      limit = LIMITS[name]
      print(f'{name:22} {value:.3g}  limit {limit:.0e}  {"ok" if value <= limit else "NO"}')
  return int(any(not result[name] <= limit for name, limit in LIMITS.items()))


if __name__ == '__main__':
  raise SystemExit(main())
