"""Runs programs that a model wrote, so that nothing they do matters; see warden.py and judge.py.

A program passes if it runs to its end and its tests do, in time. The program, and in another
process its tests, can make no process, open no socket, change or make no file, read none but
Python's own libraries, and take no more memory, threads or time than they are given; both end with
this process, however it ends. What counts is decided where the program cannot reach, from plain
values that it returned. That takes Linux with seccomp and Landlock (5.13 or newer); elsewhere
nothing is run.

What remains: a program that guesses what a test expects passes it, and so does one that changes the
arguments it is given so that the test comes out. A text without tests is taken at its word that it
ran to its end; in a text that has its tests in it, what looks like tests is taken for them, whoever
wrote it. A program can see which files and processes there are, though not what is in them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import socket
import subprocess
import sys
import threading
from collections.abc import Collection

from openmoe.config import ConfigError
from tasks.evaluation import jail

_WARDEN = pathlib.Path(jail.__file__).with_name('warden.py')
_ENVIRONMENT = {
  'HOME': '/',
  'LANG': 'C.UTF-8',
  'OMP_NUM_THREADS': '1',
  'OPENBLAS_NUM_THREADS': '1',
  'OPENSSL_CONF': os.devnull,
  'TZ': 'UTC',
}
_GRACE_SECONDS = 10  # for the process that counts the seconds


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one program may take, and its tests as much again.

  Attributes:
    seconds: wall time of both together, and processor time of each.
    memory: bytes of address space of each.
  """

  seconds: float = 10.0
  memory: int = 1 << 30


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a program ended: `reason` is 'passed', 'timed out', or what went wrong."""

  passed: bool
  reason: str


def check_available() -> None:
  """Raises ConfigError where programs cannot be locked in."""
  missing = []
  if sys.platform != 'linux' or not jail.has_seccomp():
    missing.append('seccomp (on x86_64 or aarch64)')
  if sys.platform != 'linux' or not jail.landlock_version():
    missing.append('Landlock')
  if missing:
    raise ConfigError(
      f'Programs that a model wrote cannot be locked in here: this system has no '
      f'{" and no ".join(missing)}. Leave humaneval and mbpp out, or evaluate them on Linux 5.13 '
      'or newer.'
    )


def run(
  program: str,
  limits: Limits = Limits(),
  tests: str | None = None,
  names: Collection[str] = (),
) -> Outcome:
  """Runs a program, and its tests against it.

  Args:
    program: Python text.
    limits: what it may take.
    tests: Python text, run in another process; names it does not define are the program's. None
      if the program's text ends with them; they then see copies of its data.
    names: what the tests must take from the program even where Python has something of that name.

  Raises:
    ConfigError: see check_available.
  """
  check_available()
  job = json.dumps({'program': program, 'tests': tests, 'names': list(names)}).encode()
  report = _judged(job, limits)
  try:
    passed, reason = json.loads(report)
  except ValueError:
    return Outcome(False, 'no verdict')
  if passed is None:
    raise ConfigError(
      f'Programs that a model wrote cannot be locked in here: {reason}. Leave humaneval and mbpp '
      'out, or evaluate them elsewhere.'
    )
  return Outcome(passed, reason)


def _judged(job: bytes, limits: Limits) -> bytes:
  """The report on a job; empty if it was cut off."""
  ours, theirs = socket.socketpair()
  with ours:
    with theirs:
      _warden.send(json.dumps([limits.seconds, limits.memory]).encode(), theirs)
    ours.settimeout(limits.seconds + _GRACE_SECONDS)
    report = b''
    try:
      ours.sendall(job)
      ours.shutdown(socket.SHUT_WR)
      # Not to its end: a process forked in the meantime may hold the other side open.
      while not report.endswith(b'\n') and (data := ours.recv(1 << 16)):
        report += data
    except TimeoutError:
      return b'[false, "timed out"]'
    except OSError:  # whoever judged has died
      return b''
  return report


class _Warden:
  """The process that judges; started when first needed, and again if it is gone.

  Attributes:
    session: what it and all it starts belong to.
  """

  def __init__(self):
    self.session = 0
    self._lock = threading.Lock()
    self._control: socket.socket | None = None
    self._owner = 0

  def send(self, message: bytes, job: socket.socket) -> None:
    with self._lock:
      if self._control is None or self._owner != os.getpid():
        self._start()
      try:
        socket.send_fds(self._control, [message], [job.fileno()])
      except OSError:  # it has been killed
        self._start()
        socket.send_fds(self._control, [message], [job.fileno()])

  def _start(self) -> None:
    self._owner = os.getpid()
    self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
      starting = subprocess.Popen(
        [sys.executable, '-I', '-B', str(_WARDEN), str(self._owner)],
        stdin=theirs,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd='/',
        env=_ENVIRONMENT,
      )
    self.session = starting.pid
    errors = starting.communicate()[1]
    if starting.returncode:
      why = errors.decode(errors='replace').strip().rsplit('\n', 1)[-1]
      raise ConfigError(
        f'Programs that a model wrote cannot be judged here: {_WARDEN.name} does not start '
        f'({why}). Leave humaneval and mbpp out, or evaluate them elsewhere.'
      )


_warden = _Warden()


def pass_at_k(samples: int, passed: int, k: int) -> float:
  """Chance that at least one of k samples, drawn without replacement, passed.

  Chen et al. 2021, equation 1: 1 - C(n - c, k) / C(n, k).

  Raises:
    ConfigError: k is larger than the number of samples.
  """
  if not 1 <= k <= samples:
    raise ConfigError(f'pass@{k} needs at least {k} samples per item; there are {samples}.')
  return 1 - math.comb(samples - passed, k) / math.comb(samples, k)
