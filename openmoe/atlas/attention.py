"""What an attention expert looks at, computed beside the layer from what the layer is given.

Only a mixture of attention heads allows it: keys and values are shared, so what differs between two
experts is the query, and experts can be compared directly. Of every choice, averaged over its
heads.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp

from openmoe.inference.cpu_experts import is_split
from openmoe.layers.dense import apply_rotary, rotary_tables
from openmoe.layers.moe.moa import MixtureOfAttention
from openmoe.layers.moe.router import Router
from openmoe.types import Array

# Means over the probabilities of a query: distance to its keys in tokens, entropy in nats, mass on
# the first position, on the token before, and on tokens that follow an earlier copy of this one.
BEHAVIOUR = ('distance', 'entropy', 'first', 'previous', 'induction')


_BLOCK = 128  # queries at once: their probabilities stay in a core's cache


def behaviour(probs_bkts: Array, tokens_bt: Array, first: int | Array = 0) -> Array:
  """float32 [b, t, k, BEHAVIOUR] of attention probabilities of t queries over s keys.

  Args:
    tokens_bt: ids of all s places, to find copies.
    first: place of the first query.
  """
  t, s = probs_bkts.shape[-2:]
  place_t, place_s = first + jnp.arange(t), jnp.arange(s)
  mine_bt = jax.lax.dynamic_slice_in_dim(tokens_bt, first, t, axis=1)
  before_bs = jnp.pad(tokens_bt[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  copied_bts = (before_bs[:, None, :] == mine_bt[:, :, None]) & (place_s <= place_t[:, None])
  # Else XLA computes the softmax again in each of the sums.
  probs_bkts = jax.lax.optimization_barrier(probs_bkts)
  log_probs = jnp.log(jnp.maximum(probs_bkts, 1e-30))
  before_t = jnp.maximum(place_t - 1, 0)
  previous_bkt = jnp.take_along_axis(probs_bkts, before_t[None, None, :, None], axis=-1)[..., 0]
  found = (
    place_t - probs_bkts @ place_s.astype(jnp.float32),
    -jnp.sum(probs_bkts * log_probs, axis=-1),
    probs_bkts[..., 0],
    jnp.where(place_t > 0, previous_bkt, 0.0),
    jnp.sum(jnp.where(copied_bts[:, None], probs_bkts, 0.0), axis=-1),
  )
  return jnp.stack(found, axis=-1).swapaxes(1, 2)


def _query(kernel, x_btd: Array, index_btk: Array) -> Array:
  """[b, t, k, n h]: each choice's projection; one expert after the other, so memory stays small."""
  stack = jnp.stack(kernel.arrays) if is_split(kernel) else kernel

  def one(total, pair):
    kernel_dO, expert = pair
    mine_btk = (index_btk == expert)[..., None]
    return total + jnp.where(mine_btk, (x_btd @ kernel_dO)[:, :, None], 0), None

  start = jnp.zeros((*index_btk.shape, stack.shape[-1]), x_btd.dtype)
  experts = jnp.arange(stack.shape[0], dtype=index_btk.dtype)
  return jax.lax.scan(one, start, (stack.astype(x_btd.dtype), experts))[0]


@contextlib.contextmanager
def looking(tokens_bt: Array, enabled: bool = True) -> Iterator[list[Array]]:
  """Notes behaviour() of every mixture of attention that is called inside, in order."""
  found: list[Array] = []
  chosen: list[Array] = []

  def watch(call, args, kwargs, context):
    result = call(*args, **kwargs)
    module = context.module
    if context.method_name != '__call__':
      return result
    if isinstance(module, Router):
      chosen[:] = [result.expert_index_gtk]
    elif isinstance(module, MixtureOfAttention):
      found.append(_looked_at(module, chosen[0], tokens_bt, args))
    return result

  with nn.intercept_methods(watch) if enabled else contextlib.nullcontext():
    yield found


def _looked_at(module: MixtureOfAttention, index_gtk: Array, tokens_bt: Array, args) -> Array:
  x_btd, _, mask_bts, positions_bt, _, cache, _ = args
  del cache  # rows begin with this call: its keys are those of the row
  b, t, _ = x_btd.shape
  n, h, k = module.num_heads, module.head_dim, module.config.top_k
  params, x_btd = module.variables['params'], x_btd.astype(module.dtype)
  query = _query(params['query']['kernel'], x_btd, index_gtk.reshape(b, t, k))
  key = x_btd @ params['key']['kernel'].astype(module.dtype)
  sin, cos = rotary_tables(positions_bt, h, module.rope_theta, module.dtype)
  query = apply_rotary(query.reshape(b, t, k, n, h), sin[:, :, None], cos[:, :, None])
  key = apply_rotary(key.reshape(b, t, n, h), sin, cos)

  block = math.gcd(t, _BLOCK)

  def of_block(query_btkh, key_bsh, first):
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, block, axis=1)
    logits_bkts = jnp.einsum('btkh,bsh->bkts', cut(query_btkh), key_bsh).astype(jnp.float32)
    logits_bkts = jnp.where(cut(mask_bts[..., :t])[:, None], logits_bkts * h**-0.5, -1e30)
    return behaviour(jax.nn.softmax(logits_bkts, axis=-1), tokens_bt, first)

  def of_head(pair):
    blocks = jax.lax.map(lambda i: of_block(*pair, i * block), jnp.arange(t // block))
    return jnp.moveaxis(blocks, 0, 1).reshape(b, t, k, -1)

  # Head by head, some queries at a time: [b, k, t, s] would be the largest array of a record.
  heads = (jnp.moveaxis(query, 3, 0), jnp.moveaxis(key, 2, 0))
  return jnp.mean(jax.lax.map(of_head, heads), axis=0)
