"""Rotary position embedding, half-split (GPT-NeoX, `rotate_half`) convention."""

from __future__ import annotations

import jax.numpy as jnp

from openmoe.types import Array


def rotary_tables(
  positions_bt: Array, head_dim: int, theta: float, dtype: jnp.dtype
) -> tuple[Array, Array]:
  """sin and cos [b, t, 1, h]; angles in float32, because bf16 cannot tell positions above 256."""
  wide = jnp.promote_types(dtype, jnp.float32)
  inv_freq = theta ** (-jnp.arange(0, head_dim, 2, dtype=wide) / head_dim)
  angles = positions_bt[..., None].astype(wide) * inv_freq
  angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
  return jnp.sin(angles).astype(dtype), jnp.cos(angles).astype(dtype)


def apply_rotary(x_btnh: Array, sin: Array, cos: Array) -> Array:
  """x * cos + rotate_half(x) * sin, in x's dtype."""
  first, second = jnp.split(x_btnh, 2, axis=-1)
  rotated = jnp.concatenate([-second, first], axis=-1)
  return x_btnh * cos + rotated * sin
