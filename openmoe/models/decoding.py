"""Decoding: layers one after the other, each with parameters and a cache of its own.

A scan would copy the cache of all layers for every token, and the matrices of all experts where
two are wanted.

The models' `decode` takes the parameters of `unstack`, and
  tokens_bt: int32; positions < 0 mark padding.
  positions_bt: int32 rotary positions; -1 for padding tokens.
  mask_bts: bool over the first s cache slots; no query looks at later ones.
  cache: from init_decode_cache or an earlier call.
  cache_slot: int32 scalar, first slot to write, the same in every row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.config import Architecture, ModelConfig
from openmoe.layers.dense import KVCache
from openmoe.models.common import BlockContext, Cache, group_shape
from openmoe.types import Array, PyTree


def decode_context(positions_bt: Array, mask_bts: Array, cache_slot: Array | int) -> BlockContext:
  """Context of a call that extends cached rows; positions < 0 mark padding."""
  real_bt1 = (positions_bt >= 0)[..., None]
  return BlockContext(mask_bts, real_bt1, jnp.maximum(positions_bt, 0), cache_slot)


def unrolled(calls: Sequence[Callable], r_btd: Array, cache: Cache) -> tuple[Array, Cache, Any]:
  """Runs blocks one after the other: (stream, their caches, statistics stacked over routers).

  Args:
    calls: (stream, cache) -> (stream, (cache, statistics or None)) for every block.
  """
  caches, stats = [], []
  for call, kv in zip(calls, cache, strict=True):
    r_btd, (kv, seen) = call(r_btd, kv)
    caches.append(kv)
    stats += [] if seen is None else [seen]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *stats) if stats else None
  return r_btd, tuple(caches), stacked


def init_decode_cache(config: ModelConfig, batch: int, length: int) -> Cache:
  """Empty key-value caches for the model's `decode`, `length` slots a row."""
  heads, head_dim, dtype = config.num_heads, config.head_dim, jnp.dtype(config.dtype)

  def zeros(*sides: int) -> Array:
    axes = ('act_batch', 'act_heads', None, None)
    return partitioning.shard(jnp.zeros((batch, heads, *sides), dtype), axes)

  one = lambda: KVCache(key=zeros(head_dim, length), value=zeros(length, head_dim))
  return tuple(one() for _ in range(config.num_layers))


def layer_name(layer: int) -> str:
  """Name of a layer's parameters in the tree of `unstack`."""
  return f'layer_{layer}'


def layer_index(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
  """Per layer (path, leading indices) of its parameters in the scanned tree."""
  if config.architecture is Architecture.JETMOE:
    return [('decoder', (layer,)) for layer in range(config.num_layers)]
  _, num_dense, sparse = group_shape(config)
  found = []
  for layer in range(config.num_layers):
    group, place = divmod(layer, num_dense + int(sparse))
    is_dense = place < num_dense
    found.append(('decoder/dense', (group, place)) if is_dense else ('decoder/sparse', (group,)))
  return found


def unstack(
  params: PyTree, config: ModelConfig, expert_form: Callable[[str, Array], Any] | None = None
) -> PyTree:
  """The parameters as `decode` takes them: those of every layer by themselves, `layer_0`, ...

  Slices of the scanned stacks; outside jit they are copies.

  Args:
    expert_form: (path, stack) -> what stands for the stack of a layer's experts.
  """
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  tree = {path: value for path, value in flat.items() if not path.startswith('decoder/')}
  for layer, (prefix, index) in enumerate(layer_index(config)):
    for path, stack in flat.items():
      if not path.startswith(f'{prefix}/'):
        continue
      value = stack[index]
      if expert_form is not None and is_expert_kernel(path, config):
        value = expert_form(path, value)
      tree[f'{layer_name(layer)}/{path.removeprefix(prefix + "/")}'] = value
  return flax.traverse_util.unflatten_dict(tree, sep='/')


def is_expert_kernel(path: str, config: ModelConfig) -> bool:
  """Whether a '/'-joined path is a stack over experts."""
  if path.endswith(('/wi_0/kernel', '/wi_1/kernel', '/wo/kernel')):
    return '/experts/' in path
  attention = ('/attention/query/kernel', '/attention/out/kernel')
  return config.architecture is Architecture.JETMOE and path.endswith(attention)


def gives_embeddings(path: str, config: ModelConfig) -> bool:
  """Whether a path is an expert kernel whose outputs are summed into the residual stream."""
  return is_expert_kernel(path, config) and path.endswith(('/wo/kernel', '/out/kernel'))
