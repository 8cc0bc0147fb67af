"""Generation: prefill, then cached steps, in one jitted call with static shapes.

Prompts lie at the left of a row, padded on the right to a common length T; every row's new tokens
go to slots T, T + 1, ..., so that all rows write the same slot and caches are updated in place.
Rotary positions are a prompt's own: padding does not count. The loop ends when every row is done,
or at a limit, from where `extend` goes on: so text can be looked at and shown on the way.

This module knows tokens only; text, batches and models are in inference.py.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from openmoe import partitioning
from openmoe.config import ConfigError, Dispatch, ModelConfig
from openmoe.inference.cpu_experts import run_experts
from openmoe.layers.moe.override import overriding
from openmoe.models import build_model
from openmoe.models.common import Cache, ModelOutput
from openmoe.models.decoding import init_decode_cache
from openmoe.types import Array, PyTree, RouterStats

OVERRIDE = 'override'  # among parameters: what is done to the routers' decisions


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a next token is drawn.

  Attributes:
    temperature: 0 takes the largest logit.
    top_k: draw among the k largest; 0 for all.
    top_p: draw among the fewest tokens whose probabilities reach p; 1.0 for all.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise ConfigError(f'{self}: temperature and top_k must be >= 0 and top_p in (0, 1].')

  @property
  def program(self) -> tuple[bool, int, bool]:
    """(draws, top_k, limits the mass): what is compiled; the other values are arguments."""
    draws = self.temperature > 0
    return draws, self.top_k if draws else 0, draws and self.top_p < 1


def bucket(length: int, most: int | None = None, least: int = 16) -> int:
  """The next of 16, 24, 32, 48, 64, 96, ...: few shapes, at most half of them padding."""
  size = least
  while size < length:
    size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
  return size if most is None else min(size, most)


def inference_config(config: ModelConfig, capacity: bool = False) -> ModelConfig:
  """The same model routed for inference; padding is never routed.

  Args:
    capacity: keep the trained dispatch with its evaluation capacity, by which tokens of all rows
      compete for slots. Otherwise nothing is dropped, and rows do not depend on each other.
  """
  if config.moe is None:
    return config
  if capacity:
    if config.moe.dispatch is Dispatch.DROPLESS:
      raise ConfigError(
        f'{config.name} has dispatch={config.moe.dispatch.value!r}, which knows no capacity: leave '
        "capacity off, or give it a dispatch of 'scatter' or 'mask'."
      )
    moe = dataclasses.replace(config.moe, ignore_padding=True)
  else:
    # Groups of one token: they only say who competes, and any number of rows divides into them.
    moe = dataclasses.replace(
      config.moe, dispatch=Dispatch.DROPLESS, ignore_padding=True, group_size=1
    )
  return dataclasses.replace(config, moe=moe)


def decoder(config: ModelConfig, tokens: int) -> nn.Module:
  """The model for calls of so many tokens: with the largest routing group that divides them.

  Only capacity makes groups matter. Devices have whole groups, as in training.

  Raises:
    ConfigError: the tokens do not divide over the devices.
  """
  if config.moe is not None and config.moe.dispatch is not Dispatch.DROPLESS:
    devices = partitioning.partitions('act_batch')
    most = min(config.moe.group_size, tokens)
    size = next((n for n in range(most, 0, -1) if tokens % (n * devices) == 0), None)
    if size is None:
      raise ConfigError(
        f'{tokens} tokens of a batch do not divide over {devices} devices, each of which routes '
        'whole groups with capacity; leave capacity off, or use fewer devices.'
      )
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, group_size=size))
  return build_model(config, run_experts=run_experts)


def run_decoder(params: PyTree, config: ModelConfig, tokens_bt: Array, *args) -> ModelOutput:
  """One call of the model's `decode`.

  Args:
    params: as decoding.unstack gives them; under OVERRIDE, what is done to the routers' decisions.
    args: positions, mask, cache and slot.
  """
  weights = {name: leaf for name, leaf in params.items() if name != OVERRIDE}
  with overriding(params.get(OVERRIDE)):
    model = decoder(config, tokens_bt.size)
    return model.apply({'params': weights}, tokens_bt, *args, method='decode')


def sample(
  logits_bv: Array, program: tuple[bool, int, bool], temperature: Array, top_p: Array, key_b: Array
) -> Array:
  """int32 [b] next tokens.

  Args:
    program: see Sampling.
    temperature, top_p: scalars.
    key_b: one key a row, so that a row's draws are its own.
  """
  draws, top_k, limits_mass = program
  if not draws:
    return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
  logits_bv = logits_bv / temperature
  if top_k:
    largest_bk, _ = jax.lax.top_k(logits_bv, min(top_k, logits_bv.shape[-1]))
    logits_bv = jnp.where(logits_bv < largest_bk[:, -1:], -jnp.inf, logits_bv)
  if limits_mass:
    descending_bv = jnp.sort(logits_bv, axis=-1)[:, ::-1]
    probs_bv = jax.nn.softmax(descending_bv, axis=-1)
    # A token stays while the mass before it is short of p, so the largest always stays.
    keep_bv = jnp.cumsum(probs_bv, axis=-1) - probs_bv < top_p
    least_b1 = jnp.min(jnp.where(keep_bv, descending_bv, jnp.inf), axis=-1, keepdims=True)
    logits_bv = jnp.where(logits_bv < least_b1, -jnp.inf, logits_bv)
  return jax.vmap(jax.random.categorical)(key_b, logits_bv).astype(jnp.int32)


@flax.struct.dataclass
class Drops:
  """Choices that found no slot, and all choices, as float32 counts of tokens."""

  dropped: Array
  routed: Array

  @staticmethod
  def none() -> Drops:
    return Drops(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))

  def add(self, config: ModelConfig, stats: RouterStats | None, tokens: Array) -> Drops:
    """Counts a call's statistics by its real tokens; where nothing is dropped, not at all."""
    if stats is None or config.moe.dispatch is Dispatch.DROPLESS:
      return self  # and so XLA leaves out all statistics, a twentieth of a small step on a CPU
    tokens = tokens.astype(jnp.float32)
    dropped = self.dropped + jnp.mean(stats.dropped_fraction) * tokens
    return Drops(dropped, self.routed + tokens)


