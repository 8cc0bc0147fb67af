"""Logits and routing of a checkpoint of any form, by the model's own blocks, a layer at a time.

Read through a form's own names and layout, so that a wrong name or a missed transposition shows in
the result. The parameters of one layer are in memory, in float32; embedding and output layer are
read in pieces. Dropless, all tokens real: a check of conversions, not a fast model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from convert.core.forms import Form, fill
from convert.core.names import Row, name_table
from openmoe.config import Architecture, Dispatch, ModelConfig, MoEConfig
from openmoe.layers.dense import RMSNorm
from openmoe.layers.moe.override import weights_of
from openmoe.layers.moe.router import Router, route
from openmoe.models.common import BlockContext
from openmoe.models.jetmoe import JetMoEBlock
from openmoe.models.openmoe import Block
from openmoe.types import Array, PyTree, Routing

TOKENS = (2, 12)
_ALIGNMENT = 64  # bytes


@dataclasses.dataclass(frozen=True)
class Forward:
  """What a checkpoint computes on some tokens.

  Attributes:
    logits: float32 [b, t, v].
    experts: int [router, b * t, k] chosen experts, best first; empty for a dense model.
  """

  logits: np.ndarray
  experts: np.ndarray


def seeded_tokens(vocab_size: int, seed: int = 0) -> np.ndarray:
  """int64 [b, t]: 0 begins a row, as in training; no other padding."""
  tokens = np.random.default_rng(seed).integers(2, vocab_size, TOKENS)
  tokens[:, 0] = 0
  return tokens


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
  """float32 of a shape, at an address that XLA takes as it is; it copies what lies at others."""
  nbytes = 4 * math.prod(shape)
  memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
  first = -memory.ctypes.data % _ALIGNMENT
  return memory[first : first + nbytes].view(np.float32).reshape(shape)


class _Parameters:
  """The parameters of a form by layer, float32 in the common layout."""

  def __init__(self, form: Form, config: ModelConfig):
    self._form = form
    self._rows: dict[int | None, dict[str, Row]] = {}
    for row in name_table(config):
      self._rows.setdefault(row.layer, {})[row.place] = row

  def layer(self, layer: int | None) -> PyTree:
    """The tree of a block's parameters."""
    read = lambda row: jax.device_put(row.from_t5x(self._read(row)), may_alias=True)
    return flax.traverse_util.unflatten_dict(
      {place: read(row) for place, row in self._rows[layer].items()}, sep='/'
    )

  def scale(self) -> np.ndarray:
    """[d] of the norm after the last block."""
    return self._read(self._rows[None]['decoder_norm/scale'])

  def _read(self, row: Row) -> np.ndarray:
    stored = self._form.parameter(row)
    *lead, a, b = stored.shape if len(stored.shape) > 1 else (1, *stored.shape)
    shape = (*lead, b, a) if self._form.transposed(row) else stored.shape
    # Filled in pieces: one memory layout whatever the form, so that equal weights give equal sums.
    return fill(_aligned(shape), self._form, row)

  def embedding(self, tokens: np.ndarray) -> np.ndarray:
    """[b, t, d]; only the rows in use are kept."""
    stored = self._form.parameter(self._rows[None]['token_embedder/embedding'])
    out = np.zeros((*tokens.shape, stored.shape[1]), np.float32)
    for start, x in stored.pieces():
      here = (tokens >= start) & (tokens < start + len(x))
      out[here] = x[tokens[here] - start].astype(np.float32)
    return out

  def logits(self, x: np.ndarray) -> np.ndarray:
    """x @ kernel, over the pieces of a kernel that may be the largest tensor of all.

    Without a kernel of its own the output layer is the embedding. Pieces differ between forms; in
    float64 the order of sums does not show.
    """
    outside = self._rows[None]
    row = outside.get('logits_dense/kernel')
    tied = row is None
    row = outside['token_embedder/embedding'] if tied else row
    stored, x = self._form.parameter(row), x.astype(np.float64)
    if tied or self._form.transposed(row):
      blocks = [x @ w.astype(np.float64).T for _, w in stored.pieces()]
      return np.concatenate(blocks, axis=-1).astype(np.float32)
    total = np.zeros((*x.shape[:-1], stored.shape[-1]))
    for start, w in stored.pieces():
      total += x[..., start : start + len(w)] @ w.astype(np.float64)
    return total.astype(np.float32)


def _along(routing: Routing, logits_gte: Array, index_gtk: Array, config: MoEConfig) -> Routing:
  """A router's decision with other experts in place of its own choice."""
  weights_gtk = weights_of(logits_gte, index_gtk, config.router_order)
  return route(logits_gte, None, config, routing.capacity, (weights_gtk, index_gtk))


