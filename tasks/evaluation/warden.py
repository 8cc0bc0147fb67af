"""Starts, watches and ends the processes that judge programs: `warden.py OWNER`, a script.

One serves all programs of the evaluation that started it. It is no child of that process but sees
its end, however it comes, and ends with it; all that it starts ends with it in turn. A message on
the socket that is its standard input is one job: JSON of seconds and bytes, with a socket on which
the job comes and the report goes. Of each job a process of its own takes care, which waits, kills
and reports, and reads nothing that the program made.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import pathlib
import select
import signal
import socket
import sys
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from tasks.evaluation import jail, judge

_REPORT_BYTES = 1 << 16


def _fork(work: Callable, *args, keep: tuple[int, ...] = ()) -> int:
  """Runs work in a new process, which ends with this one.

  Args:
    work: what it does; its last result is the end of the process.
    args: its arguments.
    keep: descriptors that it may use besides the standard ones.
  """
  parent = os.getpid()
  child = os.fork()
  if child:
    return child
  try:
    jail.die_with(parent)
    begin = 3
    for descriptor in sorted(keep):
      os.closerange(begin, descriptor)
      begin = descriptor + 1
    os.closerange(begin, 256)
    work(*args)
  finally:
    os._exit(0)  # threads that are left are not waited for


def _care(job: int, seconds: float, memory: int) -> None:
  """Has one program judged and reports."""
  deadline = time.monotonic() + seconds
  signal.signal(signal.SIGCHLD, signal.SIG_DFL)
  settings = {'parent': os.getpid(), 'cpu_seconds': math.ceil(seconds) + 1, 'memory': memory}
  asked, ask = os.pipe()
  answered, answer = os.pipe()
  program = _fork(judge.run_program, asked, answer, settings, keep=(asked, answer))
  report, reporter = os.pipe()
  theirs = (answered, ask, job, reporter)
  tests = _fork(judge.run_tests, *theirs, settings, keep=theirs)
  for descriptor in (asked, ask, answered, answer, reporter):
    os.close(descriptor)
  found = _wait(report, job, deadline)
  for child in (program, tests):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
  with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
    os.write(job, found + b'\n')


def _wait(report: int, job: int, deadline: float) -> bytes:
  """What the tests' process reports, or what is to be said without."""
  poll = select.poll()
  poll.register(report, select.POLLIN)
  poll.register(job, select.POLLHUP)
  ready = dict(poll.poll(max(0, deadline - time.monotonic()) * 1000))
  if not ready:
    return b'[false, "timed out"]'
  found = os.read(report, _REPORT_BYTES) if report in ready else b''
  return found or b'[false, "the tests ended without a verdict"]'


def _serve(control: socket.socket, owner: int) -> None:
  """Takes jobs until the owner ends."""
  signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # none of them is waited for
  poll = select.poll()
  poll.register(control, select.POLLIN)
  poll.register(owner, select.POLLIN)
  while owner not in dict(poll.poll()):
    message, jobs, *_ = socket.recv_fds(control, 4096, 1)
    if not message:  # the owner takes no interest any more
      return
    with contextlib.suppress(BlockingIOError):  # no process to be had: the job is cut off
      _fork(_care, *jobs, *json.loads(message), keep=tuple(jobs))
    os.close(*jobs)


def main() -> None:
  expected = int(sys.argv[1])
  owner = os.pidfd_open(expected)
  if os.getppid() != expected:
    sys.exit(1)  # it has ended already; the number may be another's
  if os.fork():
    os._exit(0)
  control = socket.socket(fileno=os.dup(0))
  null = os.open(os.devnull, os.O_RDWR)
  for descriptor in (0, 1, 2):
    os.dup2(null, descriptor)
  gc.freeze()
  _serve(control, owner)


if __name__ == '__main__':
  main()
