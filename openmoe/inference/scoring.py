"""Log-likelihoods of continuations: a context is read once, what follows it shares its cache."""

from __future__ import annotations

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.config import ModelConfig
from openmoe.inference.decode import Drops, decoder, output_logits, prefill
from openmoe.types import Array, PyTree

LOGITS = 1 << 27  # numbers of a block of logits; with a large vocabulary all would not fit


@flax.struct.dataclass
class Scores:
  """Of r continuations of up to n tokens; 0 and False behind the end of shorter ones.

  Attributes:
    log_probs_rn: float32 natural logarithms.
    greedy_rn: bool, the token has the largest logit.
    drops: what routing with capacity dropped.
  """

  log_probs_rn: Array
  greedy_rn: Array
  drops: Drops


def _continued(
  params: PyTree, config: ModelConfig, cache, length_r: Array, tokens_rt: Array, count_r: Array
):
  """Reads t tokens behind cached contexts: (hidden [r, t, d], statistics)."""
  r, t = tokens_rt.shape
  first = cache[0].value.shape[2] - t  # slots of the contexts
  slot_s, place_t = jnp.arange(first + t), jnp.arange(t)
  real_rt = place_t < count_r[:, None]
  context_rs = slot_s < length_r[:, None]
  own_ts = (slot_s >= first) & (slot_s <= first + place_t[:, None])
  mask_rts = (context_rs[:, None] | own_ts) & real_rt[..., None]
  positions_rt = jnp.where(real_rt, length_r[:, None] + place_t, -1)
  out = decoder(config, r * t).apply(
    {'params': params}, tokens_rt, positions_rt, mask_rts, cache, first, method='decode'
  )
  return out.hidden_btd, out.router_stats


def _judge(hidden_md: Array, kernel_dv: Array, target_m: Array) -> tuple[Array, Array]:
  """(log-probability, is largest) of a target at every position, in blocks of positions."""
  positions, vocab = target_m.shape[0], kernel_dv.shape[1]
  block = max(1, min(positions, LOGITS // vocab))
  blocks = -(-positions // block)
  pad = lambda x: jnp.pad(x, [(0, blocks * block - positions)] + [(0, 0)] * (x.ndim - 1))

  def one(piece):
    hidden_md, target_m = piece
    logits_mv = output_logits(hidden_md, kernel_dv)
    chosen_m = jnp.take_along_axis(logits_mv, target_m[:, None], axis=1)[:, 0]
    greedy_m = jnp.argmax(logits_mv, axis=-1) == target_m
    return chosen_m - jax.nn.logsumexp(logits_mv, axis=-1), greedy_m

  if blocks == 1:
    return one((hidden_md, target_m))
  pieces = (pad(hidden_md).reshape(blocks, block, -1), pad(target_m).reshape(blocks, block))
  log_probs, greedy = jax.lax.map(one, pieces)
  return log_probs.reshape(-1)[:positions], greedy.reshape(-1)[:positions]


@partial(jax.jit, static_argnames='config')
def score(
  params: PyTree,
  tokens_ct: Array,
  length_c: Array,
  context_r: Array,
  targets_rn: Array,
  count_r: Array,
  *,
  config: ModelConfig,
) -> Scores:
  """Scores r continuations of c contexts.

  Args:
    params: as models.unstack gives them.
    tokens_ct, length_c: contexts, padded on the right, and their lengths.
    context_r: int32 context of each continuation.
    targets_rn, count_r: continuations, padded on the right, and their lengths.
  """
  r, n = targets_rn.shape
  read = prefill(params, config, tokens_ct, length_c, n - 1)
  hidden_rnd, drops = read.hidden_bd[context_r][:, None], read.drops
  if n > 1:
    cache = jax.tree.map(lambda x: x[context_r], read.cache)
    fed_r = jnp.maximum(count_r - 1, 0)  # the last token is judged, not fed
    given = (cache, length_c[context_r], targets_rn[:, :-1], fed_r)
    more_rtd, stats = _continued(params, config, *given)
    hidden_rnd = jnp.concatenate([hidden_rnd, more_rtd], axis=1)
    drops = drops.add(config, stats, jnp.sum(fed_r))
  flat = hidden_rnd.reshape(r * n, -1)
  log_probs, greedy = _judge(flat, read.kernel_dv, targets_rn.reshape(-1))
  real_rn = jnp.arange(n) < count_r[:, None]
  whole = lambda x: partitioning.shard(x, (None,) * x.ndim)
  return Scores(
    whole(jnp.where(real_rn, log_probs.reshape(r, n), 0.0)),
    whole(greedy.reshape(r, n) & real_rn),
    jax.tree.map(whole, drops),
  )
