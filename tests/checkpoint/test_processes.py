"""Two processes write one checkpoint together; one process reads all of it."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from tests.checkpoint.case import abstract, assert_equal, checkpoints, make_state

ROOT = pathlib.Path(__file__).parents[2]
CODE = """
import sys
import jax
port, index, run, fault = sys.argv[1:]
jax.distributed.initialize(f'127.0.0.1:{port}', num_processes=2, process_id=int(index))
from openmoe.checkpoint import positions
from openmoe.checkpoint import manifest
from openmoe.checkpoint.checkpointer import Checkpointer, CheckpointError
from tests.checkpoint import case

read, sha256 = [], manifest._sha256
manifest._sha256 = lambda path: (read.append(str(path)), sha256(path))[1]
checkpointer = Checkpointer(run, 3, case.IDENTITY)
for step in (10, 20):
  state = case.make_state(step)
  checkpointer.save(step, state, {f'shard_{index}': b'at %d' % step}, {'processes': 2})
  checkpointer.wait()
owners = {name.split('ocdbt.process_')[1][0] for name in read if 'ocdbt.process_' in name}
print('read arrays of', sorted(owners), 'twice:', len(read) - len(set(read)))
jax.experimental.multihost_utils.sync_global_devices('written')
if fault == 'truncate' and index == '1':
  import os
  os.truncate(f'{run}/checkpoint_20/metadata/metadata', 3)
jax.experimental.multihost_utils.sync_global_devices('damaged')
fresh = Checkpointer(run, 3, case.IDENTITY, note=lambda text: print('note:', text))
step = fresh.latest_step()
restored, data, metadata = fresh.restore(step, case.abstract(state))
print('restored', step, int(restored.step), dict(data), metadata)
fresh.close()
checkpointer.close()
"""


@pytest.mark.parametrize('fault', ['none', 'truncate'])
def test_two_processes_write_and_one_reads(open_dir, tmp_path, fault):
  run = tmp_path / 'run'
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  # The same compiler flags: other optimisation levels round random numbers differently.
  flags = os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=4')
  env = {**os.environ, 'XLA_FLAGS': flags}
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', CODE, str(port), str(index), str(run), fault],
      cwd=ROOT,
      env=env,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    for index in range(2)
  ]
  outputs = [process.communicate(timeout=120) for process in processes]
  assert [p.returncode for p in processes] == [0, 0], outputs[0][1] + outputs[1][1]
  step = 20 if fault == 'none' else 10
  positions = {f'shard_{i}': f'at {step}'.encode() for i in range(2)}
  for index, (out, _) in enumerate(outputs):
    # The bytes of a save are digested by whoever wrote them.
    assert f"read arrays of ['{index}'] twice: 0" in out
    assert f'restored {step} {step} {positions} {{"processes": 2}}'.replace('"', "'") in out
    # Each process checks half of the files, and all hear of what one finds.
    assert ('checkpoint_20 is damaged' in out) == (fault == 'truncate')
  assert checkpoints(run) == ['checkpoint_10', 'checkpoint_20']
  alone = open_dir(run)
  assert alone.latest_step() == step
  state, data, _ = alone.restore(step, abstract(make_state()))
  assert_equal(state, make_state(step))
  assert dict(data) == positions
