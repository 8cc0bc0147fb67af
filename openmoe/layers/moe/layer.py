"""The sparse layer: router decides, dispatcher moves (transport.py), experts compute."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.config import ConfigError, MoEConfig
from openmoe.layers.mlp import DOUBLE_SWIGLU, Gating
from openmoe.layers.moe.exchange import gathered, scattered, through_experts
from openmoe.layers.moe.experts import ExpertKernel, Stack, times
from openmoe.layers.moe.grouped.api import Segments, choose_kernel, grouped_mlp
from openmoe.layers.moe.router import Router
from openmoe.types import Array, RouterStats, Routing


@flax.struct.dataclass
class ExpertWeights:
  """One gated MLP per expert; all in the activation dtype.

  Attributes:
    wi_0_eduf: [e, d, 2, f] double-width gate.
    wi_1_edf: [e, d, f], or None where the gate is all.
    wo_efd: [e, f, d].
    keep_ef: dropout of the hidden units, scaled by 1 / keep, or None. As in the original an
      expert drops the same units for all of its tokens.
  """

  wi_0_eduf: Stack
  wi_1_edf: Stack | None
  wo_efd: Stack
  keep_ef: Array | None = None


WEIGHT_AXES = ExpertWeights(
  wi_0_eduf=('expert', None, None, 'expert_mlp'),
  wi_1_edf=('expert', None, 'expert_mlp'),
  wo_efd=('expert', 'expert_mlp', None),
  keep_ef=('expert', 'expert_mlp'),
)


def resolve_groups(num_tokens: int, group_size: int) -> int:
  """Tokens per routing group for this many tokens: group_size, or all of fewer tokens.

  Raises:
    ConfigError: group_size does not divide a larger number of tokens.
  """
  if num_tokens <= group_size:
    return num_tokens
  if num_tokens % group_size:
    raise ConfigError(
      f'{num_tokens} tokens do not divide into routing groups of group_size={group_size}; give a '
      f'batch whose tokens are a multiple, or a group_size that divides them.'
    )
  return group_size


def route_groups(
  x_btd: Array, valid_bt: Array | None, config: MoEConfig, train: bool
) -> tuple[Array, Routing, int | None]:
  """Tokens in routing groups [g, t, d], what the layer's router decides for them, the capacity.

  For use inside a module: makes its submodule `router`.
  """
  b, t, d = x_btd.shape
  size = resolve_groups(b * t, config.group_size)
  x_gtd = partitioning.shard(x_btd.reshape(-1, size, d), ('act_group', None, 'act_embed'))
  valid_gt = None if valid_bt is None else valid_bt.reshape(-1, size)
  routing, capacity = Router(config, name='router')(x_gtd, valid_gt, train)
  return x_gtd, routing, capacity


class Experts(nn.Module):
  """Holds the stacked expert kernels.

  Attributes:
    kernel_init: out_axis -> initialiser of a stack [e, in, ...out]; each expert on its own.
    gating: whether there is a wi_1.
  """

  num_experts: int
  mlp_dim: int
  dtype: jnp.dtype
  kernel_init: Callable[[int | tuple[int, ...]], nn.initializers.Initializer]
  dropout_rate: float
  gating: Gating

  @nn.compact
  def __call__(self, embed_dim: int, train: bool) -> ExpertWeights:
    e, d, f = self.num_experts, embed_dim, self.mlp_dim
    kernel = lambda name, *args: ExpertKernel(*args, name=name)().astype(self.dtype)
    gate_axes = ('expert', 'embed', 'gate', 'expert_mlp')
    linear_axes, out_axes = ('expert', 'embed', 'expert_mlp'), ('expert', 'expert_mlp', 'embed')
    keep_ef = None
    if train and self.dropout_rate > 0:
      keep = jax.random.bernoulli(self.make_rng('dropout'), 1 - self.dropout_rate, (e, f))
      keep_ef = keep.astype(self.dtype) / (1 - self.dropout_rate)
    wi_0_eduf = kernel('wi_0', (e, d, 2, f), gate_axes, self.kernel_init((2, 3)))
    wi_1_edf = None
    if self.gating.has_linear:
      wi_1_edf = kernel('wi_1', (e, d, f), linear_axes, self.kernel_init(2))
    wo_efd = kernel('wo', (e, f, d), out_axes, self.kernel_init(2))
    return ExpertWeights(wi_0_eduf, wi_1_edf, wo_efd, keep_ef)


def _kernel_init(scale: float, std: float | None) -> Callable:
  """For Experts.kernel_init; see MoeLayer."""
  if std is not None:
    return lambda out_axis: nn.initializers.normal(std)
  return lambda out_axis: nn.initializers.variance_scaling(
    scale, 'fan_in', 'normal', in_axis=1, out_axis=out_axis, batch_axis=0
  )


def _experts_on_buffers(buffer_erd: Array, weights: ExpertWeights, gating: Gating) -> Array:
  """Each expert's MLP on its own buffer, [e, r, d] -> [e, r, d]."""
  gate_eruf = times(buffer_erd, weights.wi_0_eduf)
  linear_erf = None
  if weights.wi_1_edf is not None:
    linear_erf = times(buffer_erd, weights.wi_1_edf)
  h_erf = gating.activation(gate_eruf, linear_erf)
  if weights.keep_ef is not None:
    h_erf = h_erf * weights.keep_ef[:, None]
  return times(h_erf, weights.wo_efd)


