"""Reads a checkpoint whose experts stay outside the device: in host memory, or in a file.

The file is this program's own and has no name: it ends with the program, however that ends. The
operating system keeps of it in memory what there is room for.
"""

from __future__ import annotations

import tempfile

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from convert.core.source import find_form
from convert.load import load_params
from openmoe.config import ConfigError, ModelConfig
from openmoe.inference.offload import OFFLOADS, Store
from openmoe.models import abstract_params
from openmoe.models.decoding import is_expert_kernel
from openmoe.types import PyTree


def check(offload: str, weights: str, budget: int | None, alone: bool) -> None:
  """Raises ConfigError where experts cannot lie so.

  Args:
    alone: whether the model lies on one device and drops nothing.
  """
  if offload not in OFFLOADS:
    raise ConfigError(f'offload={offload!r} is not one of {list(OFFLOADS)}; choose one of these.')
  if budget is not None and (offload != 'disk' or budget < 1):
    raise ConfigError(
      f"expert_budget={budget} wants offload='disk' (here {offload!r}) and must be at least 1."
    )
  if offload != 'none' and (weights != 'float' or not alone):
    raise ConfigError(
      f'offload={offload!r} takes float weights, one device and no capacity (weights={weights!r}); '
      'leave one of them out.'
    )


def expert_bytes(config: ModelConfig) -> int:
  """Of all experts in the dtype of activations."""
  leaves = flax.traverse_util.flatten_dict(abstract_params(config)[0], sep='/')
  size = sum(leaf.size for path, leaf in leaves.items() if is_expert_kernel(path, config))
  return size * jnp.dtype(config.dtype).itemsize


def read(
  checkpoint: str, config: ModelConfig, offload: str, budget: int | None, directory: str | None
) -> tuple[PyTree, Store]:
  """Parameters of which those of experts lie outside, and the store for these.

  Args:
    budget: bytes of experts in memory with 'disk'; None for a quarter of all.
    directory: of the file; None for the system's.

  Raises:
    ConfigError: the model has no experts, or there is no room for the file.
  """
  if config.moe is None:
    raise ConfigError(f'{config.name} has no experts that could lie elsewhere; drop offload.')
  dtype = np.dtype(jnp.dtype(config.dtype))

  def allocate(path: str, shape: tuple[int, ...], stored: np.dtype) -> np.ndarray:
    if not is_expert_kernel(path, config):
      return np.empty(shape, stored)
    return np.empty(shape, dtype) if offload == 'ram' else _mapped(shape, dtype, directory)

  params = load_params(find_form(checkpoint), config, np.dtype(np.float32), allocate)
  if offload == 'disk' and budget is None:
    budget = expert_bytes(config) // 4
  return dict(params), Store(budget if offload == 'disk' else None)


def _mapped(shape: tuple[int, ...], dtype: np.dtype, directory: str | None) -> np.ndarray:
  try:
    with tempfile.TemporaryFile(dir=directory) as file:
      return np.memmap(file, dtype, 'w+', shape=shape)
  except OSError as error:
    raise ConfigError(
      f'offload_dir={directory or tempfile.gettempdir()!r} takes no file: {error}; choose another.'
    ) from error
