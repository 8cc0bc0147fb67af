"""The device's part of a server: a cache with a slot for every request, and three programs.

A slot is a row of the key-value cache that holds one sequence from its first place on. Prompts are
read in chunks of few sizes whose borders depend on the prompt alone; one step continues all slots
by a token. Rows do not see each other and every program has one shape, so what a slot gives does
not depend on what is in the others (float32 and dropless; tests/serving holds it).
"""

from __future__ import annotations

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from openmoe import partitioning
from openmoe.config import ModelConfig
from openmoe.inference.decode import decoder, output_logits
from openmoe.layers.dense import KVCache
from openmoe.layers.moe.override import Seen, watching
from openmoe.models.decoding import init_decode_cache
from openmoe.types import Array, PyTree

CHUNKS = (16, 64, 256)  # tokens of a prompt that are read at once
ALTERNATIVES = 20  # likeliest tokens that are told of every place
_LEAST_KEYS = 256  # that attention looks at; then powers of two


@flax.struct.dataclass
class SlotCache(KVCache):
  """A cache whose rows are of different lengths."""

  def written(self, new: KVCache, slot: Array) -> SlotCache:
    """One new entry a row.

    Args:
      slot: int32 [b], the place of each row.
    """
    if partitioning.partitions('act_batch') > 1:
      row = jnp.arange(slot.shape[0])
      key = self.key.at[row, :, :, slot].set(new.key[..., 0].astype(self.key.dtype))
      value = self.value.at[row, :, slot].set(new.value[:, :, 0].astype(self.value.dtype))
      return SlotCache(key, value)

    def one(i: Array, cache: SlotCache) -> SlotCache:
      # Row after row in place: a scatter on a CPU goes element by element.
      take = lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1, axis=0)
      put = jax.lax.dynamic_update_slice
      key = put(cache.key, take(new.key).astype(cache.key.dtype), (i, 0, 0, slot[i]))
      value = put(cache.value, take(new.value).astype(cache.value.dtype), (i, 0, slot[i], 0))
      return SlotCache(key, value)

    return jax.lax.fori_loop(0, slot.shape[0], one, self)


def init_slots(config: ModelConfig, slots: int, max_length: int) -> tuple[SlotCache, ...]:
  """An empty cache of `slots` sequences of max_length tokens.

  Behind them lie places that the padding of a chunk may overwrite, the last of which takes what
  idle slots write.
  """
  cache = init_decode_cache(config, slots, max_length + max(CHUNKS))
  return tuple(SlotCache(kv.key, kv.value) for kv in cache)


def cache_bytes(config: ModelConfig, slots: int, max_length: int) -> int:
  """Bytes of init_slots."""
  shapes = jax.eval_shape(lambda: init_slots(config, slots, max_length))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def chunks_of(length: int) -> list[tuple[int, int]]:
  """(tokens, size of the program) of the chunks in which a prompt is read.

  >>> chunks_of(300)
  [(256, 256), (44, 64)]
  """
  whole, rest = divmod(length, max(CHUNKS))
  found = [(max(CHUNKS), max(CHUNKS))] * whole
  return [*found, (rest, next(c for c in CHUNKS if c >= rest))] if rest else found


def keys_for(length: int, max_length: int) -> int:
  """How many places attention looks at where the longest sequence has `length` tokens."""
  size = _LEAST_KEYS
  while size < length:
    size *= 2
  return min(size, max_length + max(CHUNKS))


@flax.struct.dataclass
class Draw:
  """How the next token of every row is drawn, [b] each.

  Attributes:
    temperature: float32; 0 takes the largest logit.
    top_k: int32; 0 for all.
    top_p: float32.
    seed: uint32, of the row.
    count: int32, tokens that the row has drawn before.
  """

  temperature: Array
  top_k: Array
  top_p: Array
  seed: Array
  count: Array

  @staticmethod
  def empty(rows: int) -> Draw:
    """Of NumPy arrays that the host fills in: greedy."""
    zeros = lambda dtype: np.zeros(rows, dtype)
    one = np.ones(rows, np.float32)
    return Draw(zeros(np.float32), zeros(np.int32), one, zeros(np.uint32), zeros(np.int32))


