"""Watching and changing what routers decide, without a line in the layers.

While a context of this module is entered, calls of `Router` inside a trace pass through it: what
was decided is noted, and may be replaced. It is for programs in which every router is called by
itself, as the models' `decode` is; a scan would hide the values of its layers.

An Override is arrays. It travels beside the parameters, so the programme is compiled once whatever
is banned, and no cache of compiled programmes can confuse two of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from openmoe.config import MoEConfig, RouterOrder
from openmoe.layers.moe.router import Router, route, top_k
from openmoe.types import Array, Routing


@flax.struct.dataclass
class Override:
  """What is done to the decisions of R routers, in their order in the model.

  Bans come first, then forced experts, then the permutation; a replay leaves nothing to decide.

  Attributes:
    banned_Re: bool; such an expert is never chosen, and its logit counts as -inf, so that the
      others share its probability.
    forced_Re: bool; such an expert is chosen before all others, with its own probability.
    target_Re: int32; what was meant for expert e goes to expert target_Re[r, e].
    replay_RNk: int32 [R, N, k] experts of the tokens of a call, in order; -1 where the router
      decides itself. None replays nothing.
    weights_RNk: float32 combine weights that go with it; None takes the model's own.
  """

  banned_Re: Array
  forced_Re: Array
  target_Re: Array
  replay_RNk: Array | None = None
  weights_RNk: Array | None = None

  @classmethod
  def none(cls, routers: int, num_experts: int) -> Override:
    """Changes nothing."""
    no_Re = jnp.zeros((routers, num_experts), bool)
    target_e = jnp.arange(num_experts, dtype=jnp.int32)
    return cls(no_Re, no_Re, jnp.tile(target_e, (routers, 1)))

  def fingerprint(self, model: str) -> str:
    """sha256 of a model's fingerprint and of what is done to it."""
    digest = hashlib.sha256(model.encode())
    for leaf in jax.tree.leaves(self):
      digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Seen:
  """One decision.

  Attributes:
    logits_gte: float32 router logits, before any change.
    routing: what the layer goes by.
  """

  logits_gte: Array
  routing: Routing


def weights_of(logits_gte: Array, index_gtk: Array, order: RouterOrder) -> Array:
  """Combine weights [g, t, k] of given experts."""
  taken = lambda x_gte: jnp.take_along_axis(x_gte, index_gtk, axis=-1)
  if order is RouterOrder.SOFTMAX_TOP_K:
    return taken(jax.nn.softmax(logits_gte, axis=-1))
  return jax.nn.softmax(taken(logits_gte), axis=-1)


def changed(
  logits_gte: Array,
  valid_gt: Array | None,
  config: MoEConfig,
  routing: Routing,
  to: Override,
  bias_e: Array | None = None,
) -> Routing:
  """The decision of one router, changed.

  Args:
    to: its fields without the leading R.
    bias_e: of a router that is balanced by one (balance.loss_free).
  """
  allowed_gte = jnp.where(to.banned_Re, -jnp.inf, logits_gte)
  scores_gte = allowed_gte
  if bias_e is not None:
    scores_gte = jnp.where(to.banned_Re, -jnp.inf, jax.nn.softmax(allowed_gte, axis=-1) + bias_e)
  scores_gte = jnp.where(to.forced_Re, jnp.finfo(jnp.float32).max, scores_gte)
  _, index_gtk = top_k(scores_gte, config.top_k)
  if to.replay_RNk is not None:
    replay_gtk = to.replay_RNk.reshape(index_gtk.shape)
    index_gtk = jnp.where(replay_gtk >= 0, replay_gtk, index_gtk)
  weights_gtk = weights_of(allowed_gte, index_gtk, config.router_order)
  if to.weights_RNk is not None:
    weights_gtk = jnp.where(replay_gtk >= 0, to.weights_RNk.reshape(index_gtk.shape), weights_gtk)
  if valid_gt is not None:
    weights_gtk = weights_gtk * valid_gt[..., None]
  index_gtk = to.target_Re[index_gtk]
  chosen = (weights_gtk, index_gtk, *(() if bias_e is None else (bias_e,)))
  return route(logits_gte, valid_gt, config, routing.capacity, chosen)


@contextlib.contextmanager
def watching(override: Override | None = None) -> Iterator[list[Seen]]:
  """Notes the decisions of routers in the order of their calls, changed if an override is given."""
  seen: list[Seen] = []

  def watch(call, args, kwargs, context):
    routing = call(*args, **kwargs)
    if not isinstance(context.module, Router) or context.method_name != '__call__':
      return routing
    x_gtd, valid_gt, _ = args
    config, params = context.module.config, context.module.variables['params']
    logits_gte = jnp.einsum(
      'gtd,de->gte',
      x_gtd.astype(jnp.float32),
      params['kernel'].astype(jnp.float32),
      precision=jax.lax.Precision.HIGHEST,
    )
    if override is not None:
      mine = jax.tree.map(lambda x: x[len(seen)], override)
      valid_gt = valid_gt if config.ignore_padding else None
      routing = changed(logits_gte, valid_gt, config, routing, mine, params.get('bias'))
    seen.append(Seen(logits_gte, routing))
    return routing

  with nn.intercept_methods(watch):
    yield seen


def overriding(override: Override | None) -> contextlib.AbstractContextManager:
  """watching() where there is something to change, else nothing at all."""
  return contextlib.nullcontext() if override is None else watching(override)
