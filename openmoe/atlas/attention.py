"""What an attention expert looks at, computed beside the layer from what the layer is given.

Only a mixture of attention heads allows it: keys and values are shared, so what differs between two
experts is the query, and experts can be compared directly. Of every choice, averaged over its
heads.
"""

from __future__ import annotations

import contextlib
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


def behaviour(probs_bkts: Array, tokens_bt: Array) -> Array:
  """float32 [b, t, k, BEHAVIOUR] of attention probabilities; tokens_bt: ids, to find copies."""
  place_t = jnp.arange(tokens_bt.shape[1])
  distance_ts = (place_t[:, None] - place_t[None]).astype(jnp.float32)
  before_bt = jnp.pad(tokens_bt[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  copied_bts = (before_bt[:, None, :] == tokens_bt[:, :, None]) & (distance_ts >= 0)
  log_probs = jnp.log(jnp.maximum(probs_bkts, 1e-30))
  mean = lambda x: jnp.sum(probs_bkts * x, axis=-1)
  found = (
    mean(distance_ts),
    -mean(log_probs),
    mean((place_t == 0).astype(jnp.float32)),
    mean((distance_ts == 1).astype(jnp.float32)),
    mean(copied_bts[:, None].astype(jnp.float32)),
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

  def of_head(pair):
    query_btkh, key_bsh = pair
    logits_bkts = jnp.einsum('btkh,bsh->bkts', query_btkh, key_bsh).astype(jnp.float32) * h**-0.5
    logits_bkts = jnp.where(mask_bts[:, None, :, :t], logits_bkts, -1e30)
    return behaviour(jax.nn.softmax(logits_bkts, axis=-1), tokens_bt)

  # Head by head: [b, k, t, s] is the largest array of a record.
  heads = (jnp.moveaxis(query, 3, 0), jnp.moveaxis(key, 2, 0))
  return jnp.mean(jax.lax.map(of_head, heads), axis=0)