def _experts(
  weights: ExpertWeights, rows: Array, segments: Segments | None, *, gating: Gating
) -> Array:
  """One device's experts on what was routed to them; see transport.through_experts."""
  rows = gathered(rows)
  if segments is None:
    return scattered(_experts_on_buffers(rows, weights, gating))
  e, d = weights.wi_0_eduf.shape[:2]
  wi_0_edp = weights.wi_0_eduf.reshape(e, d, -1)
  rest = (weights.wi_1_edf, weights.wo_efd, weights.keep_ef)
  return scattered(grouped_mlp(rows, wi_0_edp, *rest, segments, gating.activation))


class MoeLayer(nn.Module):
  """Mixture of gated MLPs. Dropped tokens get 0 (or the bias): the residual carries them.

  Attributes:
    init_scale: every expert's kernels start with variance init_scale / fan_in.
    init_std: in place of it, one standard deviation for all kernels.
    bias: whether one vector, shared by all experts and not gated, is added to every output.
  """

  config: MoEConfig
  mlp_dim: int
  dtype: jnp.dtype
  init_scale: float
  dropout_rate: float = 0.0
  gating: Gating = DOUBLE_SWIGLU
  bias: bool = False
  init_std: float | None = None

  @nn.compact
  def __call__(
    self, x_btd: Array, valid_bt: Array | None, train: bool
  ) -> tuple[Array, RouterStats]:
    """[b, t, d] -> float32 [b, t, d] and the router's losses and statistics.

    The output is float32 because the float32 combine weights promote it; from here on the
    residual stream of the model is float32 too.
    """
    x_gtd, routing, capacity = route_groups(x_btd, valid_bt, self.config, train)
    weights = Experts(
      self.config.num_experts,
      self.mlp_dim,
      self.dtype,
      _kernel_init(self.init_scale, self.init_std),
      self.dropout_rate,
      self.gating,
      name='experts',
    )(x_btd.shape[-1], train)
    y_gtd = apply_experts(
      x_gtd.astype(self.dtype), routing, weights, self.config, capacity, self.gating
    )
    y_btd = y_gtd.reshape(x_btd.shape)
    if self.bias:
      y_btd += output_bias(self, x_btd.shape[-1])
    return y_btd, routing.stats


def output_bias(module: nn.Module, embed_dim: int) -> Array:
  """float32 parameter `bias` [d] of a module, 0 at first."""
  init = nn.with_logical_partitioning(nn.initializers.zeros, ('embed',))
  return module.param('bias', init, (embed_dim,), jnp.float32)


def apply_experts(
  x_gtd: Array,
  routing: Routing,
  weights: ExpertWeights,
  config: MoEConfig,
  capacity: int | None,
  gating: Gating = DOUBLE_SWIGLU,
) -> Array:
  """Moves tokens to their experts and back, float32 [g, t, d]; per device under a mesh."""
  # Every model shard moves only its slice of the embedding.
  act_axes = ('act_group', None, 'act_embed_slice')
  absent = {n: None for n in ('wi_1_edf', 'keep_ef') if getattr(weights, n) is None}
  return through_experts(
    functools.partial(_experts, gating=gating),
    x_gtd,
    weights,
    routing,
    config,
    capacity,
    kernel=choose_kernel(x_gtd.dtype, *weights.wo_efd.shape[1:]),
    in_axes=act_axes,
    weight_axes=WEIGHT_AXES.replace(**absent),
    out_axes=act_axes,
    combine=True,
  )
