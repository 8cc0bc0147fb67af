"""Gated MLPs: OpenMoE's with its cubic gate, kept exactly for checkpoint compatibility."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.types import Array


def double_swiglu(gate: Array, linear: Array) -> Array:
  """(a * silu(b)) * linear, with a, b = gate[..., 0, :], gate[..., 1, :]; [..., 2, f] -> [..., f].

  A plain SwiGLU has one gate; the released models have this one (flaxformer dense.py, activations
  'swiglu' and 'linear'). Mending it would orphan every checkpoint.
  """
  return gate[..., 0, :] * nn.silu(gate[..., 1, :]) * linear


def swiglu(gate: Array, linear: None = None) -> Array:
  """silu(a) * b with a, b = gate[..., 0, :], gate[..., 1, :]: plain SwiGLU, as JetMoE has it."""
  assert linear is None, 'SwiGLU has no third factor'
  return nn.silu(gate[..., 0, :]) * gate[..., 1, :]


class Gating(NamedTuple):
  """A gated MLP's hidden layer.

  Attributes:
    activation: (gate [..., 2, f], linear [..., f] or None) -> [..., f].
    has_linear: whether there is a kernel wi_1 for the linear factor.
  """

  activation: Callable[[Array, Array | None], Array]
  has_linear: bool


DOUBLE_SWIGLU = Gating(double_swiglu, has_linear=True)
SWIGLU = Gating(swiglu, has_linear=False)


class Kernel(nn.Module):
  """A float32 parameter named `kernel` with its logical axes; the caller casts and multiplies."""

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  init: nn.initializers.Initializer

  @nn.compact
  def __call__(self) -> Array:
    init = nn.with_logical_partitioning(self.init, self.axes)
    return self.param('kernel', init, self.shape, jnp.float32)


class Mlp(nn.Module):
  """Dense MLP with double-width wi_0; no biases. Returns `dtype`.

  wi_0 is stored [d, 2, f] (the original: [d, 2f], halves side by side), so that splitting f over
  the model axis leaves both halves of a unit on one device.
  """

  mlp_dim: int
  dtype: jnp.dtype
  init_scale: float
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(self, x_btd: Array, train: bool) -> Array:
    """[b, t, d] -> [b, t, d]."""
    d, f = x_btd.shape[-1], self.mlp_dim
    init = functools.partial(
      nn.initializers.variance_scaling, self.init_scale, 'fan_in', 'truncated_normal', in_axis=0
    )
    kernel = lambda name, *args: Kernel(*args, name=name)().astype(self.dtype)
    wi_0_duf = kernel('wi_0', (d, 2, f), ('embed', 'gate', 'mlp'), init(out_axis=(1, 2)))
    wi_1_df = kernel('wi_1', (d, f), ('embed', 'mlp'), init(out_axis=1))
    wo_fd = kernel('wo', (f, d), ('mlp', 'embed'), init(out_axis=1))
    x_btd = x_btd.astype(self.dtype)
    h_btf = double_swiglu(jnp.einsum('btd,duf->btuf', x_btd, wi_0_duf), x_btd @ wi_1_df)
    h_btf = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(h_btf, deterministic=not train)
    h_btf = partitioning.shard(h_btf, ('act_batch', 'act_length', 'act_mlp'))
    return h_btf @ wo_fd
