"""Processes that are absent, differ or go away: who that is, and that nobody waits for ever."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from openmoe.config import ConfigError
from openmoe.running import cluster, rollcall
from openmoe.running.cluster import Place, find_place
from openmoe.running.rollcall import PeerLost, meet

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


# --- where the others are

SLURM = {'SLURM_JOB_ID': '4097', 'SLURM_NTASKS': '8', 'SLURM_PROCID': '3'}
JOBSET = {'JOBSET_NAME': 'run', 'REPLICATED_JOB_NAME': 'w', 'JOB_COMPLETION_INDEX': '2'}
JAX = {'JAX_COORDINATOR_ADDRESS': '10.0.0.1'}
PLACES = {
  'slurm': (SLURM | {'SLURM_STEP_NODELIST': 'gpu[03-10],x1'}, Place('gpu03:61441', 8, 3)),
  'slurm_one_node': (SLURM | {'SLURM_JOB_NODELIST': 'a'}, Place('a:61441', 8, 3)),
  'jobset': (JOBSET | {'JOB_PARALLELISM': '4'}, Place('run-w-0-0.run:8476', 4, 2)),
  'jobset_of_two_jobs': (
    JOBSET | {'JOB_PARALLELISM': '4', 'JOB_INDEX': '1', 'JOB_REPLICAS': '2'},
    Place('run-w-0-0.run:8476', 8, 6),
  ),
  'jax': (
    JAX | {'JAX_PROCESS_COUNT': '2', 'JAX_PROCESS_INDEX': '1'},
    Place('10.0.0.1:8476', 2, 1),
  ),
  'nodes': (JAX | {'NNODES': '4', 'NODE_RANK': '0'}, Place('10.0.0.1:8476', 4, 0)),
}


@pytest.mark.parametrize('name', PLACES)
def test_a_launcher_is_recognised(name):
  environment, expected = PLACES[name]
  found = find_place(environment=environment)
  assert (found.address, found.count, found.index) == (
    expected.address,
    expected.count,
    expected.index,
  )
  assert find_place(index=1, environment=environment).index == 1


def test_a_tpu_vm_is_recognised(monkeypatch):
  """GKE's variables as JAX reads them."""
  from jax._src.clusters import cloud_tpu_cluster

  monkeypatch.setattr(cloud_tpu_cluster, 'running_in_cloud_tpu_vm', True)
  for name, value in {
    'TPU_WORKER_HOSTNAMES': 'localhost,other',
    'TPU_WORKER_ID': '1',
    'TPU_SKIP_MDS_QUERY': '1',
    'MEGASCALE_COORDINATOR_ADDRESS': 'localhost',
    'MEGASCALE_NUM_SLICES': '2',
    'MEGASCALE_SLICE_ID': '1',
  }.items():
    monkeypatch.setenv(name, value)
  found = find_place(environment=os.environ | JOBSET)
  assert (found.address, found.count, found.index) == ('localhost:8482', 4, 3)


WRONG = [
  ({}, 'nothing here says'),
  (SLURM | {'SLURM_STEP_NODELIST': 'a', 'SLURM_PROCID': 'x'}, "SLURM_PROCID='x' must be"),
  (SLURM | {'SLURM_STEP_NODELIST': 'a', 'SLURM_PROCID': '8'}, 'process 8 of 8'),
  (JOBSET, 'JOB_PARALLELISM does not say'),
  (JAX | {'NNODES': '2', 'NODE_RANK': '0', 'JAX_COORDINATOR_ADDRESS': 'a:b'}, 'no HOST:PORT'),
]


@pytest.mark.parametrize(('environment', 'message'), WRONG)
def test_what_a_launcher_says_wrongly_is_refused(monkeypatch, environment, message):
  monkeypatch.setattr(cluster, '_of_jax', lambda timeout: None)
  with pytest.raises(ConfigError, match=message):
    find_place(environment=environment)


# --- the roll call


