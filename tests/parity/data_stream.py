"""Is the global batch the same on any number of hosts, and after a kill?

  python -m tests.parity.data_stream --hosts 1,2,4 --kill_at 7 --steps 40 --json

For every number of hosts, real processes read their shards of one mixture, write down a digest of
every batch, and save their position every few steps. A second set of processes is killed (SIGKILL)
in the middle of step kill_at, and what was saved is continued by the next number of hosts in the
list. `mismatches` counts the batches whose digest differs between any two of all these runs.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
MIXTURE = 'parity_mix'
FIELDS = ('inputs', 'targets', 'loss_weights', 'segment_ids', 'positions')


def arguments(argv=None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--hosts', default='1,2,4')
  parser.add_argument('--kill_at', type=int, default=7)
  parser.add_argument('--steps', type=int, default=40)
  parser.add_argument('--save_every', type=int, default=3)
  parser.add_argument('--num_shards', type=int, help='default: 4, or more where hosts divide no 4')
  parser.add_argument('--rows_per_shard', type=int, default=2)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--json', action='store_true')
  # What follows is for the processes that this one starts.
  parser.add_argument('--worker', type=int, help=argparse.SUPPRESS)
  parser.add_argument('--count', type=int, help=argparse.SUPPRESS)
  parser.add_argument('--folder', help=argparse.SUPPRESS)
  parser.add_argument('--run', help=argparse.SUPPRESS)
  parser.add_argument('--die', action='store_true', help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  try:
    hosts = [int(count) for count in args.hosts.split(',')]
  except ValueError:
    parser.error(f'--hosts={args.hosts}: numbers of hosts with commas between, such as 1,2,4.')
  if min(hosts) < 1:
    parser.error(f'--hosts={args.hosts}: a run has at least 1 host.')
  args.num_shards = args.num_shards or math.lcm(4, *hosts)
  if wrong := [count for count in hosts if args.num_shards % count]:
    parser.error(
      f'--num_shards={args.num_shards} is not a multiple of {wrong[0]} hosts: every host owns the '
      'same number of logical shards.'
    )
  return args


def saved_steps(folder: pathlib.Path, num_shards: int) -> list[int]:
  """Steps at which every shard's position was saved whole."""
  counts = collections.Counter(int(p.name.split('.')[0]) for p in folder.glob('*.position'))
  return sorted(step for step, count in counts.items() if count == num_shards)


def work(args: argparse.Namespace) -> None:
  """One host of one run: reads, writes digests, saves, and may die."""
  import seqio

  from openmoe.config import DataConfig
  from openmoe.data.shard import shard_name
  from openmoe.data.stream import ShardedStream
  from tests.data import case

  corpora = pathlib.Path(args.folder) / 'corpora'
  for name in ('parity_a', 'parity_b'):
    case.add_corpus(corpora, name)
  seqio.MixtureRegistry.add(MIXTURE, [('parity_a_ul2', 0.7), ('parity_b_ul2', 0.3)])
  config = DataConfig(
    MIXTURE,
    {'inputs': 64, 'targets': 64},
    args.num_shards * args.rows_per_shard,
    seed=args.seed,
    num_shards=args.num_shards,
  )
  each = args.num_shards // args.count  # contiguous, as hosts own the rows of the global batch
  shards = range(args.worker * each, (args.worker + 1) * each)
  folder = pathlib.Path(args.folder) / args.run
  with (
    ShardedStream(config, shards) as stream,
    open(folder / f'digests-{args.worker}-of-{args.count}-{os.getpid()}', 'w') as out,
  ):
    start = max(saved_steps(folder, args.num_shards), default=0)
    if start:
      names = [shard_name(s, args.num_shards) for s in range(args.num_shards)]
      stream.restore({n: (folder / f'{start}.{n}.position').read_bytes() for n in names})
    for step in range(start, args.steps):
      batch = next(stream)
      for index, shard in enumerate(shards):
        rows = slice(index * args.rows_per_shard, (index + 1) * args.rows_per_shard)
        digest = hashlib.sha256()
        for field in FIELDS:
          digest.update(getattr(batch, field)[rows].tobytes())
        out.write(f'{step} {shard} {digest.hexdigest()}\n')
      out.flush()
      if args.die and step == args.kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
      if (step + 1) % args.save_every == 0:
        for name, content in stream.state().items():
          temporary = folder / f'{name}.writing-{os.getpid()}'
          temporary.write_bytes(content)
          temporary.rename(folder / f'{step + 1}.{name}.position')


