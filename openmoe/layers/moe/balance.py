"""Balance losses of other systems, each by its own formula, and what one's weight is in another.

C counts tokens, f_e the share of tokens that chose e (over the choices it sums to top_k), P_e the
mean probability of e; f has no gradient. All are of one layer but `mixtral`, which knows none.
MoEConfig.balance_loss names the one that is trained with; `st_moe`, in router.py, is the default.
Where padding is not routed (ignore_padding) it counts in none; else it counts as tokens do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from openmoe.config import MoEConfig, RouterOrder
from openmoe.types import Array

_Means = tuple[Array, Array]


def _mean(x_gte: Array, valid_gt: Array | None, axes: tuple[int, ...]) -> Array:
  """Over tokens that count."""
  if valid_gt is None:
    return jnp.mean(x_gte, axis=axes)
  weight_gt1 = valid_gt[..., None].astype(x_gte.dtype)
  return jnp.sum(x_gte * weight_gt1, axes) / jnp.maximum(jnp.sum(weight_gt1, axes), 1)


def _by_group(probs_gte: Array, chosen_gte: Array, valid_gt: Array | None) -> _Means:
  """f and P [g, e] of each routing group."""
  return _mean(chosen_gte, valid_gt, (1,)), _mean(probs_gte, valid_gt, (1,))


def _together(probs_gte: Array, chosen_gte: Array, valid_gt: Array | None) -> _Means:
  """f and P [e] of all tokens of the call."""
  return _mean(chosen_gte, valid_gt, (0, 1)), _mean(probs_gte, valid_gt, (0, 1))


def switch(probs_gte: Array, chosen_gtke: Array, valid_gt: Array | None) -> Array:
  """E sum_e f_e P_e of first choices, mean over groups. Balance 1, range (0, E].

  Switch Transformer, arXiv 2101.03961, equations 4 to 6.
  """
  f_ge, p_ge = _by_group(probs_gte, chosen_gtke[:, :, 0], valid_gt)
  return probs_gte.shape[-1] * jnp.mean(jnp.sum(f_ge * p_ge, axis=-1))


def gshard(probs_gte: Array, chosen_gtke: Array, valid_gt: Array | None) -> Array:
  """mean_e (c_e / S) m_e of first choices, mean over groups. Balance 1 / E^2, range (0, 1/E].

  GShard, arXiv 2006.16668, algorithm 1: the mean over experts leaves out both factors E that
  later systems have.
  """
  f_ge, p_ge = _by_group(probs_gte, chosen_gtke[:, :, 0], valid_gt)
  return jnp.mean(f_ge * p_ge)


def mixtral(probs_gte: Array, chosen_gtke: Array, valid_gt: Array | None) -> Array:
  """(f_e, P_e) [2, e] of one layer; `pooled` makes E sum_e f_e P_e of their means over layers.

  Balance top_k, range (0, E]. transformers `load_balancing_loss_func` puts the tokens of all
  layers together before it multiplies, so layers may be uneven if they make up for one another.
  """
  return jnp.stack(_together(probs_gte, chosen_gtke.sum(axis=2), valid_gt))


def pooled(means_l2e: Array) -> Array:
  """[1] from the layers of `mixtral`; microbatch shares scale f and P, and count once."""
  f_e, p_e = jnp.mean(means_l2e, axis=0)
  share = jax.lax.stop_gradient(jnp.sum(p_e))  # 1, or what part of the batch this is
  return f_e.shape[-1] * jnp.sum(f_e * p_e)[None] / share


def megablocks(probs_gte: Array, chosen_gtke: Array, valid_gt: Array | None) -> Array:
  """E / k sum_e f_e P_e of all tokens of a micro-batch. Balance 1, range (0, E/k].

  MegaBlocks layers/moe.py `batched_load_balancing_loss`; there the mean over layers.
  """
  f_e, p_e = _together(probs_gte, chosen_gtke.sum(axis=2), valid_gt)
  return probs_gte.shape[-1] / chosen_gtke.shape[2] * jnp.sum(f_e * p_e)


def jetmoe(probs_gte: Array, chosen_gtke: Array, valid_gt: Array | None) -> Array:
  """E sum_e norm1(sum_t p)_e norm1(sum_t [chosen])_e of all tokens. Balance 1, range (0, E/k].

  JetMoE's and ModuleFormer's gate.py without its 0.1 mean lse^2, which is router_z_weight here;
  there the sum over all routers.
  """
  weight_gt1 = 1.0 if valid_gt is None else valid_gt[..., None]
  p_e, n_e = jnp.sum(probs_gte * weight_gt1, axis=(0, 1)), jnp.sum(chosen_gtke, axis=(0, 1, 2))
  norm1 = lambda x_e: x_e / jnp.maximum(jnp.sum(x_e), 1e-12)
  return probs_gte.shape[-1] * jnp.sum(norm1(p_e) * norm1(n_e))


def olmo_core(probs_gte: Array, chosen_gtke: Array, valid_gt: Array | None) -> Array:
  """E / (k C) sum_g sum_e n_ge P_ge over instances g. Balance 1, range (0, E/k].

  OLMo-core moe/loss.py with granularity `instance`; `local_batch` is `megablocks`. An instance is
  a routing group: set group_size to the length of a row. Instances weigh as their tokens do.
  """
  e, k = probs_gte.shape[-1], chosen_gtke.shape[2]
  n_ge = jnp.sum(chosen_gtke, axis=(1, 2))
  p_ge = _mean(probs_gte, valid_gt, (1,))
  tokens = probs_gte.shape[0] * probs_gte.shape[1] if valid_gt is None else jnp.sum(valid_gt)
  return e / k * jnp.sum(n_ge * p_ge) / jnp.maximum(tokens, 1)


def deepseek_sequence(probs_gte: Array, chosen_gtke: Array, valid_gt: Array | None) -> Array:
  """Mean over sequences of sum_e (E n_e / (k T)) P_e. Balance 1, range (0, E/k].

  DeepSeek-V2 `seq_aux`, V3's sequence-wise loss for softmax scores; there the sum over layers. A
  sequence is a routing group: set group_size to the length of a row.
  """
  e, k = probs_gte.shape[-1], chosen_gtke.shape[2]
  f_ge, p_ge = _by_group(probs_gte, chosen_gtke.sum(axis=2), valid_gt)
  return e / k * jnp.mean(jnp.sum(f_ge * p_ge, axis=-1))


def loss_free(probs_gte: Array, chosen_gtke: Array, valid_gt: Array | None, bias_e: Array) -> Array:
  """0, whose gradient for the bias is sign(load - mean load) [e]; no gradient for the router.

  Loss-free balancing, arXiv 2408.15664 and DeepSeek-V3: b_e moves by u against the sign. Here the
  optimizer moves it, AdamW by about its learning rate in place of u.
  """
  del probs_gte, valid_gt
  load_e = jnp.sum(chosen_gtke, axis=(0, 1, 2))
  pull = jnp.sum(jnp.sign(load_e - jnp.mean(load_e)) * bias_e)
  return pull - jax.lax.stop_gradient(pull)


def biased_choice(module: nn.Module, logits_gte: Array, config: MoEConfig) -> tuple:
  """(combine weights, experts, bias) of choices by probability plus a bias; weights have none.

  Makes the parameter `bias` [e] of the router, 0 at first.
  """
  from openmoe.layers.moe.router import top_k

  init = nn.with_logical_partitioning(nn.initializers.zeros, ('router',))
  bias_e = module.param('bias', init, (config.num_experts,), jnp.float32)
  probs_gte = jax.nn.softmax(logits_gte, axis=-1)
  _, index_gtk = top_k(probs_gte + jax.lax.stop_gradient(bias_e), config.top_k)
  taken = lambda x_gte: jnp.take_along_axis(x_gte, index_gtk, axis=-1)
  if config.router_order is RouterOrder.SOFTMAX_TOP_K:
    return taken(probs_gte), index_gtk, bias_e
  return jax.nn.softmax(taken(logits_gte), axis=-1), index_gtk, bias_e


@dataclasses.dataclass(frozen=True)
class Kind:
  """What stands in the table.

  Attributes:
    value: the function; None for the default, which is router.load_balance_loss.
    formula: as in its source.
    balance: value at perfect balance, (experts, choices) -> number.
    over: what f and P are means over.
    layers: how its source puts layers together: 'mean', 'sum', 'pooled'.
    padding: what its source does with it.
    accumulation: what becomes of it over micro-batches in its source.
    like_ours: where it is a multiple of ours; '' where it never is.
    source: where it is from.
  """

  value: Callable | None
  formula: str
  balance: Callable[[int, int], float]
  over: str
  layers: str
  padding: str
  accumulation: str
  like_ours: str
  source: str


_ONE: Callable[[int, int], float] = lambda experts, choices: 1.0
_EACH = 'mean over micro-batches'
KINDS: dict[str, Kind] = {
  'st_moe': Kind(None, 'E sum f P', lambda e, k: float(k), 'group', 'mean', 'counts (released)',
                 _EACH, 'always', 'ST-MoE; flaxformer routing.py'),
  'switch': Kind(switch, 'E sum f1 P', _ONE, 'group', 'sum', 'left out', _EACH, 'top-1',
                 'arXiv 2101.03961'),
  'gshard': Kind(gshard, 'mean_e f1 P', lambda e, k: 1 / e**2, 'group', 'sum', 'left out', _EACH,
                 'top-1', 'arXiv 2006.16668, algorithm 1'),
  'mixtral': Kind(mixtral, 'E sum mean_l(f) mean_l(P)', lambda e, k: float(k),
                  'micro-batch and layers', 'pooled', 'left out where there is a mask', _EACH,
                  'one layer, one group', 'transformers load_balancing_loss_func'),
  'megablocks': Kind(megablocks, 'E/k sum f P', _ONE, 'micro-batch', 'mean', 'counts', _EACH,
                     'one group', 'MegaBlocks layers/moe.py'),
  'jetmoe': Kind(jetmoe, 'E sum norm1(p) norm1(n)', _ONE, 'micro-batch', 'sum', 'counts', _EACH,
                 'one group', 'JetMoE utils/gate.py'),
  'olmo_core': Kind(olmo_core, 'E/(k C) sum_g n P', _ONE, 'instance', 'sum', 'counts',
                    'divided by all tokens of the batch', 'group = instance',
                    'OLMo-core moe/loss.py'),
  'deepseek_sequence': Kind(deepseek_sequence, 'mean_g E/(k T) sum n P', _ONE, 'sequence', 'sum',
                            'counts', _EACH, 'group = sequence', 'DeepSeek-V2 seq_aux'),
  'loss_free': Kind(loss_free, 'b -= u sign(n - mean n)', lambda e, k: 0.0, 'batch',
                    'each by itself', 'left out', 'one step a batch', '',
                    'arXiv 2408.15664'),
}  # fmt: skip


def balance_loss(
  config: MoEConfig,
  probs_gte: Array,
  chosen_gtke: Array,
  valid_gt: Array | None,
  rest: Sequence[Array] = (),
) -> Array:
  """The configured loss of one layer.

  Args:
    chosen_gtke: float32 one-hot choices, zero where they are not routed.
    rest: the bias, for loss_free.
  """
  return KINDS[config.balance_loss].value(probs_gte, chosen_gtke, valid_gt, *rest)


def factor(name: str, num_experts: int, top_k: int, layers: int) -> float | None:
  """What a weight of another system is multiplied by to be ours, router_loss='mean'.

  None where it is no multiple of ours whatever is chosen.
  """
  kind = KINDS[name]
  if not kind.like_ours:
    return None
  together = layers if kind.layers == 'sum' else 1
  return together * kind.balance(num_experts, top_k) / top_k


def table(num_experts: int, top_k: int, layers: int) -> list[dict[str, str]]:
  """The losses side by side, for people."""
  rows = []
  for name, kind in KINDS.items():
    ours = factor(name, num_experts, top_k, layers)
    applies = top_k == 1 or kind.like_ours != 'top-1'
    known = ours is not None and applies
    rows.append({
      'balance_loss': name,
      'formula': kind.formula,
      'balance': f'{kind.balance(num_experts, top_k):.4g}',
      'over': kind.over,
      'layers': kind.layers,
      'padding': kind.padding,
      'accumulation': kind.accumulation,
      'their 0.01 is our': f'{0.01 * ours:.4g}' if known else '-',
      'if': kind.like_ours or 'never',
      'source': kind.source,
    })  # fmt: skip
  return rows
