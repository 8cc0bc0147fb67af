"""Generation: prefill, then cached steps, in one jitted function with static shapes.

Inference routes dropless, so what a prompt gives does not depend on its neighbours in the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from openmoe.config import ConfigError, Dispatch, ModelConfig
from openmoe.models import build_model, init_decode_cache
from openmoe.types import Array, PyTree


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
    if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise ConfigError(f'{self}: temperature and top_k must be >= 0 and top_p in (0, 1].')


def inference_config(config: ModelConfig) -> ModelConfig:
  """The same model routed for inference: nothing dropped, padding not routed, one group."""
  if config.moe is None:
    return config
  moe = dataclasses.replace(
    config.moe, dispatch=Dispatch.DROPLESS, ignore_padding=True, group_size=2**31 - 1
  )
  return dataclasses.replace(config, moe=moe)


def sample(logits_bv: Array, sampling: Sampling, key: Array) -> Array:
  """int32 [b] next tokens."""
  if sampling.temperature == 0:
    return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
  logits_bv = logits_bv / sampling.temperature
  descending_bv = jnp.sort(logits_bv, axis=-1)[:, ::-1]
  if sampling.top_k:
    least_b1 = descending_bv[:, min(sampling.top_k, logits_bv.shape[-1]) - 1, None]
    logits_bv = jnp.where(logits_bv < least_b1, -jnp.inf, logits_bv)
  if sampling.top_p < 1:
    probs_bv = jax.nn.softmax(descending_bv, axis=-1)
    # A token stays while the mass before it is short of p, so the largest always stays.
    keep_bv = jnp.cumsum(probs_bv, axis=-1) - probs_bv < sampling.top_p
    least_b1 = jnp.min(jnp.where(keep_bv, descending_bv, jnp.inf), axis=-1, keepdims=True)
    logits_bv = jnp.where(logits_bv < least_b1, -jnp.inf, logits_bv)
  return jax.random.categorical(key, logits_bv, axis=-1).astype(jnp.int32)


@partial(jax.jit, static_argnames=('config', 'max_new_tokens', 'sampling', 'eos_id'))
def _generate(
  params: PyTree,
  tokens_bt: Array,
  length_b: Array,
  key: Array,
  *,
  config: ModelConfig,
  max_new_tokens: int,
  sampling: Sampling,
  eos_id: int,
) -> Array:
  """int32 [b, max_new_tokens]; 0 after EOS."""
  model = build_model(config)
  b, t = tokens_bt.shape
  slots = t + max_new_tokens
  decode = partial(model.apply, {'params': params}, method='decode')

  place_bt = jnp.broadcast_to(jnp.arange(t), (b, t))
  real_bt = place_bt < length_b[:, None]
  # Shorter prompts leave junk in later slots; no query looks past its own position, and their
  # own new tokens overwrite it.
  mask_bts = (jnp.arange(slots) <= place_bt[..., None]) & real_bt[..., None]
  positions_bt = jnp.where(real_bt, place_bt, -1)
  cache = init_decode_cache(config, b, slots)
  out = decode(tokens_bt, positions_bt, mask_bts, cache, jnp.zeros(b, jnp.int32))
  last_bd = jnp.take_along_axis(out.hidden_btd, (length_b - 1)[:, None, None], axis=1)
  logits_bv = out.replace(hidden_btd=last_bd).logits()[:, 0]

  def body(i, carry):
    cache, logits_bv, done_b, new_bn = carry
    token_b = sample(logits_bv, sampling, jax.random.fold_in(key, i))
    token_b = jnp.where(done_b, 0, token_b)
    new_bn = new_bn.at[:, i].set(token_b)
    done_b = done_b | (token_b == eos_id)
    position_b = length_b + i
    mask_b1s = (jnp.arange(slots) <= position_b[:, None])[:, None]
    position_b1 = jnp.where(done_b, -1, position_b)[:, None]
    out = decode(token_b[:, None], position_b1, mask_b1s, cache, position_b)
    return out.cache, out.logits()[:, 0], done_b, new_bn

  new_bn = jnp.zeros((b, max_new_tokens), jnp.int32)
  carry = (out.cache, logits_bv, jnp.zeros(b, bool), new_bn)
  return jax.lax.fori_loop(0, max_new_tokens, body, carry)[-1]


def generate(
  params: PyTree,
  config: ModelConfig,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  *,
  eos_id: int,
  sampling: Sampling = Sampling(),
  seed: int = 0,
) -> list[list[int]]:
  """Continues every prompt; a result ends before EOS.

  Args:
    prompts: token ids without the leading id 0 that starts every sequence; it is added here.
    max_new_tokens: at most so many.

  Raises:
    ConfigError: there is nothing to do.
  """
  if not prompts or max_new_tokens < 1:
    raise ConfigError(f'{len(prompts)} prompts and max_new_tokens={max_new_tokens}: need both.')
  rows = [[0, *prompt] for prompt in prompts]
  length = max(map(len, rows))
  tokens = np.zeros((len(rows), length), np.int32)
  for row, out in zip(rows, tokens, strict=True):
    out[: len(row)] = row
  new = _generate(
    params,
    jnp.asarray(tokens),
    jnp.asarray([len(row) for row in rows], jnp.int32),
    jax.random.key(seed),
    config=inference_config(config),
    max_new_tokens=max_new_tokens,
    sampling=sampling,
    eos_id=eos_id,
  )
  return [row[: row.index(eos_id)] if eos_id in row else row for row in np.asarray(new).tolist()]
