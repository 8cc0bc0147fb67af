"""The sparse layer: router decides, exchange.py moves, experts compute."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.config import ConfigError, Dispatch, MoEConfig
from openmoe.layers.dense import DOUBLE_SWIGLU, Gating
from openmoe.layers.moe.exchange import ExpertPlan, Segments, through_experts, through_slots, times
from openmoe.layers.moe.grouped.api import choose_kernel
from openmoe.layers.moe.grouped.sorted import through_segments
from openmoe.layers.moe.masks import through_masks
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

  wi_0_eduf: Array
  wi_1_edf: Array | None
  wo_efd: Array
  keep_ef: Array | None = None


WEIGHT_AXES = ExpertWeights(
  wi_0_eduf=('expert', None, None, 'expert_mlp'),
  wi_1_edf=('expert', None, 'expert_mlp'),
  wo_efd=('expert', 'expert_mlp', None),
  keep_ef=('expert', 'expert_mlp'),
)


def make_plan(dispatch: Dispatch, kernel_eIO: Array, kernel_axes: tuple, **axes) -> ExpertPlan:
  """How a layer moves its rows on this mesh and platform.

  Args:
    kernel_eIO: one of the layer's kernels; its sides on one device and its dtype choose who
      multiplies without capacity.
    kernel_axes: logical axes of that kernel.
    axes: the other fields of ExpertPlan.
  """
  match dispatch:
    case Dispatch.SCATTER:
      return ExpertPlan(through_slots, **axes)
    case Dispatch.MASK:
      return ExpertPlan(through_masks, **axes)
    case Dispatch.DROPLESS:
      sides = partitioning.local_shape(kernel_eIO.shape, kernel_axes)[1:]
      kernel = choose_kernel(*partitioning.target(), kernel_eIO.dtype, *sides)
      move = functools.partial(through_segments, kernel=kernel)
      return ExpertPlan(move, **axes, typed=not kernel.untyped)


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
) -> tuple[Array, Routing]:
  """Tokens in routing groups [g, t, d], and what the layer's router decides for them.

  For use inside a module: makes its submodule `router`.
  """
  b, t, d = x_btd.shape
  size = resolve_groups(b * t, config.group_size)
  x_gtd = partitioning.shard(x_btd.reshape(-1, size, d), ('act_group', None, 'act_embed'))
  valid_gt = None if valid_bt is None else valid_bt.reshape(-1, size)
  routing = Router(config, name='router')(x_gtd, valid_gt, train)
  late_btk = routing.slot_gtk.reshape(b, t, -1)[:, -max(1, t // 4) :]
  lost_btk = late_btk >= (b * t * config.top_k if routing.capacity is None else routing.capacity)
  late = jnp.sum(lost_btk) / jnp.maximum(jnp.sum(late_btk >= 0), 1)
  return x_gtd, routing.replace(stats=routing.stats.replace(late_dropped_fraction=late))


class ExpertKernel(nn.Module):
  """A float32 stack of experts' kernels named `kernel`.

  The parameter may be anything that has the stack's shape and stands for it, so that inference
  can lay experts out as it needs them; such a form comes with a run_experts that takes it.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  init: nn.initializers.Initializer

  @nn.compact
  def __call__(self) -> Array:
    if self.is_initializing():
      init = nn.with_logical_partitioning(self.init, self.axes)
      return self.param('kernel', init, self.shape, jnp.float32)
    kernel = nn.unbox(self.get_variable('params', 'kernel'))
    assert kernel.shape == self.shape, (self.path, kernel.shape, self.shape)
    return kernel


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


def scaled_init(scale: float) -> Callable:
  """Initialisers of variance scale / fan_in, as Experts.kernel_init takes them."""
  return lambda out_axis: nn.initializers.variance_scaling(
    scale, 'fan_in', 'normal', in_axis=1, out_axis=out_axis, batch_axis=0
  )


def _gated_mlp(
  weights: ExpertWeights, rows: Array, segments: Segments | None, *, gating: Gating
) -> Array:
  """One device's experts on what was routed to them; see exchange.Compute."""
  if segments is not None:
    return segments.mlp(rows, weights, gating.activation)
  gate_eRuf = times(rows, weights.wi_0_eduf, None)
  linear_eRf = None if weights.wi_1_edf is None else times(rows, weights.wi_1_edf, None)
  h_eRf = gating.activation(gate_eRuf, linear_eRf)
  if weights.keep_ef is not None:
    h_eRf = h_eRf * weights.keep_ef[:, None]
  return times(h_eRf, weights.wo_efd, None)


class MoeLayer(nn.Module):
  """Mixture of gated MLPs. Dropped tokens get 0 (or the bias): the residual carries them.

  Attributes:
    kernel_init: see Experts.
    bias: whether one vector, shared by all experts and not gated, is added to every output.
    run_experts: moves rows to experts and back; inference may bring a way of its own.
  """

  config: MoEConfig
  mlp_dim: int
  dtype: jnp.dtype
  kernel_init: Callable[[int | tuple[int, ...]], nn.initializers.Initializer]
  dropout_rate: float = 0.0
  gating: Gating = DOUBLE_SWIGLU
  bias: bool = False
  run_experts: Callable[..., Array] = through_experts

  @nn.compact
  def __call__(
    self, x_btd: Array, valid_bt: Array | None, train: bool
  ) -> tuple[Array, RouterStats]:
    """[b, t, d] -> float32 [b, t, d] and the router's losses and statistics.

    The output is float32 because the float32 combine weights promote it; from here on the
    residual stream of the model is float32 too.
    """
    cfg, d = self.config, x_btd.shape[-1]
    x_gtd, routing = route_groups(x_btd, valid_bt, cfg, train)
    sizes = (cfg.num_experts, self.mlp_dim, self.dtype)
    weights = Experts(*sizes, self.kernel_init, self.dropout_rate, self.gating, name='experts')(
      d, train
    )
    absent = {n: None for n in ('wi_1_edf', 'keep_ef') if getattr(weights, n) is None}
    act_axes = ('act_group', None, 'act_embed_slice')
    axes = {'in_axes': act_axes, 'weight_axes': WEIGHT_AXES.replace(**absent), 'out_axes': act_axes}
    plan = make_plan(cfg.dispatch, weights.wo_efd, WEIGHT_AXES.wo_efd, **axes)
    compute = functools.partial(_gated_mlp, gating=self.gating)
    y_gtd = self.run_experts(compute, x_gtd.astype(self.dtype), weights, routing, plan)
    y_btd = y_gtd.reshape(x_btd.shape)
    if self.bias:
      y_btd += output_bias(self, d)
    return y_btd, routing.stats


def output_bias(module: nn.Module, embed_dim: int) -> Array:
  """float32 parameter `bias` [d] of a module, 0 at first."""
  init = nn.with_logical_partitioning(nn.initializers.zeros, ('embed',))
  return module.param('bias', init, (embed_dim,), jnp.float32)