def _block(config: ModelConfig, sparse: bool) -> Callable[[PyTree, Array, BlockContext], Array]:
  match config.architecture:
    case Architecture.OPENMOE:
      block, wide = Block(config, sparse=sparse, train=False), jnp.zeros((), bool)
      return lambda params, r, context: block.apply({'params': params}, r, None, wide, context)[0]
    case Architecture.JETMOE:
      block = JetMoEBlock(config, train=False)
      return lambda params, r, context: block.apply({'params': params}, r, None, context)[0]


@functools.lru_cache(8)
def _compiled(config: ModelConfig, sparse: bool) -> Callable:
  """(block's parameters, stream [b, t, d], experts [r, n, k] to follow or None) ->

  (stream, the block's own choices [r, n, k]); r routers, n = b * t.
  """
  run = _block(config, sparse)

  def layer(params: PyTree, r_btd: Array, follow: Array | None) -> tuple[Array, list[Array]]:
    chosen: list[Array] = []

    def watch(call, args, kwargs, method):
      routing = call(*args, **kwargs)
      if not isinstance(method.module, Router):
        return routing
      index_gtk = routing.expert_index_gtk
      if follow is not None:
        kernel_de = method.module.variables['params']['kernel']
        logits_gte = jnp.einsum('gtd,de->gte', args[0], kernel_de)
        other_gtk = follow[len(chosen)].reshape(index_gtk.shape)
        routing = _along(routing, logits_gte, other_gtk, config.moe)
      chosen.append(index_gtk.reshape(-1, index_gtk.shape[-1]))
      return routing

    b, t = r_btd.shape[:2]
    context = BlockContext(
      mask_bts=jnp.broadcast_to(jnp.tri(t, dtype=bool), (b, t, t)),
      token_mask_bt1=jnp.ones((b, t, 1), jnp.float32),
      positions_bt=jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t)),
    )
    with nn.intercept_methods(watch):
      return run(params, r_btd, context), chosen

  return jax.jit(layer)


def forward(
  form: Form, config: ModelConfig, tokens: np.ndarray, follow: np.ndarray | None = None
) -> Forward:
  """Logits and routing of [b, t] tokens.

  Args:
    follow: Forward.experts of another checkpoint, to send tokens where it sent them; what comes
      back is still this one's own choice. Rounded weights then give nearly the same logits, where
      one token that changes its expert could change them by anything.
  """
  plain = {'dtype': 'float32', 'dropout_rate': 0.0}
  if config.moe is not None:
    moe = {'dispatch': Dispatch.DROPLESS, 'group_size': tokens.size}
    plain['moe'] = dataclasses.replace(config.moe, **moe)
  config = dataclasses.replace(config, **plain)
  parameters, experts = _Parameters(form, config), []
  routers = 2 if config.architecture is Architecture.JETMOE else 1  # of a sparse layer
  with jax.default_matmul_precision('highest'):
    r_btd = parameters.embedding(tokens)
    for layer in range(config.num_layers):
      sparse = config.architecture is Architecture.JETMOE or layer in config.sparse_layers
      others = None
      if follow is not None and sparse:
        others = jnp.asarray(follow[len(experts) : len(experts) + routers])
      r_btd, chosen = _compiled(config, sparse)(parameters.layer(layer), r_btd, others)
      # Done before the next layer is read: no two are in memory.
      experts += [np.asarray(index) for index in jax.block_until_ready(chosen)]
      r_btd = np.asarray(r_btd)
    norm = RMSNorm(jnp.float32, config.last_norm_epsilon)
    hidden = norm.apply({'params': {'scale': parameters.scale()}}, r_btd)
  return Forward(parameters.logits(np.asarray(hidden)), np.array(experts))


def agreement(a: Forward, b: Forward) -> dict[str, float]:
  """How two results compare.

  Returns:
    max_logit_difference; largest_logit of `a`; same_top_token, the share of positions with the same
    best token; same_first_expert, the share of (layer, token) with the same first choice.
  """
  same = a.experts[..., 0] == b.experts[..., 0] if a.experts.size else np.ones(1)
  return {
    'max_logit_difference': float(np.max(np.abs(a.logits - b.logits))),
    'largest_logit': float(np.max(np.abs(a.logits))),
    'same_top_token': float(np.mean(a.logits.argmax(-1) == b.logits.argmax(-1))),
    'same_first_expert': float(np.mean(same)),
  }