@flax.struct.dataclass
class Drawn:
  """What was drawn.

  Attributes:
    token_b: int32.
    log_prob_b: float32 natural logarithms, temperature aside.
    other_bA: int32 the likeliest tokens, the largest first; zeros where nobody asked.
    other_log_prob_bA: float32.
    expert_bRk: int32, what the routers of the place that drew it chose; None without routers.
  """

  token_b: Array
  log_prob_b: Array
  other_bA: Array
  other_log_prob_bA: Array
  expert_bRk: Array | None = None


def _draw(logits_bv: Array, draw: Draw) -> Array:
  """int32 [b]; a row gets what decode.sample would give it alone."""
  best_b = jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)

  def drawn() -> Array:
    scaled_bv = logits_bv / jnp.where(draw.temperature > 0, draw.temperature, 1.0)[:, None]
    descending_bv = jnp.sort(scaled_bv, axis=-1)[:, ::-1]
    at = jnp.clip(draw.top_k, 1, logits_bv.shape[-1]) - 1
    kth_b1 = jnp.take_along_axis(descending_bv, at[:, None], axis=-1)
    least_b1 = jnp.where(draw.top_k[:, None] > 0, kth_b1, -jnp.inf)
    descending_bv = jnp.where(descending_bv < least_b1, -jnp.inf, descending_bv)
    probs_bv = jax.nn.softmax(descending_bv, axis=-1)
    # A token stays while the mass before it is short of p, so the largest always stays.
    keep_bv = jnp.cumsum(probs_bv, axis=-1) - probs_bv < draw.top_p[:, None]
    mass_b1 = jnp.min(jnp.where(keep_bv, descending_bv, jnp.inf), axis=-1, keepdims=True)
    least_b1 = jnp.where(draw.top_p[:, None] < 1, jnp.maximum(least_b1, mass_b1), least_b1)
    scaled_bv = jnp.where(scaled_bv < least_b1, -jnp.inf, scaled_bv)
    key_b = jax.vmap(lambda s, n: jax.random.fold_in(jax.random.key(s), n))(draw.seed, draw.count)
    choice_b = jax.vmap(jax.random.categorical)(key_b, scaled_bv).astype(jnp.int32)
    return jnp.where(draw.temperature > 0, choice_b, best_b)

  return jax.lax.cond(jnp.any(draw.temperature > 0), drawn, lambda: best_b)


def _chosen(seen: list[Seen], tokens: int) -> Array | None:
  """int32 [tokens, R, k] experts, of routers in their order in the model."""
  chosen = [one.routing.expert_index_gtk.reshape(tokens, -1) for one in seen]
  return jnp.stack(chosen, axis=1) if chosen else None


def _drawn(logits_bv: Array, draw: Draw, alternatives: Array, expert_bRk: Array | None) -> Drawn:
  token_b = _draw(logits_bv, draw)
  total_b = jax.nn.logsumexp(logits_bv, axis=-1)
  of_token = jnp.take_along_axis(logits_bv, token_b[:, None], axis=1)[:, 0]
  others = _others(logits_bv, total_b, alternatives)
  whole = lambda x: partitioning.shard(x, (None,) * x.ndim)
  return jax.tree.map(whole, Drawn(token_b, of_token - total_b, *others, expert_bRk))


def _others(logits_bv: Array, total_b: Array, alternatives: Array) -> tuple[Array, Array]:
  """The likeliest tokens and their logarithms, where somebody asked."""
  b, most = logits_bv.shape[0], min(ALTERNATIVES, logits_bv.shape[1])

  def likeliest():
    logits_bA, token_bA = jax.lax.top_k(logits_bv, most)
    return token_bA.astype(jnp.int32), logits_bA - total_b[:, None]

  nothing = lambda: (jnp.zeros((b, most), jnp.int32), jnp.zeros((b, most), jnp.float32))
  return jax.lax.cond(alternatives, likeliest, nothing)


