"""Two runs on one directory: the second is refused, a dead one's successor is not."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from openmoe.config import ConfigError
from openmoe.running import lease as lease_lib
from openmoe.running.lease import NAME, DirectoryInUse, Lease

HOLDS = """
import sys, time
from openmoe.running.lease import Lease
with Lease(sys.argv[1], beat=0.1):
  print('held', flush=True)
  time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
  """A process of its own that has the lease of tmp_path."""
  process = subprocess.Popen(
    [sys.executable, '-c', HOLDS, tmp_path], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == 'held\n'
  yield process
  process.kill()
  process.wait()
  process.stdout.close()


def elsewhere(monkeypatch):
  """Makes owners be on another machine: they can only be watched."""
  monkeypatch.setattr(lease_lib, '_machine', lambda: 'another machine')


def test_the_second_is_refused_and_told_by_whom(tmp_path, holder):
  with pytest.raises(DirectoryInUse, match=f'process {holder.pid} on .* trains there'):
    Lease(tmp_path).__enter__()
  assert (tmp_path / NAME).exists()


def test_one_on_another_machine_is_watched(tmp_path, holder, monkeypatch):
  elsewhere(monkeypatch)
  with pytest.raises(DirectoryInUse, match=f'process {holder.pid}'):
    Lease(tmp_path, beat=0.5).__enter__()
  holder.send_signal(signal.SIGKILL)
  said = []
  with Lease(tmp_path, beat=0.1, note=said.append) as mine:
    mine.check()
  assert [f'process {holder.pid}' in text for text in said] == [True, True]
  assert 'still counts' in said[0]
  assert 'Took over' in said[1]
  assert not list(tmp_path.iterdir())


def test_a_killed_one_on_this_machine_is_succeeded_at_once(tmp_path, holder):
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  begin = time.monotonic()
  with Lease(tmp_path, beat=60.0, note=lambda text: None):
    assert time.monotonic() - begin < 5


def test_a_stopped_owner_that_was_succeeded_ends(tmp_path, monkeypatch):
  first = Lease(tmp_path, beat=0.05)
  with first:
    other = dataclasses.replace(lease_lib._this_process(), pid=7, host='there')
    (tmp_path / NAME).write_bytes(first._encoded(other))
    first._thread.join(timeout=10)
    with pytest.raises(DirectoryInUse, match='taken over by process 7 on there'):
      first.check()
  assert b'"pid": 7' in (tmp_path / NAME).read_bytes()  # not ours to remove


def test_of_many_successors_one_has_it(tmp_path):
  dead = dataclasses.replace(lease_lib._this_process(), began=1)
  (tmp_path / NAME).write_bytes(Lease(tmp_path)._encoded(dead))
  together, results = threading.Barrier(8), []

  def succeed():
    together.wait()
    lease = Lease(tmp_path, note=lambda text: None)
    try:
      lease._take()
      results.append(lease)
    except DirectoryInUse:
      results.append(None)

  threads = [threading.Thread(target=succeed) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sum(lease is not None for lease in results) == 1
  assert [p.name for p in tmp_path.iterdir()] == [NAME]


def test_an_object_store_lets_the_last_writer_have_it(tmp_path, monkeypatch):
  monkeypatch.setattr(lease_lib, 'is_remote', lambda path: True)
  other = dataclasses.replace(lease_lib._this_process(), key='theirs', pid=9)
  mine = Lease(tmp_path, beat=0.1)

  def meets_another(seconds):
    (tmp_path / NAME).write_bytes(mine._encoded(other))

  with monkeypatch.context() as patch:
    patch.setattr(lease_lib.time, 'sleep', meets_another)
    with pytest.raises(DirectoryInUse, match='process 9'):
      mine.__enter__()


def test_a_lease_that_a_kill_has_cut_is_succeeded(tmp_path):
  (tmp_path / NAME).write_bytes(b'')
  with Lease(tmp_path, beat=0.05, note=lambda text: None):
    assert (tmp_path / NAME).stat().st_size == lease_lib._SIZE


def test_counting_needs_no_room(tmp_path, monkeypatch):
  with Lease(tmp_path, beat=0.05) as lease:
    monkeypatch.setattr(lease_lib, 'write_whole', None)  # would take room on a full disk
    before = os.stat(tmp_path / NAME)
    deadline = time.monotonic() + 10
    while b'"count": 0' in (tmp_path / NAME).read_bytes() and time.monotonic() < deadline:
      time.sleep(0.01)
    assert os.stat(tmp_path / NAME).st_ino == before.st_ino
    assert lease._read().count > 0


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ConfigError, match='Set MODEL_DIR'):
    Lease(tmp_path / 'file' / 'run').__enter__()