@flax.struct.dataclass
class State:
  """Rows that are being continued.

  Attributes:
    cache: of all layers, `prompt_slots` slots for prompts and one for every new token.
    length_b: int32 tokens of each prompt.
    key_b: random keys of the rows.
    tokens_bW: int32 new tokens; 0 where there is none.
    log_probs_bW: float32 natural logarithms of their probabilities, temperature aside.
    done_b: rows that chose EOS, or that somebody marked.
    step: int32 scalar, new tokens so far.
    drops: what routing with capacity dropped so far.
    prompt_slots: slots of the longest prompt that fits.
  """

  cache: Cache
  length_b: Array
  key_b: Array
  tokens_bW: Array
  log_probs_bW: Array
  done_b: Array
  step: Array
  drops: Drops
  prompt_slots: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Prefilled:
  """Prompts after one pass.

  Attributes:
    cache: of all layers.
    hidden_bd: final hidden states of each prompt's last token.
    kernel_dv: of the output layer.
    drops: see State.
  """

  cache: Cache
  hidden_bd: Array
  kernel_dv: Array
  drops: Drops


def prefill(
  params: PyTree, config: ModelConfig, tokens_bt: Array, length_b: Array, extra_slots: int
) -> Prefilled:
  """Reads prompts [b, t], padded on the right, into a cache of t + extra_slots slots a row."""
  b, t = tokens_bt.shape
  real_bt = jnp.arange(t) < length_b[:, None]
  mask_bts = jnp.tril(jnp.ones((t, t), bool)) & real_bt[..., None]
  positions_bt = jnp.where(real_bt, jnp.arange(t), -1)
  cache = init_decode_cache(config, b, t + extra_slots)
  out = run_decoder(params, config, tokens_bt, positions_bt, mask_bts, cache, 0)
  last_b11 = jnp.maximum(length_b - 1, 0)[:, None, None]
  hidden_bd = jnp.take_along_axis(out.hidden_btd, last_b11, axis=1)[:, 0]
  drops = Drops.none().add(config, out.router_stats, jnp.sum(length_b))
  return Prefilled(out.cache, hidden_bd, out.output_kernel_dv, drops)


def output_logits(hidden: Array, kernel_dv: Array) -> Array:
  """float32 [..., v]."""
  return hidden.astype(jnp.float32) @ kernel_dv.astype(jnp.float32)


