"""Compares both our models with logits recorded from the published PyTorch port.

  python -m tests.parity.torch_openmoe FILE.npz [--json]

FILE.npz holds config/<name>, state_dict/<name>, input_ids, logits_eval and logits_train (keys as
tests/golden/torch_openmoe_a.npz). Printed, as largest absolute differences: `jax_eval`,
`jax_train` (our JAX model with the port's capacity), `torch_eval`, `torch_train` (our PyTorch
model), and `dropless_jax_vs_torch`, our two models against each other without capacity, both in
float64. Float32 cannot hold 2e-5 on the recorded model: attention without 1/sqrt(head_dim)
magnifies rounding. Moving each weight by a random part of its last bit, everything else exact,
already moves the logits by 5e-6 to 2e-5; the roundings of every operation come on top. JAX ends
1.6e-5 from the exact result and PyTorch 3.7e-5, a third of it from the order in which its matrix
products sum, which no option changes. That figure, 3.5e-5, is printed beside as
`dropless_float32`, without a limit.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import dataclasses

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import torch

from convert.core.names import check_names, name_table
from convert.torch.configuration_openmoe import OpenMoeConfig
from convert.torch.modeling_openmoe import OpenMoeForCausalLM
from openmoe.config import CapacityConvention, Dispatch, ModelConfig, MoEConfig
from openmoe.models import abstract_params, build_model
from openmoe.types import Batch, PyTree

LIMITS = {
  'jax_eval': 2e-4,
  'jax_train': 2e-4,
  'torch_eval': 2e-4,
  'torch_train': 2e-4,
  'dropless_jax_vs_torch': 2e-5,
}
# What the port takes where the file does not say.
_DEFAULTS = {
  'router_topk': 2,
  'router_capacity_factor_train': 1.25,
  'router_capacity_factor_eval': 2.0,
  'router_min_capacity': 4,
}
_ONE_GROUP = 2**31 - 1


def _field(file: Mapping, name: str):
  return file[f'config/{name}'].item() if f'config/{name}' in file else _DEFAULTS[name]


def jax_config(file: Mapping[str, np.ndarray]) -> ModelConfig:
  """The recorded model with the port's capacity: one group of all tokens."""
  get = lambda name: _field(file, name)
  moe = MoEConfig(
    num_experts=get('num_experts'),
    top_k=get('router_topk'),
    group_size=_ONE_GROUP,
    capacity_factor=get('router_capacity_factor_train'),
    eval_capacity_factor=get('router_capacity_factor_eval'),
    min_expert_capacity=get('router_min_capacity'),
    capacity_convention=CapacityConvention.COLOSSALAI,
  )
  return ModelConfig(
    name='recorded',
    vocab_size=get('vocab_size'),
    num_layers=get('num_hidden_layers'),
    embed_dim=get('hidden_size'),
    mlp_dim=get('intermediate_size'),
    num_heads=get('num_attention_heads'),
    head_dim=get('head_dim'),
    num_sparse_layers=get('num_hidden_layers') // get('moe_layer_interval'),
    moe=moe,
    dtype='float32',
  )


def import_params(file: Mapping[str, np.ndarray], config: ModelConfig) -> PyTree:
  """The recorded state_dict as a tree of ours.

  Raises:
    NamesError: a name is missing or does not belong.
  """
  weights = {k.removeprefix('state_dict/'): v for k, v in file.items() if k.startswith('state_')}
  check_names(weights, [row.hf for row in name_table(config)], 'state_dict')
  shapes = flax.traverse_util.flatten_dict(abstract_params(config)[0], sep='/')
  flat = {path: np.full(leaf.shape, np.nan, np.float32) for path, leaf in shapes.items()}
  for row in name_table(config):
    flat[row.ours][row.index] = row.from_hf(weights[row.hf])
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def jax_logits(params: PyTree, config: ModelConfig, tokens: np.ndarray, train: bool) -> np.ndarray:
  """All tokens are real: the port masks none of these."""
  ones = jnp.ones(tokens.shape, jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
  inputs = jnp.asarray(tokens, jnp.int32)
  batch = Batch(inputs, ones, ones.astype(jnp.float32), ones, positions)
  return np.asarray(build_model(config).apply({'params': params}, batch, train).logits())


def torch_model(file: Mapping[str, np.ndarray], capacity: str) -> OpenMoeForCausalLM:
  """Our PyTorch model with the recorded state_dict, names unchanged."""
  fields = {k.removeprefix('config/'): v.item() for k, v in file.items() if k.startswith('config/')}
  model = OpenMoeForCausalLM(OpenMoeConfig(**fields, router_capacity=capacity))
  weights = {
    k.removeprefix('state_dict/'): torch.from_numpy(np.array(v))
    for k, v in file.items()
    if k.startswith('state_dict/')
  }
  model.load_state_dict(weights, strict=True)
  return model


def torch_logits(model: OpenMoeForCausalLM, tokens: np.ndarray, train: bool) -> np.ndarray:
  model.train(train)
  with torch.no_grad():
    return model(torch.from_numpy(np.asarray(tokens, np.int64)), use_cache=False).logits.numpy()


def compare(file: Mapping[str, np.ndarray]) -> dict[str, float]:
  """All differences; see the module's docstring."""
  config, tokens = jax_config(file), file['input_ids']
  params = import_params(file, config)
  largest = lambda a, b: float(np.max(np.abs(a - b)))
  result = {}
  model = torch_model(file, 'colossalai')
  for train, mode in ((False, 'eval'), (True, 'train')):
    recorded = file[f'logits_{mode}']
    result[f'jax_{mode}'] = largest(jax_logits(params, config, tokens, train), recorded)
    result[f'torch_{mode}'] = largest(torch_logits(model, tokens, train), recorded)
  moe = dataclasses.replace(config.moe, dispatch=Dispatch.DROPLESS)
  config, model = dataclasses.replace(config, moe=moe), torch_model(file, 'dropless')
  narrow = jax_logits(params, config, tokens, False)
  result['dropless_float32'] = largest(narrow, torch_logits(model, tokens, False))
  with jax.enable_x64(True):
    config = dataclasses.replace(config, dtype='float64')
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    wide = jax_logits(params, config, tokens, False)
  result['dropless_jax_vs_torch'] = largest(wide, torch_logits(model.double(), tokens, False))
  return result


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('file')
  parser.add_argument('--json', action='store_true', help='one JSON object and nothing else')
  args = parser.parse_args(argv)
  with np.load(args.file, allow_pickle=False) as file:
    result = compare({name: file[name] for name in file.files})
  if args.json:
    print(json.dumps(result))
  else:
    for name, value in result.items():
      limit = LIMITS.get(name)
      verdict = '' if limit is None else f'  limit {limit:.0e}  {"ok" if value <= limit else "NO"}'
      print(f'{name:22} {value:.3e}{verdict}')
  return int(any(not result[name] <= limit for name, limit in LIMITS.items()))


if __name__ == '__main__':
  raise SystemExit(main())
