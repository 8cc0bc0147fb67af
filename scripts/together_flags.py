"""The flags that make several processes one program, for scripts of inference; t5x's names.

Training and evaluation have the same flags from scripts/processes.py.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

from openmoe.config import ConfigError
from openmoe.running.cluster import find_place
from openmoe.running.together import together, wait_for_slow_cpus

_NAMES = ('coordinator_address', 'process_count', 'process_index')


def add(parser: argparse.ArgumentParser) -> None:
  """Adds them."""
  parser.add_argument('--multiprocess', action='store_true', help='one of several processes')
  parser.add_argument('--coordinator_address', help='HOST:PORT of process 0')
  parser.add_argument('--process_count', type=int, help='number of processes')
  parser.add_argument('--process_index', type=int, help='number of this process')


@contextlib.contextmanager
def joined(args: argparse.Namespace, directory: str) -> Iterator[None]:
  """Meets the other processes if there are any, and watches over them inside.

  Before the first use of a device. All flags but the index must be the same in all.

  Args:
    directory: that all must see.

  Raises:
    ConfigError: the processes differ; or something is said of others, and not that there are any.
    PeerLost: somebody did not come.
  """
  wait_for_slow_cpus()
  if not args.multiprocess:
    for name in _NAMES:
      if getattr(args, name) is not None:
        raise ConfigError(f'--{name}={getattr(args, name)} needs --multiprocess.')
    yield
    return
  facts = {name: repr(value) for name, value in vars(args).items() if name not in _NAMES}
  place = find_place(*(getattr(args, name) for name in _NAMES), timeout=300)
  with together(place, facts, directory, 300, 60):
    yield
