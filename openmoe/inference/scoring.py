"""Log-likelihoods of continuations: a context is read once, what follows it shares its cache."""

from __future__ import annotations

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.config import ModelConfig
from openmoe.inference.decode import Drops, output_logits, prefill, run_decoder
from openmoe.types import Array, PyTree

LOGITS = 1 << 27  # numbers of a block of logits; with a large vocabulary all would not fit


@flax.struct.dataclass
class Scores:
  """Scores of A continuations of up to W tokens; 0 and False behind the end of shorter ones.

  Attributes:
    log_probs_AW: float32 natural logarithms.
    greedy_AW: bool, the token has the largest logit.
    drops: what routing with capacity dropped.
  """

  log_probs_AW: Array
  greedy_AW: Array
  drops: Drops


def _continued(
  params: PyTree, config: ModelConfig, cache, length_A: Array, tokens_At: Array, count_A: Array
):
  """Reads t tokens behind cached contexts: (hidden [A, t, d], statistics)."""
  t = tokens_At.shape[1]
  first = cache[0].value.shape[2] - t  # slots of the contexts
  slot_s, place_t = jnp.arange(first + t), jnp.arange(t)
  real_At = place_t < count_A[:, None]
  context_As = slot_s < length_A[:, None]
  own_ts = (slot_s >= first) & (slot_s <= first + place_t[:, None])
  mask_Ats = (context_As[:, None] | own_ts) & real_At[..., None]
  positions_At = jnp.where(real_At, length_A[:, None] + place_t, -1)
  out = run_decoder(params, config, tokens_At, positions_At, mask_Ats, cache, first)
  return out.hidden_btd, out.router_stats


def _judge(hidden_Nd: Array, kernel_dv: Array, target_N: Array) -> tuple[Array, Array]:
  """(log-probability, is largest) of a target at every position, in blocks of positions."""
  positions, vocab = target_N.shape[0], kernel_dv.shape[1]
  block = max(1, min(positions, LOGITS // vocab))
  blocks = -(-positions // block)
  pad = lambda x: jnp.pad(x, [(0, blocks * block - positions)] + [(0, 0)] * (x.ndim - 1))

  def one(piece):
    hidden_Nd, target_N = piece
    logits_Nv = output_logits(hidden_Nd, kernel_dv)
    chosen_N = jnp.take_along_axis(logits_Nv, target_N[:, None], axis=1)[:, 0]
    greedy_N = jnp.argmax(logits_Nv, axis=-1) == target_N
    return chosen_N - jax.nn.logsumexp(logits_Nv, axis=-1), greedy_N

  if blocks == 1:
    return one((hidden_Nd, target_N))
  pieces = (pad(hidden_Nd).reshape(blocks, block, -1), pad(target_N).reshape(blocks, block))
  log_probs, greedy = jax.lax.map(one, pieces)
  return log_probs.reshape(-1)[:positions], greedy.reshape(-1)[:positions]


@partial(jax.jit, static_argnames='config')
def score(
  params: PyTree,
  tokens_Pt: Array,
  length_P: Array,
  context_A: Array,
  targets_AW: Array,
  count_A: Array,
  *,
  config: ModelConfig,
) -> Scores:
  """Scores A continuations of P contexts.

  Args:
    params: as decoding.unstack gives them.
    tokens_Pt, length_P: contexts, padded on the right, and their lengths.
    context_A: int32 context of each continuation.
    targets_AW, count_A: continuations, padded on the right, and their lengths.
  """
  r, n = targets_AW.shape
  read = prefill(params, config, tokens_Pt, length_P, n - 1)
  hidden_AWd, drops = read.hidden_bd[context_A][:, None], read.drops
  if n > 1:
    cache = jax.tree.map(lambda x: x[context_A], read.cache)
    fed_A = jnp.maximum(count_A - 1, 0)  # the last token is judged, not fed
    given = (cache, length_P[context_A], targets_AW[:, :-1], fed_A)
    more_Atd, stats = _continued(params, config, *given)
    hidden_AWd = jnp.concatenate([hidden_AWd, more_Atd], axis=1)
    drops = drops.add(config, stats, jnp.sum(fed_A))
  flat = hidden_AWd.reshape(r * n, -1)
  log_probs, greedy = _judge(flat, read.kernel_dv, targets_AW.reshape(-1))
  real_AW = jnp.arange(n) < count_A[:, None]
  whole = lambda x: partitioning.shard(x, (None,) * x.ndim)
  return Scores(
    whole(jnp.where(real_AW, log_probs.reshape(r, n), 0.0)),
    whole(greedy.reshape(r, n) & real_AW),
    jax.tree.map(whole, drops),
  )
