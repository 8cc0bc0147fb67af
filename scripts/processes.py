"""The flags that make several processes one run; t5x's names."""

from __future__ import annotations

import os

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

# In one process, and between processes.
_COLLECTIVE_TIMEOUTS = (
  'xla_cpu_collective_call_terminate_timeout_seconds',
  'xla_cpu_collective_timeout_seconds',
)
_SLOWEST = 600  # seconds


def wait_for_slow_cpus() -> None:
  """Lets simulated devices wait for one another longer than XLA does, which aborts after 40 s.

  Several devices share a core there, and a busy machine runs them one after the other. Before the
  first use of a device; what XLA_FLAGS says already stays.
  """
  given = os.environ.get('XLA_FLAGS', '')
  simulated = 'xla_force_host_platform_device_count' in given
  if not simulated and os.environ.get('JAX_PLATFORMS') != 'cpu':
    return
  for flag in _COLLECTIVE_TIMEOUTS:
    if flag not in given:
      given = f'{given} --{flag}={_SLOWEST}'
  os.environ['XLA_FLAGS'] = given.strip()


def join() -> None:
  """Meets the other processes if there are any; before the first use of a device.

  Raises:
    ConfigError: something is said of other processes, and not that there are any.
  """
  wait_for_slow_cpus()
  if _MULTI.value or _MULTI_GPU.value:
    # Its handler would swallow SIGTERM until ours is there, and tell nobody.
    jax.config.update('jax_enable_preemption_service', False)
    place = (_ADDRESS.value, _COUNT.value, _INDEX.value)
    jax.distributed.initialize(*place, initialization_timeout=_TIMEOUT.value)
    return
  for flag in (_ADDRESS, _COUNT, _INDEX):
    if flag.value is not None:
      raise ConfigError(
        f'--{flag.name}={flag.value} needs --multiprocess; without it this process would train '
        'alone.'
      )
