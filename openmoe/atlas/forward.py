"""Rows of tokens through a model, and everything that its routers decided about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from openmoe import partitioning
from openmoe.atlas.attention import looking
from openmoe.atlas.record import ATTENTION, MLP, RouterId
from openmoe.config import Architecture, ConfigError, Dispatch, ModelConfig
from openmoe.inference.cpu_experts import run_experts
from openmoe.inference.decode import OVERRIDE, output_logits
from openmoe.inference.model import LanguageModel
from openmoe.layers.moe.override import Override, Seen, watching
from openmoe.layers.moe.router import expert_capacity
from openmoe.models import build_model
from openmoe.models.decoding import init_decode_cache
from openmoe.types import Array, PyTree

LOGITS = 1 << 26  # numbers of a block of logits
SHORTEST = 128  # rows of a call are padded to this, or twice, four times... as much


@dataclasses.dataclass(frozen=True)
class Calls:
  """How rows are put into calls of the model.

  Attributes:
    capacity: route with slots, as released, tokens of a group competing; else drop nothing.
    length: longest row, the token that begins it included.
    rows: of a call. Without capacity a call has one row a device, so that a row is computed alone.
    group_size: tokens that compete; None takes the model's.
    capacity_factor: None takes the model's, of evaluation.
    ignore_padding: None takes the model's.
  """

  capacity: bool = False
  length: int = 1024
  rows: int = 8
  group_size: int | None = None
  capacity_factor: float | None = None
  ignore_padding: bool | None = None

  def __post_init__(self):
    for name in ('length', 'rows', 'group_size'):
      value, least = getattr(self, name), 2 if name == 'length' else 1
      if value is not None and value < least:
        raise ConfigError(f'{name}={value} must be at least {least}.')
    if self.capacity_factor is not None and not 0 < self.capacity_factor < 1e6:
      raise ConfigError(f'capacity_factor={self.capacity_factor} must be a positive number.')
    given = [n for n in ('group_size', 'capacity_factor') if getattr(self, n) is not None]
    if given and not self.capacity:
      raise ConfigError(f'{given[0]} is of routing with capacity; give --capacity=released too.')


@flax.struct.dataclass
class Observed:
  """What a call of b rows of t tokens showed; R routers in the order of the model.

  Attributes:
    predicted_bt: int32 ids of the largest logits.
    next_log_prob_bt: float32, of the token that follows; 0 at the end of a row.
    expert_RNk, weight_RNk, slot_RNk: as decided, N = b * t tokens in order.
    lse_RN, entropy_RN, margin_RN: float32, of the router's logits and probabilities.
    probs_RNe: float16, or None.
    attention_AbtkB: see openmoe.atlas.attention, or None.
  """

  predicted_bt: Array
  next_log_prob_bt: Array
  expert_RNk: Array
  weight_RNk: Array
  slot_RNk: Array
  lse_RN: Array
  entropy_RN: Array
  margin_RN: Array
  probs_RNe: Array | None
  attention_AbtkB: Array | None


def routers_of(config: ModelConfig) -> tuple[RouterId, ...]:
  """The routers of a model in the order of their calls."""
  kinds = (ATTENTION, MLP) if config.architecture is Architecture.JETMOE else (MLP,)
  return tuple(RouterId(layer, kind) for layer in config.sparse_layers for kind in kinds)


def call_config(model: LanguageModel, calls: Calls) -> ModelConfig:
  """The model's configuration as its routers are to be observed.

  Raises:
    ConfigError: it has no routers, or no capacity.
  """
  trained = model.trained_config
  if trained.moe is None:
    raise ConfigError(f'{model.name} has no sparse layers; there is nothing to record.')
  if not calls.capacity:
    return model.config
  if trained.moe.dispatch is Dispatch.DROPLESS:
    raise ConfigError(
      f'{model.name} has no capacity (dispatch={trained.moe.dispatch.value!r}): '
      'leave --capacity=released out.'
    )
  given = {
    'group_size': calls.group_size,
    'eval_capacity_factor': calls.capacity_factor,
    'ignore_padding': calls.ignore_padding,
  }
  given = {name: value for name, value in given.items() if value is not None}
  moe = dataclasses.replace(trained.moe, **given)
  tokens = calls.rows * calls.length
  if tokens > moe.group_size and tokens % moe.group_size:
    raise ConfigError(
      f'{calls.rows} rows of {calls.length} are {tokens} tokens, which do not divide into groups '
      f'of group_size={moe.group_size}; give another --rows, --length or --group_size.'
    )
  return dataclasses.replace(trained, moe=moe)


def slots_of(config: ModelConfig, calls: Calls) -> tuple[int | None, int | None]:
  """(group size, capacity) of a call; None where nothing is dropped."""
  moe = config.moe
  if moe.dispatch is Dispatch.DROPLESS:
    return None, None
  size = min(moe.group_size, calls.rows * calls.length)
  capacity = expert_capacity(
    size,
    moe.num_experts,
    moe.eval_capacity_factor,
    top_k=moe.top_k,
    convention=moe.capacity_convention,
    min_capacity=moe.min_expert_capacity,
  )
  return size, capacity


def _judged(hidden_Nd: Array, kernel_dv: Array, next_N: Array) -> tuple[Array, Array]:
  """(largest, log-probability of the next token) at every position, in blocks of positions."""
  n, vocab = next_N.shape[0], kernel_dv.shape[1]
  block = max(1, min(n, LOGITS // vocab))
  blocks = -(-n // block)
  pad = lambda x: jnp.pad(x, [(0, blocks * block - n)] + [(0, 0)] * (x.ndim - 1))

  def one(piece):
    hidden_Nd, next_N = piece
    logits_Nv = output_logits(hidden_Nd, kernel_dv)
    chosen_N = jnp.take_along_axis(logits_Nv, jnp.maximum(next_N, 0)[:, None], axis=1)[:, 0]
    log_prob_N = chosen_N - jax.nn.logsumexp(logits_Nv, axis=-1)
    best_N = jnp.argmax(logits_Nv, axis=-1).astype(jnp.int32)
    return best_N, jnp.where(next_N < 0, 0.0, log_prob_N)

  pieces = (pad(hidden_Nd).reshape(blocks, block, -1), pad(next_N).reshape(blocks, block))
  best, log_prob = jax.lax.map(one, pieces)
  return best.reshape(-1)[:n], log_prob.reshape(-1)[:n]


def _of_router(seen: Seen, with_probs: bool) -> dict[str, Array | None]:
  routing, k = seen.routing, seen.routing.expert_index_gtk.shape[-1]
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  logits_Ne = flat(seen.logits_gte)
  log_probs_Ne = jax.nn.log_softmax(logits_Ne)
  probs_Ne = jnp.exp(log_probs_Ne)
  ordered_Ne = -jnp.sort(-logits_Ne, axis=-1)
  all_chosen = k == logits_Ne.shape[-1]
  margin_N = ordered_Ne[:, k - 1] - ordered_Ne[:, k - 1 if all_chosen else k]
  return {
    'expert_RNk': flat(routing.expert_index_gtk),
    'weight_RNk': flat(routing.combine_weights_gtk),
    'slot_RNk': flat(routing.slot_gtk),
    'lse_RN': jax.nn.logsumexp(logits_Ne, axis=-1),
    'entropy_RN': -jnp.sum(jnp.where(probs_Ne > 0, probs_Ne * log_probs_Ne, 0.0), axis=-1),
    'margin_RN': margin_N,
    'probs_RNe': probs_Ne.astype(jnp.float16) if with_probs else None,
  }


@partial(jax.jit, static_argnames=('config', 'with_probs', 'with_attention'))
def observe(
  params: PyTree,
  tokens_bt: Array,
  length_b: Array,
  override: Override | None = None,
  *,
  config: ModelConfig,
  with_probs: bool = False,
  with_attention: bool = False,
) -> Observed:
  """One pass over rows [b, t], padded on the right.

  Args:
    params: as decoding.unstack gives them.
    override: what is done to the decisions.
    config: of call_config().
  """
  b, t = tokens_bt.shape
  place_t = jnp.arange(t)
  real_bt = place_t < length_b[:, None]
  mask_bts = jnp.tril(jnp.ones((t, t), bool)) & real_bt[..., None]
  positions_bt = jnp.where(real_bt, place_t, -1)
  model = build_model(config, run_experts=run_experts)
  args = (tokens_bt, positions_bt, mask_bts, init_decode_cache(config, b, t), 0)
  # The context that is entered last sees a call first: looking() must see changed decisions.
  with looking(tokens_bt, enabled=with_attention) as looked, watching(override) as seen:
    out = model.apply({'params': params}, *args, method='decode')
  next_bt = jnp.pad(tokens_bt[:, 1:], ((0, 0), (0, 1)))
  next_bt = jnp.where(place_t + 1 < length_b[:, None], next_bt, -1)
  hidden_Nd = out.hidden_btd.reshape(b * t, -1)
  best_N, log_prob_N = _judged(hidden_Nd, out.output_kernel_dv, next_bt.reshape(-1))
  routers = [_of_router(one, with_probs) for one in seen]
  stack = lambda name: None if routers[0][name] is None else jnp.stack([r[name] for r in routers])
  found = Observed(
    predicted_bt=best_N.reshape(b, t),
    next_log_prob_bt=log_prob_N.reshape(b, t),
    attention_AbtkB=jnp.stack(looked) if looked else None,
    **{name: stack(name) for name in routers[0]},
  )
  return jax.tree.map(lambda x: partitioning.shard(x, (None,) * x.ndim), found)


def row_length(tokens: int, length: int) -> int:
  """What a row of so many tokens is padded to: a function of itself alone."""
  size = min(SHORTEST, length)
  while size < tokens:
    size = min(2 * size, length)
  return size


class Forward:
  """A model, ready to be observed row by row.

  Args:
    model: whose `params` may carry an override.
    calls: how rows are put together.
    with_probs, with_attention: what else is wanted.
  """

  def __init__(
    self,
    model: LanguageModel,
    calls: Calls,
    *,
    with_probs: bool = False,
    with_attention: bool = False,
  ):
    self._model, self._calls = model, calls
    self.config = call_config(model, calls)
    self._params = {n: leaf for n, leaf in model.params.items() if n != OVERRIDE}
    routers, moe = len(routers_of(self.config)), self.config.moe
    self._override = model.params.get(OVERRIDE) or Override.none(routers, moe.num_experts)
    self._nothing = (routers, 1, 1, moe.top_k)
    with_attention &= model.config.architecture is Architecture.JETMOE
    self._options = {'with_probs': with_probs, 'with_attention': with_attention}
    self.rows = calls.rows
    if not calls.capacity:
      mesh = model.mesh
      self.rows = 1 if mesh is None else mesh.shape[partitioning.DATA] * mesh.shape[
        partitioning.EXPERT]  # fmt: skip

  def __call__(
    self, rows: Sequence[Sequence[int]], replay: tuple[np.ndarray, np.ndarray | None] | None = None
  ) -> Observed:
    """What at most self.rows rows show; arrays of the host.

    Args:
      rows: token ids, the one that begins a row included.
      replay: (experts, combine weights or None) [R, b, t, k] to follow; -1 where the router
        decides.
    """
    length = self._calls.length
    if not self._calls.capacity:
      length = max(row_length(len(row), length) for row in rows)
    tokens = np.zeros((self.rows, length), np.int32)
    lengths = np.zeros(self.rows, np.int32)
    for i, row in enumerate(rows):
      tokens[i, : len(row)], lengths[i] = row, len(row)
    # Also where nothing is replayed: one compiled programme, so a replay is equal bit for bit.
    experts, weights = replay or (np.full(self._nothing, -1), np.zeros(self._nothing, np.float32))
    override = self._override.replace(
      replay_RNk=_flat(experts, self.rows, length, -1).astype(np.int32),
      weights_RNk=None if weights is None else _flat(weights, self.rows, length, 0),
    )
    with self._model.on_mesh():
      found = observe(self._params, tokens, lengths, override, config=self.config, **self._options)
      return jax.device_get(found)


def _flat(x_Rbtk: np.ndarray, rows: int, length: int, fill: int) -> np.ndarray:
  """[R, b, t, k] of some rows -> [R, N, k] of a call."""
  r, b, t, k = x_Rbtk.shape
  out = np.full((r, rows, length, k), fill, x_Rbtk.dtype)
  out[:, :b, :t] = x_Rbtk
  return out.reshape(r, rows * length, k)
