"""What saves and agreements cost a run: python -m scripts.benchmarks.running [--run_dir=RUN]

With --run_dir: the share of its wall time, after compilation, in which the loop waited for saves.
Without: two processes of this machine train a small model, with the agreement on signals after
every step and without it by turns, and the median seconds of a step are printed for both.
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import itertools
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import time

from openmoe.observe import notes
from openmoe.observe.timeline import BACKGROUND, NAME

_TURNS, _STEPS = 8, 12


def blocked(run_dir: pathlib.Path) -> dict[str, float]:
  """Seconds by phase since the last compilation of a run; `save` is what blocked the loop."""
  lines = [notes.decode(line) for line in (run_dir / NAME).read_bytes().splitlines()]
  phases = [line for line in lines if line and line['kind'] not in BACKGROUND]
  last = max(i for i, line in enumerate(phases) if line['kind'] == 'compile')
  found: dict[str, float] = {}
  for now, then in itertools.pairwise(phases[last + 1 :]):
    found[now['kind']] = found.get(now['kind'], 0.0) + then['time'] - now['time']
  return found


def steps_of_one(index: int, address: str) -> None:
  """Trains in one of two processes; the first prints what a step takes."""
  import jax
  import jax.numpy as jnp
  from jax.sharding import NamedSharding, PartitionSpec

  from openmoe.running.signals import Signals

  jax.distributed.initialize(address, 2, index)
  mesh = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  place = NamedSharding(mesh, PartitionSpec('data'))
  weights = jax.device_put(jnp.eye(1024), NamedSharding(mesh, PartitionSpec()))
  x = jax.make_array_from_callback((512, 1024), place, lambda i: jnp.ones((256, 1024)))

  @jax.jit
  def step(w, x):
    gradient = jax.grad(lambda w: jnp.mean(jnp.tanh(jnp.tanh(x @ w) @ w) ** 2))(w)
    return w - 0.1 * gradient

  found: dict[bool, list[float]] = {True: [], False: []}
  with Signals(mesh) as signals:
    for turn in range(2 * _TURNS + 2):
      agreed, begin = turn % 2 == 0, time.perf_counter()
      for _ in range(_STEPS):
        weights = step(weights, x)
        if agreed:
          signals.stop_after_step()
      weights.block_until_ready()
      if turn > 1:  # the first two compile
        found[agreed].append((time.perf_counter() - begin) / _STEPS)
  if index == 0:
    with_it, without = (statistics.median(found[agreed]) for agreed in (True, False))
    print(
      f'a step takes {1e3 * with_it:.2f} ms with the agreement and {1e3 * without:.2f} ms without '
      f'({with_it / without - 1:+.1%}; medians of {_TURNS} turns of {_STEPS} steps)'
    )


@command.guarded
def main() -> None:
  parser = command.Parser(__doc__)
  parser.add_argument('--run_dir', type=pathlib.Path)
  parser.add_argument('--index', type=int, help='of one of the two processes; set by itself')
  parser.add_argument('--address')
  args = parser.parse_args()
  if args.index is not None:
    steps_of_one(args.index, args.address)
  elif args.run_dir:
    found = blocked(args.run_dir)
    total = sum(found.values())
    for phase, seconds in sorted(found.items()):
      print(f'{phase:12} {seconds:8.2f} s  {seconds / total:6.2%}')
  else:
    with socket.socket() as probe:
      probe.bind(('127.0.0.1', 0))
      address = f'127.0.0.1:{probe.getsockname()[1]}'
    more = {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_force_host_platform_device_count=1'}
    own = [sys.executable, '-m', 'scripts.benchmarks.running', f'--address={address}']
    start = lambda index: subprocess.Popen([*own, f'--index={index}'], env=os.environ | more)
    processes = [start(index) for index in range(2)]
    codes = [process.wait() for process in processes]
    if any(codes):
      raise SystemExit('One of the two processes failed.')


if __name__ == '__main__':
  sys.exit(main())