@partial(jax.jit, static_argnames=('config', 'keys'), donate_argnames='cache')
def step(
  params: PyTree,
  cache: tuple[SlotCache, ...],
  token_b: Array,
  length_b: Array,
  active_b: Array,
  draw: Draw,
  alternatives: Array,
  *,
  config: ModelConfig,
  keys: int,
) -> tuple[tuple[SlotCache, ...], Drawn]:
  """One more token of every active slot; the cache given is consumed.

  Args:
    params: as decoding.unstack gives them.
    token_b: int32, the last token of each sequence, which is not in the cache yet.
    length_b: int32 tokens in the cache.
    active_b: rows that are continued.
    alternatives: whether somebody wants to know the likeliest tokens.
    keys: places that attention looks at, more than any active length; see keys_for.
  """
  b, last = token_b.shape[0], cache[0].key.shape[-1] - 1
  position_b1 = jnp.where(active_b, length_b, -1)[:, None]
  mask_b1s = (jnp.arange(keys) <= position_b1)[:, None]
  place_b = jnp.where(active_b, length_b, last)
  with watching() as seen:
    out = decoder(config, b).apply(
      {'params': params}, token_b[:, None], position_b1, mask_b1s, cache, place_b, method='decode'
    )
  logits_bv = output_logits(out.hidden_btd[:, 0], out.output_kernel_dv)
  return out.cache, _drawn(logits_bv, draw, alternatives, _chosen(seen, b))


@flax.struct.dataclass
class Read:
  """A chunk of a prompt.

  Attributes:
    drawn: what follows its last token, one row.
    log_prob_t: float32, of each next token of the chunk given what is before; or None.
    other_tA, other_log_prob_tA: see Drawn; of the place behind each token; or None.
  """

  drawn: Drawn
  log_prob_t: Array | None = None
  other_tA: Array | None = None
  other_log_prob_tA: Array | None = None


@partial(jax.jit, static_argnames=('config', 'keys', 'scores'), donate_argnames='cache')
def read_chunk(
  params: PyTree,
  cache: tuple[SlotCache, ...],
  row: Array,
  tokens_t: Array,
  next_t: Array,
  first: Array,
  count: Array,
  draw: Draw,
  alternatives: Array,
  *,
  config: ModelConfig,
  keys: int,
  scores: bool,
) -> tuple[tuple[SlotCache, ...], Read]:
  """Reads tokens of one prompt into its slot; the cache given is consumed.

  Args:
    row: int32, the slot.
    tokens_t: int32, padded to one of CHUNKS.
    next_t: int32, the token behind each one, for `scores`.
    first: int32, place of the first one.
    count: int32, how many are real.
    draw: of one row.
    keys: places that attention looks at; see keys_for.
    scores: whether to tell how probable the prompt itself is.
  """
  t = tokens_t.shape[0]
  here_t = jnp.arange(t)
  position_t = jnp.where(here_t < count, first + here_t, -1)
  mask_ts = jnp.arange(keys) <= position_t[:, None]
  take = lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, axis=0)
  one = tuple(KVCache(take(kv.key), take(kv.value)) for kv in cache)
  where = (tokens_t[None], position_t[None], mask_ts[None], one, first)
  with watching() as seen:
    out = decoder(config, t).apply({'params': params}, *where, method='decode')
  put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, row, axis=0)
  cache = tuple(
    SlotCache(put(kv.key, new.key), put(kv.value, new.value))
    for kv, new in zip(cache, out.cache, strict=True)
  )
  hidden_td = out.hidden_btd[0]
  last_1d = jax.lax.dynamic_slice_in_dim(hidden_td, count - 1, 1, axis=0)
  expert_tRk = _chosen(seen, t)
  if expert_tRk is not None:
    expert_tRk = jax.lax.dynamic_slice_in_dim(expert_tRk, count - 1, 1, axis=0)
  drawn = _drawn(output_logits(last_1d, out.output_kernel_dv), draw, alternatives, expert_tRk)
  if not scores:
    return cache, Read(drawn)
  logits_tv = output_logits(hidden_td, out.output_kernel_dv)
  total_t = jax.nn.logsumexp(logits_tv, axis=-1)
  log_prob_t = jnp.take_along_axis(logits_tv, next_t[:, None], axis=1)[:, 0] - total_t
  read = Read(drawn, log_prob_t, *_others(logits_tv, total_t, alternatives))
  return cache, jax.tree.map(lambda x: partitioning.shard(x, (None,) * x.ndim), read)


@partial(jax.jit, donate_argnames='cache')
def copy_row(cache: tuple[SlotCache, ...], source: Array, target: Array) -> tuple[SlotCache, ...]:
  """Puts what is in one slot into another one too."""
  take = lambda x: jax.lax.dynamic_slice_in_dim(x, source, 1, axis=0)
  put = lambda x: jax.lax.dynamic_update_slice_in_dim(x, take(x), target, axis=0)
  return jax.tree.map(put, cache)
