"""What serving a model takes in each form of its weights, before anything is loaded."""

from __future__ import annotations

import dataclasses
import os

import flax.traverse_util
import numpy as np

from openmoe.config import Architecture, ConfigError, ModelConfig
from openmoe.inference.decode import inference_config
from openmoe.models import abstract_params
from openmoe.models.decoding import is_expert_kernel
from openmoe.serving.slots import cache_bytes

_GIB = 1 << 30
ARGUMENTS = ('dtype', 'weights', 'offload', 'expert_budget')  # of plan(), as of convert.open.load
# Name -> (bytes of a layer's kernel, whether layers are int8, whether embedding and output are).
FORMS = {
  'float32': (4, False, False),
  'bfloat16': (2, False, False),
  'int8': (4, True, True),
  'int8_layers': (4, True, False),
}


@dataclasses.dataclass(frozen=True)
class Need:
  """Bytes of one form.

  Attributes:
    experts: kernels of experts.
    others: all other parameters.
    read: of weights, for one token of one row.
    cache: of the slots.
  """

  experts: int
  others: int
  read: int
  cache: int


def need(config: ModelConfig, form: str, slots: int, max_length: int) -> Need:
  """What a form takes.

  Raises:
    ConfigError: there is no slot.
  """
  if slots < 1:
    raise ConfigError(f'slots={slots} must be at least 1.')
  dtype = 'bfloat16' if form == 'bfloat16' else 'float32'
  config = inference_config(dataclasses.replace(config, dtype=dtype))
  tied = config.architecture is Architecture.JETMOE
  experts = others = read = 0
  for path, leaf in flax.traverse_util.flatten_dict(abstract_params(config)[0], sep='/').items():
    size = _bytes(path, leaf.shape, config, form)
    if is_expert_kernel(path, config):
      experts += size
      read += size * config.moe.top_k // config.moe.num_experts
    elif path == 'token_embedder/embedding':
      others += size + (leaf.size if tied and form == 'int8' else 0)  # values once more, turned
      read += size if tied else size // config.vocab_size
    else:
      others += size
      read += size
  return Need(experts, others, read, cache_bytes(config, slots, max_length))


def _bytes(path: str, shape: tuple[int, ...], config: ModelConfig, form: str) -> int:
  numbers = int(np.prod(shape))
  narrow, layers, ends = FORMS[form]
  inside = path.startswith('decoder/')
  is_kernel = path.endswith('/kernel') and '/router/' not in path
  if inside and is_kernel:
    return numbers + 4 * numbers // _inputs(path, shape, config) if layers else narrow * numbers
  if not inside and ends and path in ('logits_dense/kernel', 'token_embedder/embedding'):
    return numbers + 4 * numbers // config.embed_dim
  return 4 * numbers


def _inputs(path: str, shape: tuple[int, ...], config: ModelConfig) -> int:
  """Inputs of an output of a stacked kernel."""
  if path.endswith(('/wo/kernel', '/out/kernel')):
    return shape[-2]
  return config.embed_dim


def plan(
  config: ModelConfig,
  slots: int,
  max_length: int,
  *,
  dtype: str = 'float32',
  weights: str = 'float',
  offload: str = 'none',
  expert_budget: int | None = None,
) -> str:
  """A table of all forms, and which one was asked for.

  Args:
    max_length: tokens of a sequence.
    dtype, weights, offload, expert_budget: as of convert.open.load.
  """
  chosen = dtype if weights == 'float' else weights
  head = f'{"":14}{"experts":>10}{"other":>10}{"cache":>10}{"in all":>10}{"a token reads":>15}  GiB'
  lines = [head]
  for form in FORMS:
    found = need(config, form, slots, max_length)
    held, note = found.experts, ''
    if form == chosen and offload != 'none':
      held = 0 if offload == 'ram' else (expert_budget or found.experts // 4)
      note = f', of {found.experts / _GIB:.3f} GiB in {offload}'
    sizes = (held, found.others, found.cache, held + found.others + found.cache)
    columns = ''.join(f'{size / _GIB:10.3f}' for size in sizes)
    mark = f'  <- asked for{note}' if form == chosen else ''
    lines.append(f'{form:14}{columns}{found.read / _GIB:15.3f}{mark}')
  there = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  lines.append(f'{slots} slots of {max_length} tokens; this host has {there / _GIB:.1f} GiB')
  return '\n'.join(lines)
