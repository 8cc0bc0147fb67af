"""Hostile programs: each fails, nothing outside changes, and this process goes on.

A watchdog ends this test process if any of it hangs, whatever the sandbox does.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import signal
import socket
import threading
import time

import pytest

from openmoe.config import ConfigError
from tasks.evaluation import jail, sandbox

pytestmark = pytest.mark.skipif(
  not (jail.has_seccomp() and jail.landlock_version()),
  reason='needs Linux with seccomp and Landlock',
)
_SHORT = sandbox.Limits(seconds=2.0)
_ROOMY = sandbox.Limits(seconds=30.0)  # for programs that are to pass, on a busy machine


@pytest.fixture(autouse=True)
def _watchdog():
  timer = threading.Timer(120, os.kill, (os.getpid(), signal.SIGKILL))
  timer.daemon = True
  timer.start()
  yield
  timer.cancel()


def processes() -> int:
  return sum(name.isdigit() for name in os.listdir('/proc'))


def test_a_right_program_passes_and_a_wrong_one_does_not():
  ok = 'import math, collections, threading\nassert math.sqrt(4) == 2\nopen("a", "w").write("b")'
  assert sandbox.run(ok, _ROOMY) == sandbox.Outcome(True, 'passed')
  assert sandbox.run('assert 1 == 2, "no"', _ROOMY).reason == 'AssertionError: no'
  assert sandbox.run('def f(:', _ROOMY).reason.startswith('SyntaxError')


@pytest.mark.parametrize('source', ['import sys; sys.exit(0)', 'import os; os._exit(0)'])
def test_leaving_early_is_not_passing(source):
  assert not sandbox.run(source, _ROOMY).passed


def test_a_fork_bomb_makes_no_process():
  before = processes()
  bombs = (
    'import os\nwhile True:\n  try: os.fork()\n  except OSError: pass',
    'import os; os.fork()',
  )
  for source in (*bombs, 'import subprocess; subprocess.Popen(["sleep", "60"])'):
    outcome = sandbox.run(source, _SHORT)
    assert not outcome.passed
  assert processes() < before + 20


def test_an_endless_loop_is_stopped_in_time():
  begin = time.monotonic()
  assert sandbox.run('while True: pass', _SHORT) == sandbox.Outcome(False, 'timed out')
  ignoring = 'import signal\nfor n in range(1, 32):\n  try: signal.signal(n, signal.SIG_IGN)\n'
  assert not sandbox.run(f'{ignoring}  except OSError: pass\nwhile True: pass', _SHORT).passed
  assert time.monotonic() - begin < 30


@pytest.mark.parametrize(
  'source',
  [
    'x = bytearray(10 << 30)',
    'x = []\nwhile True: x.append(bytearray(1 << 20))',
    'import mmap; x = mmap.mmap(-1, 10 << 30)',
    'import os; os.memfd_create("x")',
  ],
)
def test_much_memory_is_refused(source):
  outcome = sandbox.run(source, _ROOMY)
  assert not outcome.passed
  assert outcome.reason.startswith(('MemoryError', 'OSError', 'PermissionError'))


def test_nothing_is_written_removed_or_changed_outside(tmp_path):
  kept = tmp_path / 'kept'
  kept.write_text('kept')
  mode = kept.stat().st_mode
  for source in (
    f'open({str(tmp_path / "new")!r}, "w")',
    f'open({str(kept)!r}, "a").write("x")',
    f'import os; os.truncate({str(kept)!r}, 0)',
    f'import os; os.unlink({str(kept)!r})',
    f'import os; os.rename({str(kept)!r}, "mine")',
    f'import os; os.chmod({str(kept)!r}, 0)',
    f'import os; os.mkdir({str(tmp_path / "folder")!r})',
    f'import os; os.symlink({str(kept)!r}, {str(tmp_path / "link")!r})',
    'open("/dev/shm/openmoe_test", "w")',
  ):
    assert sandbox.run(source, _ROOMY).reason.startswith('PermissionError'), source
  assert kept.read_text() == 'kept'
  assert kept.stat().st_mode == mode
  assert list(tmp_path.iterdir()) == [kept]
  assert not pathlib.Path('/dev/shm/openmoe_test').exists()


def test_its_own_directory_is_gone_afterwards_and_bounded():
  assert sandbox.run('import os\nassert os.getcwd() == os.environ["HOME"]', _ROOMY).passed
  big = 'open("x", "wb").write(bytes(64 << 20))'
  assert not sandbox.run(big, _ROOMY).passed
  many = 'i = 0\nwhile True:\n  open(str(i), "wb").write(bytes(4 << 20)); i += 1'
  assert sandbox.run(many, _ROOMY).reason == 'wrote too much'


def test_the_network_is_out_of_reach():
  server = socket.create_server(('127.0.0.1', 0))
  address = server.getsockname()
  for source in (
    f'import socket; socket.create_connection({address!r})',
    'import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)',
    f'import urllib.request; urllib.request.urlopen("http://127.0.0.1:{address[1]}")',
  ):
    assert not sandbox.run(source, _ROOMY).passed
  server.settimeout(0.1)
  with pytest.raises(TimeoutError):
    server.accept()


def test_other_processes_are_out_of_reach():
  assert 'PermissionError' in sandbox.run('import os; os.kill(os.getppid(), 9)', _ROOMY).reason
  assert 'PermissionError' in sandbox.run('import os; os.kill(-1, 9)', _ROOMY).reason


def test_many_run_side_by_side():
  sources = ['pass', 'assert False', 'pass', 'raise ValueError(3)'] * 3
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    outcomes = list(pool.map(lambda source: sandbox.run(source, _ROOMY), sources))
  assert [outcome.passed for outcome in outcomes] == [True, False, True, False] * 3


def test_pass_at_k_is_the_chance_of_a_draw():
  assert sandbox.pass_at_k(10, 0, 5) == 0
  assert sandbox.pass_at_k(10, 10, 1) == 1
  assert sandbox.pass_at_k(4, 1, 2) == pytest.approx(1 / 2)
  assert sandbox.pass_at_k(5, 2, 1) == pytest.approx(2 / 5)
  with pytest.raises(ConfigError, match='pass@10 needs at least 10 samples'):
    sandbox.pass_at_k(5, 2, 10)


def test_a_system_that_cannot_lock_in_runs_nothing(monkeypatch):
  monkeypatch.setattr(jail, 'landlock_version', lambda: 0)
  with pytest.raises(ConfigError, match='no Landlock'):
    sandbox.run('pass')
