"""Several processes become one run: roll call, watch, and JAX's own meeting."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

import jax

from openmoe.running import rollcall
from openmoe.running.cluster import Place
from openmoe.running.peers import Peers

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


@contextlib.contextmanager
def together(
  place: Place, facts: Mapping[str, str], directory: str, timeout: int, silence: int
) -> Iterator[None]:
  """One of several processes, each of which ends when another is lost.

  Args:
    facts: what must be the same in all.
    directory: that all must see.
    timeout: seconds that the others are waited for.
    silence: seconds without a sign of life after which a process is given up.

  Raises:
    ConfigError: the processes differ.
    PeerLost: somebody did not come.
  """
  others = rollcall.meet(place, facts, directory, timeout)
  # Its handler would swallow SIGTERM until ours is there, and tell nobody.
  jax.config.update('jax_enable_preemption_service', False)
  with Peers(others, place.index, place.count, silence):
    jax.distributed.initialize(
      place.address,
      place.count,
      place.index,
      initialization_timeout=timeout,
      heartbeat_timeout_seconds=max(100, 3 * silence),
    )
    yield
