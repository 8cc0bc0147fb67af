"""A dense checkpoint becomes a mixture of experts that computes the same function at step 0.

Every expert starts from the dense layer; routers start random. How each kind of block stays exact:

JetMoE. Weights of the chosen experts sum to 1 (top-k, then softmax) and gates come after the output
projection, so k copies of one layer give that layer's output whatever the router says: MLP experts
and attention experts (query and output kernels) are plain copies. The dense model is JetMoE's own
decoder with one expert, an ordinary attention and SwiGLU block. Exact with dropless dispatch; where
capacity drops a choice, its share of the output is missing.

OpenMoE. Its gates are raw probabilities: k copies would give the layer's output times a sum of
probabilities that differs from token to token, which no scale mends. But a sparse block has a dense
MLP of its own behind the mixture. So the dense MLP and its norm become the extra MLP, and the
mixture, in front of it, starts as a branch that adds 0: experts copy the input kernels wi_0 and
wi_1, and their output kernels wo are 0. Exact for every dispatch, capacity and gate. The first step
moves wo (hidden units are not 0), and from then on routers and input kernels learn too. The dense
model is an OpenLLaMA of the same sizes.

`noise` sets the copies apart: each copied expert kernel gets normal noise of that share of its own
standard deviation. OpenMoE stays exact with any noise, JetMoE only without.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from openmoe.checkpoint.description import Description
from openmoe.config import Architecture, ConfigError, Dispatch, ModelConfig
from openmoe.models import abstract_params, build_model
from openmoe.models.common import group_shape
from openmoe.types import Batch, PyTree


def dense_config(config: ModelConfig, name: str | None = None) -> ModelConfig:
  """The dense model that upcycles to `config`.

  Raises:
    ConfigError: config has no experts.
  """
  if config.moe is None:
    raise ConfigError(f'{config.name} has no experts; give the sparse model that is to come out.')
  name = config.name if name is None else name
  match config.architecture:
    case Architecture.OPENMOE:
      return dataclasses.replace(config, name=name, num_sparse_layers=0, moe=None)
    case Architecture.JETMOE:
      moe = dataclasses.replace(config.moe, num_experts=1, top_k=1)
      return dataclasses.replace(config, name=name, moe=moe)


def described_as(
  told: Description | None, config: ModelConfig, dense: ModelConfig, where: str
) -> Description:
  """What the mixture's checkpoint says of itself: the dense one's words, and its own model.

  Args:
    told: what the dense checkpoint says; None of one of before they said it.
    dense: what it has to be, dense_config(config).

  Raises:
    ConfigError: it computes otherwise than the dense part of `config`.
  """
  if told is None:
    return Description(config)
  computed = lambda model: {
    'norm_epsilon': model.norm_epsilon,
    'final_norm_epsilon': model.final_norm_epsilon or model.norm_epsilon,
    'rope_theta': model.rope_theta,
  }
  there, here = computed(told.model), computed(dense)
  differ = [
    f'{name} is {there[name]} there and {here[name]} in {config.name}'
    for name in here
    if there[name] != here[name]
  ]
  if differ:
    raise ConfigError(
      f'{where} computes otherwise: {"; ".join(differ)}. Give the gin file the values of the dense '
      'model.'
    )
  return dataclasses.replace(told, model=config, optimizer=None)


def upcycle(dense: PyTree, config: ModelConfig, seed: int, noise: float = 0.0) -> PyTree:
  """Parameters of `config` from those of dense_config(config); see the module's docstring.

  Args:
    dense: nested dict of arrays.
    seed: of routers and noise.
    noise: share of a copied kernel's standard deviation.

  Raises:
    ConfigError: the dense parameters are of other sizes.
  """
  flat = {k: np.asarray(v) for k, v in flax.traverse_util.flatten_dict(dense, sep='/').items()}
  _check(flat, dense_config(config))
  shapes, axes = (
    flax.traverse_util.flatten_dict(tree, sep='/') for tree in abstract_params(config)
  )
  rng = np.random.default_rng(seed)
  params = {}
  for path, leaf in shapes.items():
    if path.endswith('router/kernel'):
      params[path] = rng.normal(0, config.moe.router_init_std, leaf.shape).astype(np.float32)
      continue
    if path.endswith('router/bias'):  # of choices, as a new router has it
      params[path] = np.zeros(leaf.shape, np.float32)
      continue
    match config.architecture:
      case Architecture.OPENMOE:
        value = _openmoe(path, flat, config)
      case Architecture.JETMOE:
        value = _jetmoe(path, flat, config)
    if value.shape != leaf.shape:  # an expert axis to fill
      value = np.broadcast_to(value, leaf.shape)
    if noise and 'expert' in axes[path]:
      value = value + noise * np.std(value) * rng.normal(size=leaf.shape)
    params[path] = np.array(value, np.float32)
  return flax.traverse_util.unflatten_dict(params, sep='/')


def _check(flat: Mapping[str, np.ndarray], config: ModelConfig) -> None:
  shapes = flax.traverse_util.flatten_dict(abstract_params(config)[0], sep='/')
  for path in sorted(shapes.keys() | flat.keys()):
    there = flat[path].shape if path in flat else 'absent'
    here = shapes[path].shape if path in shapes else 'absent'
    if there != here:
      raise ConfigError(
        f'{path} is {there} in the dense checkpoint, and the dense model of {config.name} has it '
        f'{here}: train it with the same sizes, without experts.'
      )


def _openmoe(path: str, flat: Mapping[str, np.ndarray], config: ModelConfig) -> np.ndarray:
  """The dense value of one parameter; an expert axis, where there is one, has size 1."""
  if not path.startswith('decoder/'):
    return flat[path]
  groups, num_dense, _ = group_shape(config)
  kind, inner = path.removeprefix('decoder/').split('/', 1)
  source = inner.replace('moe/experts/', 'mlp/').replace('extra_mlp', 'mlp')
  stacked = flat[f'decoder/dense/{source}'][0]
  grouped = stacked.reshape(groups, num_dense + 1, *stacked.shape[1:])
  if kind == 'dense':
    return grouped[:, :num_dense]
  value = grouped[:, num_dense]
  if 'moe/experts/' not in inner:
    return value
  return (value if 'wo/' not in inner else np.zeros_like(value))[:, None]


def _jetmoe(path: str, flat: Mapping[str, np.ndarray], config: ModelConfig) -> np.ndarray:
  del config  # stacks are [l, 1, ...] there and [l, e, ...] here
  return flat[path]


def logit_difference(
  dense: PyTree, params: PyTree, config: ModelConfig, rows: int = 2, length: int = 32
) -> float:
  """Largest absolute difference of the float32 logits of both models on random tokens.

  Experts run dropless: what capacity drops is no property of the parameters.
  """
  config = dataclasses.replace(
    config,
    dtype='float32',
    moe=dataclasses.replace(config.moe, dispatch=Dispatch.DROPLESS, group_size=rows * length),
  )
  tokens = np.random.default_rng(0).integers(1, config.vocab_size, (rows, length)).astype(np.int32)
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
  ones = np.ones_like(tokens)
  batch = Batch(*map(jnp.asarray, (tokens, tokens, ones.astype(np.float32), ones, positions)))
  run = lambda c, p: jax.jit(lambda p: build_model(c).apply({'params': p}, batch, False).logits())(
    p
  )
  return float(jnp.max(jnp.abs(run(dense_config(config), dense) - run(config, params))))
