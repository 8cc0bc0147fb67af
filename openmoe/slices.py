"""Where devices go in a mesh that jax.make_mesh does not make."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from openmoe.config import ConfigError


def arranged(shape: tuple[int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
  """Devices as (data, expert, model), for several TPU slices or axes that fit no torus.

  Slices share the data axis, so that only it crosses the network between them. Axes that do not fit
  the torus of a slice take its devices in the order of their ids.

  Raises:
    ConfigError: the slices do not divide the data axis.
  """
  slices = len({getattr(d, 'slice_index', None) or 0 for d in devices})
  if shape[0] % slices:
    raise ConfigError(
      f'{slices} slices do not divide the {shape[0]} data partitions: lower NUM_EXPERT_PARTITIONS '
      f'or NUM_MODEL_PARTITIONS, so that these and the data axis lie inside a slice.'
    )
  if slices > 1:
    try:
      inside = (shape[0] // slices, *shape[1:])
      return mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices)
    except NotImplementedError:
      pass  # as inside one slice
  return np.asarray(devices).reshape(shape)  # ids go slice by slice
