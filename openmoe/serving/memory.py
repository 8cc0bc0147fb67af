"""What serving a model takes, before anything is loaded."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from openmoe.config import ConfigError, ModelConfig
from openmoe.inference.decode import inference_config
from openmoe.models import abstract_params
from openmoe.serving.slots import cache_bytes

_GIB = 1 << 30


def plan(config: ModelConfig, dtype: str, slots: int, max_length: int) -> str:
  """A few lines: bytes of parameters and of the cache.

  Args:
    dtype: of activations, and of the layers' kernels.
    max_length: tokens of a sequence.

  Raises:
    ConfigError: there is no slot.
  """
  if slots < 1:
    raise ConfigError(f'slots={slots} must be at least 1.')
  config = inference_config(dataclasses.replace(config, dtype=dtype))
  narrow = np.dtype(jax.numpy.dtype(dtype)).itemsize
  sizes = {'layers': 0, 'embedding and output': 0}
  for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)[0]):
    inside = str(path[0].key) == 'decoder'
    wide = 'router' in jax.tree_util.keystr(path) or leaf.ndim < 3
    size = leaf.size * (narrow if inside and not wide else 4)
    sizes['layers' if inside else 'embedding and output'] += size
  sizes[f'cache of {slots} x {max_length} tokens'] = cache_bytes(config, slots, max_length)
  width = max(map(len, sizes))
  lines = [f'{name:{width}}  {size / _GIB:9.3f} GiB' for name, size in sizes.items()]
  return '\n'.join([*lines, f'{"in all":{width}}  {sum(sizes.values()) / _GIB:9.3f} GiB'])
