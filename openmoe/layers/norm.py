"""RMS normalisation as T5 defines it: no mean, no bias, scale initialised to one."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from openmoe.types import Array


class RMSNorm(nn.Module):
  """y = x / rms(x) * scale over the last axis.

  The cast order is the released models': statistics in float32, the normalised value cast to
  `dtype`, then multiplied by the scale cast to `dtype` (flaxformer layer_norm.py).
  """

  dtype: jnp.dtype
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[..., d] -> [..., d] in dtype."""
    scale_d = self.param(
      'scale',
      nn.with_logical_partitioning(nn.initializers.ones, ('embed',)),
      (x.shape[-1],),
      jnp.float32,
    )
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))  # bf16 squares lose small components
    mean_square = jnp.mean(jax.lax.square(x), axis=-1, keepdims=True)
    y = (x * jax.lax.rsqrt(mean_square + self.epsilon)).astype(self.dtype)
    return y * scale_d.astype(self.dtype)
