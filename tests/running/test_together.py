"""Real processes of JAX: whoever is lost in a collective operation is named by the others."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from openmoe.running.rollcall import PeerLost

ROOT = pathlib.Path(__file__).parents[2]
LOOP = """
import sys
from absl import flags
from scripts import processes
flags.FLAGS(['loop', '--multiprocess', '--process_count=2', '--liveness_timeout=4', *sys.argv[2:]])
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
def main():
  with processes.joined(lambda: {}, sys.argv[1]):
    mesh = jax.make_mesh((2,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.make_array_from_callback((2,), NamedSharding(mesh, P('x')), lambda i: jnp.ones((1,)))
    add = jax.jit(lambda x: x + x.sum(), out_shardings=NamedSharding(mesh, P('x')))
    for step in range(10**6):
      x = add(x) / 3
      x.block_until_ready()
      if step == 3:
        print('steps', flush=True)
        if jax.process_index() == 1 and '--raise' in sys.stdin.readline():
          raise OSError(5, 'no data')
main()
"""


@pytest.fixture
def two(tmp_path):
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{probe.getsockname()[1]}'
  environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=1'}
  own = lambda i: [f'--coordinator_address={address}', f'--process_index={i}']
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', LOOP, str(tmp_path), *own(index)],
      cwd=ROOT,
      env=environment,
      text=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    for index in range(2)
  ]
  for process in processes:
    said = iter(process.stdout.readline, '')  # gloo greets first
    assert 'steps\n' in said, process.stderr.read()
  yield processes
  for process in processes:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
      pipe.close()


@pytest.mark.parametrize(
  ('index', 'fault'),
  [(0, 'kill'), (1, 'kill'), (1, 'stop'), pytest.param(1, 'raise', marks=pytest.mark.slow)],
)
def test_a_lost_process_is_named(two, index, fault):
  processes, begin = two, time.monotonic()
  culprit, other = processes[index], processes[1 - index]
  if fault != 'raise':
    processes[1].stdin.write('go\n')
    processes[1].stdin.flush()
    culprit.send_signal(signal.SIGKILL if fault == 'kill' else signal.SIGSTOP)
  else:
    culprit.stdin.write('--raise\n')
    culprit.stdin.flush()
  other.wait(60)
  error = other.stderr.read()
  assert other.returncode == PeerLost.exit_code, error
  assert f'Process {index} of 2 ({os.uname().nodename}, pid {culprit.pid})' in error
  assert time.monotonic() - begin < 45
