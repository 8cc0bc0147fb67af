"""Hostile programs: each fails, nothing outside changes, and this process goes on."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import platform
import signal
import socket
import subprocess
import sys
import time

import pytest

from openmoe.config import ConfigError
from tasks.evaluation import jail, sandbox

pytestmark = pytest.mark.skipif(
  not (jail.has_seccomp() and jail.landlock_version()),
  reason='needs Linux with seccomp and Landlock',
)
_SHORT = sandbox.Limits(seconds=1.0)
_ROOMY = sandbox.Limits(seconds=30.0)  # for programs that are to pass, on a busy machine
_ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _watchdog():
  """A test that hangs fails, whatever the sandbox does."""

  def stop(*_):
    raise TimeoutError('the sandbox hangs')

  before = signal.signal(signal.SIGALRM, stop)
  signal.alarm(120)
  yield
  signal.alarm(0)
  signal.signal(signal.SIGALRM, before)


@pytest.fixture
def victim():
  """A process of this user that any signal ends."""
  with subprocess.Popen(['sleep', '600']) as process:
    yield process
    process.kill()


def not_refused(sources: list[str]) -> str:
  """Those of some programs that the system lets do what they want; run in one."""
  program = (
    f'import errno\nallowed = []\nfor source in {sources!r}:\n'
    '  try: exec(source)\n  except OSError as error:\n'
    '    if error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS): continue\n'
    '  allowed.append(source)\nraise Exception(allowed)\n'
  )
  return sandbox.run(program, _ROOMY).reason


def call(numbers: tuple[int, int], *args: str) -> str:
  """A program that makes a system call by number, and raises what it is refused with."""
  number = numbers[platform.machine() == 'aarch64']
  return (
    'import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n'
    f'if libc.syscall({", ".join([str(number), *args])}) < 0:\n'
    '  raise OSError(ctypes.get_errno(), "refused")\n'
  )


def test_a_right_program_passes_and_a_wrong_one_does_not():
  ok = 'import math, collections, threading\nassert math.sqrt(4) == 2\nopen("/dev/null", "w")'
  assert sandbox.run(ok, _ROOMY) == sandbox.Outcome(True, 'passed')
  assert sandbox.run('assert 1 == 2, "no"', _ROOMY).reason == 'AssertionError: no'
  assert sandbox.run('def f(:', _ROOMY).reason.startswith('SyntaxError')


@pytest.mark.parametrize('source', ['import sys; sys.exit(0)', 'import os; os._exit(0)'])
def test_leaving_early_is_not_passing(source):
  assert not sandbox.run(source, _ROOMY).passed


def test_libraries_are_there():
  source = (
    'import bisect, datetime, decimal, hashlib, heapq, itertools, json, random, re, statistics\n'
    'import typing, zoneinfo\nimport numpy as np\n'
    'assert hashlib.md5(b"a").hexdigest()[:4] == "0cc1"\n'
    'assert int(np.arange(4).sum()) == 6\nexit\n'
  )
  assert sandbox.run(source, _ROOMY) == sandbox.Outcome(True, 'passed')


def test_no_process_is_made_and_few_threads():
  bombs = [
    'import os; os.fork()',
    'import os; os.posix_spawn("/bin/true", ["true"], {})',
    'import os; os.execv("/bin/true", ["true"])',
    'import subprocess; subprocess.Popen(["sleep", "60"])',
    call((56, 220), '17', '0', '0', '0', '0'),
    call((435, 435), '0', '0'),
  ]
  assert not_refused(bombs) == 'Exception: []'
  threads = (
    'import threading, time\nthreading.stack_size(32768)\n'
    'while True: threading.Thread(target=time.sleep, args=(99,)).start()'
  )
  assert sandbox.run(threads, _ROOMY).reason == "RuntimeError: can't start new thread"


def test_an_endless_program_is_stopped_in_time():
  begin = time.monotonic()
  assert sandbox.run('while True: pass', _SHORT) == sandbox.Outcome(False, 'timed out')
  ignoring = 'import signal\nfor n in range(1, 32):\n  try: signal.signal(n, signal.SIG_IGN)\n'
  assert not sandbox.run(f'{ignoring}  except OSError: pass\nwhile True: pass', _SHORT).passed
  stopped = 'import signal; signal.raise_signal(signal.SIGSTOP)'
  assert sandbox.run(stopped, _SHORT) == sandbox.Outcome(False, 'timed out')
  assert sandbox.run('', _SHORT, tests='while True: pass').reason == 'timed out'
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


def test_floods_of_output_are_nothing():
  source = 'import sys\nfor _ in range(2000): sys.stdout.write("x" * 50000)\nassert True'
  assert sandbox.run(source, _ROOMY).passed
  assert (
    'more than 64 MiB' in sandbox.run('f = lambda: "x" * (70 << 20)\nassert f()', _ROOMY).reason
  )


def test_no_file_is_made_written_removed_or_changed(tmp_path):
  kept = tmp_path / 'kept'
  kept.write_text('kept')
  before = kept.stat()
  path = repr(str(kept))
  attempts = [
    f'open({str(tmp_path / "new")!r}, "w")',
    f'open({path}, "a").write("x")',
    f'import os; os.truncate({path}, 0)',
    f'import os; os.open({path}, os.O_RDONLY | os.O_TRUNC)',
    f'import os; os.unlink({path})',
    f'import os; os.rename({path}, "mine")',
    f'import os; os.link({path}, "mine")',
    f'import os; os.chmod({path}, 0)',
    f'import os; os.chown({path}, 1, 1)',
    f'import os; os.utime({path}, (1, 1))',
    f'import os; os.setxattr({path}, "user.a", b"1")',
    f'import os; os.mkdir({str(tmp_path / "folder")!r})',
    f'import os; os.symlink({path}, {str(tmp_path / "link")!r})',
    f'import os; os.open({str(tmp_path)!r}, os.O_TMPFILE | os.O_RDWR)',
    'import os; os.mkdir("deep")',
    'open("here", "w")',
    'open("/dev/shm/openmoe_test", "w")',
  ]
  assert not_refused(attempts) == 'Exception: []'
  after = kept.stat()
  assert kept.read_text() == 'kept'
  assert (after.st_mode, after.st_mtime, after.st_nlink) == (before.st_mode, before.st_mtime, 1)
  assert list(tmp_path.iterdir()) == [kept]


def test_private_files_are_not_read(tmp_path):
  (tmp_path / 'id_rsa').write_text('secret')
  files = (tmp_path / 'id_rsa', __file__, '/etc/passwd', '/proc/self/environ', '/proc/1/stat')
  folders = (tmp_path, pathlib.Path.home(), _ROOT, '/proc/self/fd', '/')
  attempts = [f'open({str(path)!r}).read()' for path in files]
  attempts += [f'import os; os.listdir({str(path)!r})' for path in folders]
  assert not_refused(attempts) == 'Exception: []'


def test_the_network_is_out_of_reach():
  server = socket.create_server(('127.0.0.1', 0))
  address = server.getsockname()
  for source in (
    f'import socket; socket.create_connection({address!r})',
    'import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)',
    'import socket; socket.socketpair()',
    f'import urllib.request; urllib.request.urlopen("http://127.0.0.1:{address[1]}")',
  ):
    assert not sandbox.run(source, _ROOMY).passed
  server.settimeout(0.1)
  with pytest.raises(TimeoutError):
    server.accept()


def test_no_system_call_reaches_another_process(victim):
  pid, info = str(victim.pid), 'b"\\x09" + bytes(7) + b"\\xff" * 4 + bytes(116)'
  attempts = [
    call((62, 129), pid, '9'),  # kill
    call((62, 129), '-1', '9'),  # kill of all
    call((200, 130), pid, '9'),  # tkill
    call((234, 131), pid, pid, '9'),  # tgkill
    call((129, 138), pid, '9', info),  # rt_sigqueueinfo
    call((297, 240), pid, pid, '9', info),  # rt_tgsigqueueinfo
    call((434, 434), pid, '0'),  # pidfd_open
    call((424, 424), '3', '9', '0', '0'),  # pidfd_send_signal
    call((222, 107), '0', '0', '0'),  # timer_create
    call((101, 117), '16', pid, '0', '0'),  # ptrace
    call((310, 270), pid, '0', '0', '0', '0', '0'),  # process_vm_readv
    call((311, 271), pid, '0', '0', '0', '0', '0'),  # process_vm_writev
    call((312, 272), pid, pid, '0', '0', '0'),  # kcmp
    call((302, 261), pid, '7', '0', 'bytes(16)'),  # prlimit64
    call((141, 140), '0', pid, '19'),  # setpriority
    call((203, 122), pid, '8', 'b"\\x01" + bytes(7)'),  # sched_setaffinity
    call((144, 119), pid, '3', 'bytes(4)'),  # sched_setscheduler
    call((314, 274), pid, 'bytes(48)', '0'),  # sched_setattr
    call((251, 30), '1', pid, '24576'),  # ioprio_set
    call((256, 238), pid, '0', '0', '0'),  # migrate_pages
    call((440, 440), '3', '0', '0', '0', '0'),  # process_madvise
    call((323, 282), '1'),  # userfaultfd
    call((298, 241), 'bytes(128)', pid, '-1', '-1', '0'),  # perf_event_open
    call((109, 154), '0', pid),  # setpgid
    call((112, 157)),  # setsid
    call((272, 97), str(0x10000000)),  # unshare
    call((165, 40), 'b"a"', 'b"/"', 'b"tmpfs"', '0', '0'),  # mount
    call((250, 219), '0', '-3', '0'),  # keyctl
    call((157, 167), '1', '0', '0', '0', '0'),  # death signal
    'import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, ' + pid + ')',
    'import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, 10, 9)',
    f'import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, 4, {0o20000})',
    'import fcntl, os\nr, w = os.pipe()\nfcntl.ioctl(r, 0x8901, bytes(4))',
    'import fcntl, os\nfcntl.fcntl(os.open("/usr/lib", os.O_RDONLY), 1026, 63)',
    'import fcntl, os\nfcntl.flock(os.open(os.__file__, os.O_RDONLY), 2)',
    'import fcntl, os\nfcntl.fcntl(os.open(os.__file__, os.O_RDONLY), 1024, 0)',
  ]
  assert not_refused(attempts) == 'Exception: []'
  assert victim.poll() is None


def test_its_own_process_it_may_ask_about():
  source = (
    'import os, resource, signal\nassert resource.getrlimit(resource.RLIMIT_AS)[0] == 1 << 30\n'
    'seen = []\nsignal.signal(signal.SIGUSR1, lambda *_: seen.append(1))\n'
    'signal.raise_signal(signal.SIGUSR1)\nassert seen == [1]\nassert os.sched_getaffinity(0)\n'
  )
  assert sandbox.run(source, _ROOMY).reason == 'passed'
  limits = 'import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 1))'
  assert 'not allowed' in sandbox.run(limits, _ROOMY).reason


def _tree_of(session: int) -> list[int]:
  """Processes of a session that have not ended."""
  found = []
  for stat in pathlib.Path('/proc').glob('[0-9]*/stat'):
    try:
      state, _, _, of = stat.read_text().rsplit(') ', 1)[1].split()[:4]
    except (FileNotFoundError, ProcessLookupError):
      continue
    if int(of) == session and state != 'Z':
      found.append(int(stat.parent.name))
  return found


@pytest.mark.parametrize('how', [signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_evaluation(how):
  source = (
    'from tasks.evaluation import sandbox\nsandbox.run("pass")\n'
    'import pathlib\nprint(sandbox._warden.session, flush=True)\n'
    'sandbox.run("import time; time.sleep(600)", sandbox.Limits(seconds=60))'
  )
  with subprocess.Popen([sys.executable, '-c', source], cwd=_ROOT, stdout=subprocess.PIPE) as owner:
    session = int(owner.stdout.readline())
    until = time.monotonic() + 20
    while len(_tree_of(session)) < 4 and time.monotonic() < until:
      time.sleep(0.05)
    assert len(_tree_of(session)) == 4  # the warden, who cares for it, the program, its tests
    owner.send_signal(how)
    owner.wait()
  while _tree_of(session) and time.monotonic() < until:
    time.sleep(0.05)
  assert not _tree_of(session)


def test_a_killed_warden_is_replaced():
  assert sandbox.run('pass', _ROOMY).passed
  for pid in _tree_of(sandbox._warden.session):
    os.kill(pid, signal.SIGKILL)
  while _tree_of(sandbox._warden.session):
    time.sleep(0.01)
  assert sandbox.run('pass', _ROOMY).passed


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
  with monkeypatch.context() as patch:
    patch.setattr(jail, 'landlock_version', lambda: 0)
    with pytest.raises(ConfigError, match='no Landlock'):
      sandbox.run('pass')
  monkeypatch.setattr(jail, 'has_seccomp', lambda: False)
  with pytest.raises(ConfigError, match='no seccomp'):
    sandbox.run('pass')