def start_hosts(args: argparse.Namespace, folder: str, run: str, count: int, die=False) -> None:
  """Runs the hosts of a run together and waits for them.

  Raises:
    RuntimeError: one ended otherwise than expected.
  """
  command = [sys.executable, '-m', 'tests.parity.data_stream', '--folder', folder, '--run', run]
  for name in ('kill_at', 'steps', 'save_every', 'num_shards', 'rows_per_shard', 'seed'):
    command += [f'--{name}', str(getattr(args, name))]
  hosts = [
    subprocess.Popen(
      [*command, '--worker', str(i), '--count', str(count), *(['--die'] if die else [])],
      cwd=ROOT,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(count)
  ]
  for host in hosts:
    _, errors = host.communicate()
    if host.returncode != (-signal.SIGKILL if die else 0):
      raise RuntimeError(f'A host of {run} ended with {host.returncode}: {errors[-3000:]}')


def batch_digests(folder: pathlib.Path, num_shards: int) -> dict[int, set[str]]:
  """All digests seen of each batch of a run; a step read twice, before and after a kill, counts."""
  found: dict[int, dict[int, set[str]]] = collections.defaultdict(dict)
  for path in folder.glob('digests-*'):
    for line in path.read_text().splitlines():
      step, shard, digest = line.split()
      found[int(step)].setdefault(int(shard), set()).add(digest)
  whole: dict[int, set[str]] = {}
  for step, shards in found.items():
    if len(shards) < num_shards:
      whole[step] = {'incomplete'}
    elif all(len(seen) == 1 for seen in shards.values()):
      text = ''.join(next(iter(shards[s])) for s in range(num_shards))
      whole[step] = {hashlib.sha256(text.encode()).hexdigest()}
    else:
      whole[step] = {'differs after the restart'}
  return whole


def compare(args: argparse.Namespace) -> dict[str, object]:
  """Makes all runs and counts the batches that differ."""
  from tests.data import case

  hosts = [int(h) for h in args.hosts.split(',')]
  runs = {}
  with tempfile.TemporaryDirectory(prefix='openmoe-parity-') as folder:
    corpora = pathlib.Path(folder) / 'corpora'
    corpora.mkdir()
    for name in ('parity_a', 'parity_b'):
      case.write_corpus(corpora, name)
    for index, count in enumerate(hosts):
      for killed in (False, True):
        run = f'{count}-{"killed" if killed else "whole"}'
        (pathlib.Path(folder) / run).mkdir()
        if killed:
          start_hosts(args, folder, run, count, die=True)
          start_hosts(args, folder, run, hosts[(index + 1) % len(hosts)])
        else:
          start_hosts(args, folder, run, count)
        runs[run] = batch_digests(pathlib.Path(folder) / run, args.num_shards)
  mismatches = 0
  for step in range(args.steps):
    seen = [run.get(step, {'missing'}) for run in runs.values()]
    mismatches += len(set.union(*seen)) != 1
  distinct = set().union(*(next(iter(runs.values())).values()))
  return {
    'mismatches': mismatches,
    'batches': args.steps,
    'distinct_batches': len(distinct),
    'runs': sorted(runs),
    'killed_at': args.kill_at,
  }


def main(argv=None) -> int:
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  args = arguments(argv)
  if args.worker is not None:
    work(args)
    return 0
  result = compare(args)
  if args.json:
    print(json.dumps(result))
  else:
    for name, value in result.items():
      print(f'{name}: {value}')
  return 0 if not result['mismatches'] and result['distinct_batches'] == args.steps else 1


if __name__ == '__main__':
  sys.exit(main())