def _choose(
  state: State, logits_bv: Array, program: tuple, temperature: Array, top_p: Array, eos_ids: tuple
) -> State:
  """Writes down the next token of every row that is not done."""
  key_b = jax.vmap(jax.random.fold_in, (0, None))(state.key_b, state.step)
  token_b = sample(logits_bv, program, temperature, top_p, key_b)
  log_prob_b = jnp.take_along_axis(logits_bv, token_b[:, None], axis=1)[:, 0]
  log_prob_b -= jax.nn.logsumexp(logits_bv, axis=-1)
  put = lambda x_bW, new_b: jax.lax.dynamic_update_slice_in_dim(
    x_bW, jnp.where(state.done_b, 0, new_b)[:, None], state.step, axis=1
  )
  return state.replace(
    tokens_bW=put(state.tokens_bW, token_b),
    log_probs_bW=put(state.log_probs_bW, log_prob_b),
    done_b=state.done_b | jnp.isin(token_b, np.asarray(eos_ids, np.int32)),
    step=state.step + 1,
  )


def _loop(params, config, state: State, limit, program, temperature, top_p, eos_ids) -> State:
  """Steps until `limit` tokens are there or every row is done."""
  t, n = state.prompt_slots, state.tokens_bW.shape[1]
  slot_s = jnp.arange(t + n)

  def body(state: State) -> State:
    last = state.step - 1  # of the token that is fed
    token_b1 = jax.lax.dynamic_slice_in_dim(state.tokens_bW, last, 1, axis=1)
    position_b1 = jnp.where(state.done_b, -1, state.length_b + last)[:, None]
    new_s = (slot_s >= t) & (slot_s <= t + last)
    mask_b1s = ((slot_s < state.length_b[:, None]) | new_s)[:, None]
    where = (position_b1, mask_b1s, state.cache, t + last)
    out = run_decoder(params, config, token_b1, *where)
    state = state.replace(
      cache=out.cache, drops=state.drops.add(config, out.router_stats, jnp.sum(~state.done_b))
    )
    logits_bv = output_logits(out.hidden_btd[:, 0], out.output_kernel_dv)
    return _choose(state, logits_bv, program, temperature, top_p, eos_ids)

  more = lambda state: (state.step < limit) & ~jnp.all(state.done_b)
  return jax.lax.while_loop(more, body, state)


def _readable(state: State) -> State:
  """What the host looks at lies whole on every device."""
  whole = lambda x: partitioning.shard(x, (None,) * x.ndim)
  fields = ('tokens_bW', 'log_probs_bW', 'done_b', 'step', 'drops')
  return state.replace(**{f: jax.tree.map(whole, getattr(state, f)) for f in fields})


_STATIC = ('config', 'program', 'eos_ids')


@partial(jax.jit, static_argnames=(*_STATIC, 'samples', 'max_new'))
def start(
  params: PyTree,
  tokens_Pt: Array,
  length_P: Array,
  key_b: Array,
  done_b: Array,
  limit: Array,
  temperature: Array,
  top_p: Array,
  *,
  config: ModelConfig,
  samples: int,
  max_new: int,
  program: tuple[bool, int, bool],
  eos_ids: tuple[int, ...],
) -> State:
  """Reads p prompts once and continues each `samples` times, b = p * samples rows.

  Args:
    params: as decoding.unstack gives them.
    tokens_Pt, length_P: prompts, padded on the right, and their lengths.
    key_b, done_b: of the rows; those of a prompt are neighbours.
    limit: new tokens after which to return, at least 1.
    max_new: new tokens that there is room for.
    program, temperature, top_p: see Sampling.
    eos_ids: tokens that end a text.
  """
  read = prefill(params, config, tokens_Pt, length_P, max_new)
  repeat = lambda x: jnp.repeat(x, samples, axis=0) if samples > 1 else x
  b = key_b.shape[0]
  state = State(
    cache=jax.tree.map(repeat, read.cache),
    length_b=repeat(length_P),
    key_b=key_b,
    tokens_bW=jnp.zeros((b, max_new), jnp.int32),
    log_probs_bW=jnp.zeros((b, max_new), jnp.float32),
    done_b=done_b,
    step=jnp.zeros((), jnp.int32),
    drops=read.drops,
    prompt_slots=tokens_Pt.shape[1],
  )
  logits_bv = repeat(output_logits(read.hidden_bd, read.kernel_dv))
  state = _choose(state, logits_bv, program, temperature, top_p, eos_ids)
  return _readable(_loop(params, config, state, limit, program, temperature, top_p, eos_ids))


@partial(jax.jit, static_argnames=_STATIC, donate_argnames='state')
def extend(
  params: PyTree,
  state: State,
  limit: Array,
  temperature: Array,
  top_p: Array,
  *,
  config: ModelConfig,
  program: tuple[bool, int, bool],
  eos_ids: tuple[int, ...],
) -> State:
  """Goes on to `limit` new tokens; the state given is consumed."""
  return _readable(_loop(params, config, state, limit, program, temperature, top_p, eos_ids))
