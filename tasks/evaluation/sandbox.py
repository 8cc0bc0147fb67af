"""Runs programs that a model wrote, so that nothing they do matters: jail.py, and a watch over it.

A program passes if it runs to its end without an exception, in time. Its process can make no other
process, open no socket, write nothing outside a temporary directory, and take no more memory, files
or time than it is given; this process waits, counts and kills. That takes Linux with seccomp and
Landlock (5.13 or newer); elsewhere nothing is run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import tempfile
import time

from openmoe.config import ConfigError
from tasks.evaluation import jail

_POLL_SECONDS = 0.02


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one program may take.

  Attributes:
    seconds: wall time and processor time.
    memory: bytes of address space.
    file_size: bytes of one file.
    disk: bytes of all files.
  """

  seconds: float = 10.0
  memory: int = 1 << 30
  file_size: int = 8 << 20
  disk: int = 64 << 20


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


def _disk_use(directory: str) -> int:
  total = 0
  for root, _, names in os.walk(directory, onerror=None):
    for name in names:
      with contextlib.suppress(OSError):
        total += os.lstat(os.path.join(root, name)).st_size
  return total


def _watch(process: subprocess.Popen, directory: str, limits: Limits) -> str | None:
  """Waits for the end; the reason if it had to be forced."""
  begin = time.monotonic()
  looked = begin
  while process.poll() is None:
    now = time.monotonic()
    if now - begin > limits.seconds:
      return 'timed out'
    if now - looked > 0.2:
      looked = now
      if _disk_use(directory) > limits.disk:
        return 'wrote too much'
    time.sleep(_POLL_SECONDS)
  return None


def _kill(process: subprocess.Popen) -> None:
  # It leads a group of its own, in which there can be no other process.
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def run(source: str, limits: Limits = Limits()) -> Outcome:
  """Runs a program.

  Args:
    source: Python text; it passes by running to its end.
    limits: what it may take.

  Raises:
    ConfigError: see check_available.
  """
  check_available()
  secret = secrets.token_hex(16)
  with tempfile.TemporaryDirectory(prefix='program-', ignore_cleanup_errors=True) as place:
    pathlib.Path(place, 'program.py').write_text(source, encoding='utf-8', errors='replace')
    reader, writer = os.pipe()
    settings = {
      'verdict': writer,
      'secret': secret,
      'directory': place,
      'cpu_seconds': math.ceil(limits.seconds) + 1,
      'memory': limits.memory,
      'file_size': limits.file_size,
    }
    process = subprocess.Popen(
      [sys.executable, '-I', str(pathlib.Path(jail.__file__)), json.dumps(settings)],
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      pass_fds=(writer,),
      start_new_session=True,
      cwd=place,
      env={'HOME': place, 'TMPDIR': place, 'OPENBLAS_NUM_THREADS': '1', 'OMP_NUM_THREADS': '1'},
    )
    os.close(writer)
    try:
      forced = _watch(process, place, limits)
    finally:
      _kill(process)
      os.set_blocking(reader, False)
      with contextlib.suppress(BlockingIOError):
        verdict = os.read(reader, 4096).decode(errors='replace')
      os.close(reader)
  return _outcome(forced, verdict, secret, process.returncode)


def _outcome(forced: str | None, verdict: str, secret: str, code: int) -> Outcome:
  if forced:
    return Outcome(False, forced)
  if verdict == secret:
    return Outcome(True, 'passed')
  return Outcome(False, verdict or f'ended with {code} before its end')


def pass_at_k(samples: int, passed: int, k: int) -> float:
  """Chance that at least one of k samples, drawn without replacement, passed.

  Chen et al. 2021, equation 1: 1 - C(n - c, k) / C(n, k).

  Raises:
    ConfigError: k is larger than the number of samples.
  """
  if not 1 <= k <= samples:
    raise ConfigError(f'pass@{k} needs at least {k} samples per item; there are {samples}.')
  return 1 - math.comb(samples - passed, k) / math.comb(samples, k)
