"""The flags that make several processes one run; t5x's names."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping

from absl import flags

from openmoe.config import ConfigError
from openmoe.running.cluster import find_place
from openmoe.running.together import together, wait_for_slow_cpus
from scripts import gin_flags

_MULTI = flags.DEFINE_bool('multiprocess', False, 'One of several processes of a run.')
_MULTI_GPU = flags.DEFINE_bool('multiprocess_gpu', False, 'The same, as t5x calls it.')
_ADDRESS = flags.DEFINE_string(
  'coordinator_address',
  None,
  'HOST:PORT of process 0; found by itself on TPUs, SLURM, JobSet.',
)
_COUNT = flags.DEFINE_integer('process_count', None, 'Number of processes.')
_INDEX = flags.DEFINE_integer('process_index', None, 'Number of this process.')
_TIMEOUT = flags.DEFINE_integer('initialization_timeout', 300, 'Seconds to wait for the others.', 1)
_SILENCE = flags.DEFINE_integer(
  'liveness_timeout', 60, 'Seconds without a sign of life after which a process is given up.', 2
)


@contextlib.contextmanager
def joined(facts: Callable[[], Mapping[str, str]], directory: str) -> Iterator[None]:
  """Meets the other processes if there are any, and watches over them inside.

  Before the first use of a device.

  Args:
    facts: gives what must be the same in all.
    directory: that all must see.

  Raises:
    ConfigError: the processes differ; or something is said of others, and not that there are any.
    PeerLost: somebody did not come.
  """
  wait_for_slow_cpus()
  if not (_MULTI.value or _MULTI_GPU.value):
    for flag in (_ADDRESS, _COUNT, _INDEX):
      if flag.value is not None:
        raise ConfigError(
          f'--{flag.name}={flag.value} needs --multiprocess; without it this process would train '
          'alone.'
        )
    yield
    return
  place = find_place(_ADDRESS.value, _COUNT.value, _INDEX.value, timeout=_TIMEOUT.value)
  with together(place, facts(), directory, _TIMEOUT.value, _SILENCE.value):
    try:
      yield
    except BaseException as error:
      _failed.append(error)
      raise


_failed: list[BaseException] = []


def run(main: Callable[[], int | None], abandoned: Callable[[], object] = lambda: False) -> None:
  """gin_flags.run() for a script that joins others.

  Args:
    abandoned: whether a thread is left that would keep this process for ever.
  """
  try:
    gin_flags.run(main)
  except BaseException as end:
    if not _failed and not (isinstance(end, SystemExit) and abandoned()):
      raise
    # JAX would wait at the end for the others, who need not have met the error that ends this one.
    if not isinstance(end, SystemExit):
      traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError):
        stream.flush()
    os._exit(getattr(end, 'code', 1) if isinstance(getattr(end, 'code', 1), int) else 1)