def roll_call(port, tmp_path, facts=({}, {}), dirs=None, places=None, timeout=5.0):
  """What two processes, here threads, get of the roll call: peers or errors."""
  address = f'127.0.0.1:{port}'
  places = places or [Place(address, 2, 0), Place(address, 2, 1)]
  found = [None] * len(places)

  def call(number):
    where = str((dirs or [tmp_path] * len(places))[number])
    try:
      found[number] = meet(places[number], facts[min(number, 1)], where, timeout)
    except (ConfigError, PeerLost) as error:
      found[number] = error

  threads = [threading.Thread(target=call, args=(i,)) for i in range(len(places))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  return found


def close(found):
  for peers in found:
    for peer in peers if isinstance(peers, list) else ():
      peer.line.close()


def test_all_meet_and_leave_nothing_behind(port, tmp_path):
  found = roll_call(port, tmp_path, facts=({'run.seed': '0'}, {'run.seed': '0'}))
  assert [[peer.index for peer in peers] for peers in found] == [[1], [0]]
  assert not list(tmp_path.iterdir())
  close(found)


@pytest.mark.parametrize(
  'name',
  [
    *('run.seed', 'optimizer.learning_rate', 'data.seed', 'data.batch_size', 'run.total_steps'),
    *('run.checkpoint_period', 'run.eval_period', 'run.model_dir', 'data file a.jsonl'),
    *('model.moe.capacity_factor', 'code of openmoe/losses.py', 'version of jax'),
  ],
)
def test_a_difference_is_refused_in_all_with_its_words(port, tmp_path, name):
  same = {'model.name': "'tiny'"}
  found = roll_call(port, tmp_path, facts=(same | {name: '1'}, same | {name: '2'}))
  for error in found:
    assert isinstance(error, ConfigError)
    assert f'{name} is 1 in process 0' in str(error)
    assert 'and 2 in process 1' in str(error)
    assert 'model.name' not in str(error)


def test_a_directory_that_is_not_shared_is_told_as_such(port, tmp_path, monkeypatch):
  monkeypatch.setattr(rollcall, '_SEEN_WITHIN', 0.5)
  for error in roll_call(port, tmp_path, dirs=[tmp_path / 'a', tmp_path / 'b']):
    assert isinstance(error, ConfigError)
    assert 'MODEL_DIR is not shared' in str(error)
    assert 'Process 1' in str(error)


def test_one_that_never_starts_is_named(port, tmp_path):
  address = f'127.0.0.1:{port}'
  places = [Place(address, 3, 0), Place(address, 3, 2)]
  found = roll_call(port, tmp_path, places=places, timeout=1.0)
  for error in found:
    assert isinstance(error, PeerLost)
    assert 'Of 3 processes, 1 did not call in within 1 s' in str(error)
    assert f'process 2 ({os.uname().nodename}' in str(error)


def test_an_absent_coordinator_is_named(port, tmp_path):
  with pytest.raises(PeerLost, match=f'Process 0 of 2 did not answer at 127.0.0.1:{port}'):
    meet(Place(f'127.0.0.1:{port}', 2, 1), {}, str(tmp_path), 0.5)


def test_wrong_numbers_are_refused(port, tmp_path):
  address = f'127.0.0.1:{port}'
  counts = [Place(address, 2, 0), Place(address, 3, 1)]
  for error in roll_call(port, tmp_path, places=counts):
    assert 'says it is 1 of 3, and process 0 that there are 2' in str(error)
  twice = [Place(address, 3, 0), Place(address, 3, 1), Place(address, 3, 1)]
  found = [str(error) for error in roll_call(port, tmp_path, places=twice)]
  assert all('the same' in text and 'index' in text for text in found)


def test_a_stranger_does_not_disturb(port, tmp_path):
  def stranger():
    time.sleep(0.3)
    with socket.create_connection(('127.0.0.1', port)) as connection:
      connection.sendall(b'GET / HTTP/1.1\r\n\r\n{"index": "x"}\n')

  thread = threading.Thread(target=stranger)
  thread.start()
  address = f'127.0.0.1:{port}'
  places = [Place(address, 3, i) for i in range(2)]
  found = roll_call(port, tmp_path, places=places, timeout=1.5)
  thread.join()
  assert 'Of 3 processes, 2 did not call in' in str(found[0])


def test_a_taken_port_is_told(port, tmp_path):
  with socket.create_server(('', port)), pytest.raises(ConfigError, match='another program has it'):
    meet(Place(f'127.0.0.1:{port}', 2, 0), {}, str(tmp_path), 1.0)


# --- real processes

PROCESS = """
import sys, time
from openmoe.running.cluster import Place
from openmoe.running.peers import Peers
from openmoe.running.rollcall import meet
port, index, run, seconds = sys.argv[1:]
place = Place(f'127.0.0.1:{port}', 3, int(index))
with Peers(meet(place, {}, run, 60), place.index, 3, timeout=3):
  print('met', flush=True)
  line = sys.stdin.readline()
  if line == 'fail\\n':
    raise ValueError('the disk is gone')
"""


@pytest.fixture
def three(port, tmp_path):
  """Three processes that have met and wait for a line of input."""
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', PROCESS, str(port), str(index), str(tmp_path), '0'],
      cwd=ROOT,
      text=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    for index in range(3)
  ]
  for process in processes:
    assert process.stdout.readline() == 'met\n', process.stderr.read()
  yield processes
  for process in processes:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
      pipe.close()


def say(process, text: str) -> None:
  process.stdin.write(text)
  process.stdin.flush()


@pytest.mark.parametrize('index', [0, 2])
@pytest.mark.parametrize(
  ('fault', 'words'),
  [
    ('kill', 'has gone without a word: it was killed'),
    ('stop', 'has not answered for'),
    ('fail', 'ended: the disk is gone'),
  ],
)
def test_one_that_goes_away_is_named_and_all_end(three, index, fault, words):
  culprit = three[index]
  begin = time.monotonic()
  if fault == 'fail':
    say(culprit, 'fail\n')
  else:
    culprit.send_signal({'kill': signal.SIGKILL, 'stop': signal.SIGSTOP}[fault])
  for process in three:
    if process is culprit:
      continue
    process.wait(40)  # communicate() would end it by closing its input
    error = process.stderr.read()
    assert process.returncode == PeerLost.exit_code, error
    assert f'Process {index} of 3 ({os.uname().nodename}, pid {culprit.pid}) {words}' in error
    assert len(error.strip().splitlines()) == 1
  assert time.monotonic() - begin < 30


def test_those_that_end_well_alarm_nobody(three):
  for process in (three[1], three[0], three[2]):
    say(process, 'done\n')
    process.wait(40)
    assert (process.returncode, process.stderr.read()) == (0, '')
