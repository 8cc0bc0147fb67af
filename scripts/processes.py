"""The flags that make several processes one run."""

from __future__ import annotations

import jax
from absl import flags

_MULTI = flags.DEFINE_bool('multiprocess', False, 'One of several processes of a run.')
_ADDRESS = flags.DEFINE_string(
  'coordinator_address', None, 'host:port of process 0; found by itself on TPU VMs and SLURM.'
)
_COUNT = flags.DEFINE_integer('process_count', None, 'Number of processes.')
_INDEX = flags.DEFINE_integer('process_index', None, 'Number of this process.')


def join() -> None:
  """Meets the other processes if there are any; before the first use of a device."""
  if _MULTI.value:
    # Its handler would swallow SIGTERM until ours is there, and tell nobody.
    jax.config.update('jax_enable_preemption_service', False)
    jax.distributed.initialize(_ADDRESS.value, _COUNT.value, _INDEX.value)
