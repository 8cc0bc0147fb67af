"""The flags that make several processes one run; t5x's names."""

from __future__ import annotations

import jax
from absl import flags

from openmoe.config import ConfigError

_MULTI = flags.DEFINE_bool('multiprocess', False, 'One of several processes of a run.')
_MULTI_GPU = flags.DEFINE_bool('multiprocess_gpu', False, 'The same, as t5x calls it.')
_ADDRESS = flags.DEFINE_string(
  'coordinator_address', None, 'host:port of process 0; found by itself on TPU VMs and SLURM.'
)
_COUNT = flags.DEFINE_integer('process_count', None, 'Number of processes.')
_INDEX = flags.DEFINE_integer('process_index', None, 'Number of this process.')
_TIMEOUT = flags.DEFINE_integer('initialization_timeout', 300, 'Seconds to wait for the others.')


def join() -> None:
  """Meets the other processes if there are any; before the first use of a device.

  Raises:
    ConfigError: something is said of other processes, and not that there are any.
  """
  if _MULTI.value or _MULTI_GPU.value:
    place = (_ADDRESS.value, _COUNT.value, _INDEX.value)
    jax.distributed.initialize(*place, initialization_timeout=_TIMEOUT.value)
    return
  for flag in (_ADDRESS, _COUNT, _INDEX):
    if flag.value is not None:
      raise ConfigError(
        f'--{flag.name}={flag.value} needs --multiprocess; without it this process would train '
        'alone.'
      )
