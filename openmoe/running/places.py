"""Machines that the keeper asks for: queued TPU VMs of Google's cloud, and SLURM."""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence

from openmoe.running.keeper import FINAL, LOST, Place

_PERIOD = 30.0  # seconds between two looks
_CODES = {'COMPLETED': 0, 'CANCELLED': 130}
_SAYS = 'keep:exit='
_GONE = ('FAILED', 'SUSPENDED', 'SUSPENDING', 'DELETING', '')


class QueuedTpu(Place):
  """A queued resource: made when it is not there, made anew when it was taken away.

  Args:
    name, zone: of the resource and its one node.
    accelerator, runtime: as `--accelerator-type` and `--runtime-version`.
    more: further arguments of `create`, such as --spot.
    sleep: waits so many seconds.
  """

  def __init__(
    self,
    name: str,
    zone: str,
    accelerator: str,
    runtime: str,
    more: Sequence[str] = (),
    sleep: Callable[[float], None] = time.sleep,
  ):
    super().__init__()
    self._name, self._zone = name, zone
    self._shape = [f'--accelerator-type={accelerator}', f'--runtime-version={runtime}', *more]
    self._sleep = sleep

  def _gcloud(self, *arguments: str) -> subprocess.CompletedProcess:
    command = ['gcloud', 'compute', 'tpus', *arguments, f'--zone={self._zone}']
    return subprocess.run(command, capture_output=True, encoding='utf-8', check=False)

  def _state(self) -> str:
    """State of the resource; empty where there is none."""
    asked = self._gcloud('queued-resources', 'describe', self._name, '--format=value(state.state)')
    return asked.stdout.strip() if asked.returncode == 0 else ''

  def prepare(self, note: Callable[[str], None]) -> None:
    """Waits until the machines are there."""
    said = None
    while (state := self._state()) != 'ACTIVE':
      if state in _GONE:
        note(f'keep: {self._name} is {state.lower() or "not there"}; asking for it anew.')
        if state:
          self._gcloud('queued-resources', 'delete', self._name, '--force', '--quiet')
        made = self._gcloud(
          'queued-resources', 'create', self._name, f'--node-id={self._name}', *self._shape
        )
        if made.returncode:
          note(f'keep: gcloud: {made.stderr.strip()}')
      elif state != said:
        note(f'keep: {self._name} is {state.lower()}.')
      said = state
      self._sleep(_PERIOD)

  def run(self, command: Sequence[str]) -> int:
    """Runs it on all hosts; LOST where the machines were taken away meanwhile."""
    remote = ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', self._name, f'--zone={self._zone}']
    remote += ['--worker=all', f'--command={shlex.join(command)}; echo {_SAYS}$?']
    # gcloud ends with a code of its own, so every worker says its one as its last line.
    codes = []
    self._child = subprocess.Popen(remote, stdout=subprocess.PIPE, encoding='utf-8')
    for line in self._child.stdout:
      if said := re.search(rf'{_SAYS}(\d+)', line):
        codes.append(int(said[1]))
      else:
        print(line, end='', flush=True)
    code, self._child = self._child.wait(), None
    if code and self._state() != 'ACTIVE':
      return LOST
    final = [c for c in codes if c in FINAL and c]
    return (final or [max(codes)])[0] if codes else LOST


class Slurm(Place):
  """A batch job, submitted again when it is preempted, or its node or time is lost.

  Args:
    more: arguments of sbatch, such as --nodes=4; SLURM is told to send SIGTERM before it ends the
      job, so that it saves.
    sleep: waits so many seconds.
  """

  def __init__(self, more: Sequence[str] = (), sleep: Callable[[float], None] = time.sleep):
    super().__init__()
    self._more, self._sleep = list(more), sleep
    self._job = ''

  def run(self, command: Sequence[str]) -> int:
    """Submits it and waits for its end."""
    wrapped = f'srun --kill-on-bad-exit=1 {shlex.join(command)}'
    submit = ['sbatch', '--parsable', '--signal=TERM@120', *self._more, f'--wrap={wrapped}']
    submitted = subprocess.run(submit, capture_output=True, encoding='utf-8', check=False)
    if submitted.returncode:
      print(submitted.stderr.strip())
      return 64
    self._job = submitted.stdout.strip().split(';')[0]
    while True:
      self._sleep(_PERIOD)
      state, code = self._look()
      if state in ('PENDING', 'RUNNING', 'COMPLETING', 'CONFIGURING', 'SUSPENDED', ''):
        continue
      self._job = ''
      if state == 'FAILED':
        return code
      return _CODES.get(state, LOST)

  def _look(self) -> tuple[str, int]:
    """(state, exit code) of the job."""
    asked = ['sacct', '-j', self._job, '-X', '-n', '-P', '-o', 'State,ExitCode']
    got = subprocess.run(asked, capture_output=True, encoding='utf-8', check=False)
    line = got.stdout.strip().splitlines()[:1] if got.returncode == 0 else []
    if not line:
      return '', 0
    state, _, codes = line[0].partition('|')  # 'FAILED|75:0', 'CANCELLED by 1000|0:15'
    code, _, number = codes.partition(':')
    signalled = int(number) if number.isdigit() else 0
    return state.split()[0], 128 + signalled if signalled else int(code) if code.isdigit() else 1

  def stop(self) -> None:
    """Sends SIGTERM to the job's processes."""
    if self._job:
      subprocess.run(['scancel', '--signal=TERM', '--full', self._job], check=False)
