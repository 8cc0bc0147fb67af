"""The router decides: which experts, with what weight, in which slot. It moves nothing."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from openmoe.config import CapacityConvention, Dispatch, MoEConfig, RouterLoss, RouterOrder
from openmoe.layers.moe.balance import balance_loss, biased_choice
from openmoe.types import Array, RouterStats, Routing


def expert_capacity(
  tokens_per_group: int,
  num_experts: int,
  capacity_factor: float,
  *,
  top_k: int = 2,
  convention: CapacityConvention = CapacityConvention.RELEASED,
  min_capacity: int = 4,
) -> int:
  """Slots each expert reserves for one routing group.

  As in the released OpenMoE the factor does not include top_k: at 1.25 with top-2 even a
  perfectly balanced group loses 37.5 % of its assignments. WITH_TOP_K counts it. Rounding is
  Python's, half to even (flaxformer moe_layers.py). COLOSSALAI is the published PyTorch port's
  (colossalai routers.py `get_capacity`), which also makes one group of all tokens of a call: give
  it a group_size no smaller. See docs/PARITY.md.

  >>> expert_capacity(4096, num_experts=32, capacity_factor=1.25)
  160
  >>> expert_capacity(60, 4, capacity_factor=1.25, convention=CapacityConvention.COLOSSALAI)
  38
  """
  match convention:
    case CapacityConvention.RELEASED:
      slots = round(capacity_factor * tokens_per_group / num_experts)
    case CapacityConvention.WITH_TOP_K:
      slots = round(capacity_factor * top_k * tokens_per_group / num_experts)
    case CapacityConvention.COLOSSALAI:
      slots = math.floor(top_k * capacity_factor * tokens_per_group / num_experts)
      slots += slots % 2
  return max(slots, min_capacity)


def top_k(x_gte: Array, k: int) -> tuple[Array, Array]:
  """The k largest values and their int32 indices, [g, t, k]; ties go to the lower index.

  k passes of argmax and not `lax.top_k`: that is a custom call, which XLA gathers the tokens of
  all devices for, and whose gradient is a scatter (docs/LOG.md).
  """
  left_gte, values, indices = x_gte, [], []
  for _ in range(k):
    index_gt = jnp.argmax(left_gte, axis=-1)
    chosen_gte = jax.nn.one_hot(index_gt, x_gte.shape[-1], dtype=jnp.bool_)
    values.append(jnp.sum(jnp.where(chosen_gte, x_gte, 0), axis=-1))
    indices.append(index_gt.astype(jnp.int32))
    left_gte = jnp.where(chosen_gte, -jnp.inf, left_gte)
  return jnp.stack(values, axis=-1), jnp.stack(indices, axis=-1)


def assign_slots(expert_index_gtk: Array, valid_gt: Array | None, num_experts: int) -> Array:
  """Place of each choice in its expert's buffer, int32 [g, t, k]; -1 where the token is padding.

  First choices of the whole group claim slots before any second choice, so the choice axis must
  lead the cumulative sum.
  """
  g, t, k = expert_index_gtk.shape
  index_gR = expert_index_gtk.swapaxes(1, 2).reshape(g, k * t)
  chosen_gRe = jax.nn.one_hot(index_gR, num_experts, dtype=jnp.int32)
  if valid_gt is not None:
    chosen_gRe *= jnp.tile(valid_gt, (1, k))[..., None].astype(jnp.int32)
  place_gRe = jnp.cumsum(chosen_gRe, axis=1) * chosen_gRe
  return (place_gRe.sum(axis=-1) - 1).reshape(g, k, t).swapaxes(1, 2)


def load_balance_loss(router_probs_gte: Array, chosen_gte: Array, valid_gt: Array | None) -> Array:
  """E * sum_e f_e P_e, averaged over groups (ST-MoE; routing.py `_load_balancing_loss`).

  f_e is the share of tokens that chose e among their top k (not differentiable), P_e the mean
  probability of e. Range [top_k * something above 1/E, E]; top_k at perfect balance, so 2.0 for
  top-2: the k choices count k times. JetMoE's f is a share of the choices (RouterLoss.SUM): that
  divides by top_k, and balance is 1.0 (its gate.py).
  """
  num_experts = router_probs_gte.shape[-1]
  f_ge = _mean_over_tokens(chosen_gte, valid_gt)
  p_ge = _mean_over_tokens(router_probs_gte, valid_gt)
  return num_experts * jnp.mean(jnp.sum(f_ge * p_ge, axis=-1))


def router_z_loss(router_logits_gte: Array, valid_gt: Array | None) -> Array:
  """Mean of logsumexp(router_logits)^2; log(E)^2 for all-zero logits. Range [0, inf)."""
  z_gt1 = jax.nn.logsumexp(router_logits_gte, axis=-1, keepdims=True)
  return jnp.mean(_mean_over_tokens(jnp.square(z_gt1), valid_gt))


def _mean_over_tokens(x_gte: Array, valid_gt: Array | None) -> Array:
  """[g, t, e] -> [g, e], over valid tokens only where a mask is given."""
  if valid_gt is None:
    return jnp.mean(x_gte, axis=1)
  weight_gt1 = valid_gt[..., None].astype(x_gte.dtype)
  return jnp.sum(x_gte * weight_gt1, axis=1) / jnp.maximum(jnp.sum(weight_gt1, axis=1), 1)


def route(
  router_logits_gte: Array,
  valid_gt: Array | None,
  config: MoEConfig,
  capacity: int | None,
  chosen: tuple[Array, ...] | None = None,
) -> Routing:
  """Top-k choices, combine weights, slots and statistics.

  Args:
    router_logits_gte: float32.
    valid_gt: bool; False tokens are not routed and count in nothing. None routes everything.
    capacity: slots per expert and group; None means that every choice is served.
    chosen: (combine weights, experts) [g, t, k] in place of the router's own, or with its bias.
  """
  e, k = config.num_experts, config.top_k
  probs_gte = jax.nn.softmax(router_logits_gte, axis=-1)
  if chosen is not None:
    weights_gtk, index_gtk = chosen[:2]
  elif config.router_order is RouterOrder.SOFTMAX_TOP_K:
    weights_gtk, index_gtk = top_k(probs_gte, k)  # raw, not renormalised over the k
  else:
    top_logits_gtk, index_gtk = top_k(router_logits_gte, k)
    weights_gtk = jax.nn.softmax(top_logits_gtk, axis=-1)
  if valid_gt is not None:
    weights_gtk = weights_gtk * valid_gt[..., None]
  slot_gtk = assign_slots(index_gtk, valid_gt, e)
  routed_gtk = slot_gtk >= 0
  served_gtk = routed_gtk if capacity is None else routed_gtk & (slot_gtk < capacity)

  chosen_gtke = jax.nn.one_hot(index_gtk, e, dtype=jnp.float32) * routed_gtk[..., None]
  chosen_gte = jax.lax.stop_gradient(chosen_gtke.sum(axis=2))
  routed = jnp.maximum(routed_gtk.sum(), 1).astype(jnp.float32)
  served = served_gtk.sum().astype(jnp.float32)
  slots = routed if capacity is None else float(e * capacity * slot_gtk.shape[0])
  lost_gt = routed_gtk.any(axis=-1) & ~served_gtk.any(axis=-1)
  balance = load_balance_loss(probs_gte, chosen_gte, valid_gt)
  if config.balance_loss != 'st_moe':
    balance = balance_loss(config, probs_gte, chosen_gtke, valid_gt, (chosen or ())[2:])
  elif config.router_loss is RouterLoss.SUM:
    balance = balance / k  # f as a share of all choices, so that balance is 1 for any k
  stats = RouterStats(
    load_balance_loss=balance,
    router_z_loss=router_z_loss(router_logits_gte, valid_gt),
    expert_load_e=chosen_gte.sum(axis=(0, 1)) / routed,
    dropped_fraction=1.0 - served / routed,
    tokens_left_behind=lost_gt.sum() * k / routed,
    expert_usage=served / slots,
    router_confidence=jnp.sum(weights_gtk * served_gtk) / jnp.maximum(served, 1),
  )
  return Routing(index_gtk, weights_gtk, slot_gtk, stats, e, capacity)


class Router(nn.Module):
  """Linear router in float32: bf16 logits would flip near ties between experts."""

  config: MoEConfig

  @nn.compact
  def __call__(self, x_gtd: Array, valid_gt: Array | None, train: bool) -> Routing:
    """[g, t, d] -> what is decided for its tokens."""
    cfg = self.config
    init = nn.with_logical_partitioning(
      nn.initializers.normal(cfg.router_init_std), ('embed', 'router')
    )
    kernel_de = self.param('kernel', init, (x_gtd.shape[-1], cfg.num_experts), jnp.float32)
    x_gtd = x_gtd.astype(jnp.float32)
    if train and cfg.jitter_noise > 0:
      low, high = 1.0 - cfg.jitter_noise, 1.0 + cfg.jitter_noise
      noise = jax.random.uniform(self.make_rng('dropout'), x_gtd.shape, minval=low, maxval=high)
      x_gtd = x_gtd * noise
    # HIGHEST: the default would be bf16 passes on TPU and TF32 on NVIDIA.
    logits_gte = jnp.einsum('gtd,de->gte', x_gtd, kernel_de, precision=jax.lax.Precision.HIGHEST)
    capacity = None
    if cfg.dispatch is not Dispatch.DROPLESS:
      factor = cfg.capacity_factor if train else cfg.eval_capacity_factor
      capacity = expert_capacity(
        x_gtd.shape[1],
        cfg.num_experts,
        factor,
        top_k=cfg.top_k,
        convention=cfg.capacity_convention,
        min_capacity=cfg.min_expert_capacity,
      )
    valid = valid_gt if cfg.ignore_padding else None
    chosen = biased_choice(self, logits_gte, cfg) if cfg.balance_loss == 'loss_free' else None
    return route(logits_gte, valid, cfg, capacity, chosen)
