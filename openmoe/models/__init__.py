"""Models: the same layers and one interface (see openmoe.models.openmoe.ModelOutput)."""

import flax.linen as nn
import flax.traverse_util
import jax.numpy as jnp

from openmoe.config import Architecture, ModelConfig
from openmoe.layers.attention import init_cache
from openmoe.layers.moe.experts import split_name
from openmoe.models import jetmoe, openmoe
from openmoe.models.jetmoe import JetMoE
from openmoe.models.openmoe import Cache, ModelOutput, OpenMoE, layer_name
from openmoe.types import PyTree

__all__ = ['JetMoE', 'ModelOutput', 'OpenMoE', 'build_model', 'init_decode_cache', 'unstack']


def build_model(config: ModelConfig, name: str | None = None) -> nn.Module:
  """The decoder that a config describes; inside a module, a submodule of this name."""
  match config.architecture:
    case Architecture.OPENMOE:
      return OpenMoE(config, name=name)
    case Architecture.JETMOE:
      return JetMoE(config, name=name)


def init_decode_cache(config: ModelConfig, batch: int, length: int) -> Cache:
  """Empty key-value caches for the model's `decode`, `length` slots a row."""
  sizes = (batch, length, config.num_heads, config.head_dim, jnp.dtype(config.dtype))
  return tuple(init_cache(*sizes) for _ in range(config.num_layers))


def layer_index(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
  """Per layer (path, leading indices) of its parameters in the scanned tree."""
  match config.architecture:
    case Architecture.OPENMOE:
      return openmoe.layer_index(config)
    case Architecture.JETMOE:
      return jetmoe.layer_index(config)


def unstack(params: PyTree, config: ModelConfig, split_experts: bool = False) -> PyTree:
  """The parameters as `decode` takes them: those of every layer by themselves, `layer_0`, ...

  Slices of the scanned stacks; outside jit they are copies.

  Args:
    split_experts: an array for every expert (layers.experts), for CPUs.
  """
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  tree = {path: value for path, value in flat.items() if not path.startswith('decoder/')}
  for layer, (prefix, index) in enumerate(layer_index(config)):
    for path, stack in flat.items():
      if not path.startswith(f'{prefix}/'):
        continue
      place = f'{layer_name(layer)}/{path.removeprefix(prefix + "/")}'
      if split_experts and is_expert_kernel(path, config):
        head = place.removesuffix('/kernel')
        experts = range(config.moe.num_experts)
        tree |= {f'{head}/{split_name(e)}': stack[*index, e] for e in experts}
      else:
        tree[place] = stack[index]
  return flax.traverse_util.unflatten_dict(tree, sep='/')


def is_expert_kernel(path: str, config: ModelConfig) -> bool:
  """Whether a '/'-joined path is a stack over experts."""
  if path.endswith(('/wi_0/kernel', '/wi_1/kernel', '/wo/kernel')):
    return '/experts/' in path
  attention = ('/attention/query/kernel', '/attention/out/kernel')
  return config.architecture is Architecture.JETMOE and path.endswith(attention)
