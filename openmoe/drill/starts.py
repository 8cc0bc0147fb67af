"""Starts of a run as processes of this machine, which are killed at a moment."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

from openmoe.config import ConfigError, MeshConfig
from openmoe.drill.moments import Moment, Watcher

PATIENCE = 3600.0  # seconds that a start may last, on a very busy machine
STOPPED, ALONE = 75, 69  # exit codes of scripts.train: stopped by a signal; another process is gone
_POLL = 0.004  # seconds
_DEVICES = re.compile(r'--xla_force_host_platform_device_count=\d+')


class Failed(RuntimeError):
  """A start that ended otherwise than it should."""

  exit_code = 65


@dataclasses.dataclass(frozen=True)
class Shape:
  """On what a start runs.

  Attributes:
    hosts: processes.
    devices: of all of them together.
    mesh: that they form.
  """

  hosts: int
  devices: int
  mesh: MeshConfig

  def __post_init__(self):
    if self.devices % self.hosts:
      raise ConfigError(
        f'--hosts={self.hosts} does not divide the {self.devices} devices; simulate another '
        'number with XLA_FLAGS=--xla_force_host_platform_device_count=N.'
      )

  def __str__(self) -> str:
    parts, split = self.mesh.num_expert_partitions, self.mesh.num_model_partitions
    mesh = f'{self.devices // (parts * split)}x{parts}x{split}'
    return f'{self.hosts} x {self.devices // self.hosts}, mesh {mesh}'


class Starts:
  """Launches a training command.

  Args:
    command: without what says where and on what it runs.
    environment: of the processes.
  """

  def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
    self._command = list(command)
    self._environment = dict(environment)

  def run(
    self,
    run_dir: pathlib.Path,
    shape: Shape,
    moment: Moment | None = None,
    tell: Callable[[str, int], None] = lambda phase, step: None,
  ) -> Watcher:
    """One start, to its end or to a moment at which it is killed.

    Args:
      tell: is told again and again what the run is doing.

    Raises:
      Failed: it ended by itself in another way than complete.
    """
    watcher = Watcher(run_dir)
    with tempfile.TemporaryFile() as output:
      began = time.monotonic()
      processes = self._launch(run_dir, shape, output)
      try:
        self._wait(processes, watcher, moment, began, tell)
        codes = self._reap(processes, tell, watcher)
      finally:
        for process in processes:
          process.kill()
          process.wait()
      output.seek(0)
      self._judge(codes, moment, shape, output.read().decode('utf-8', 'replace'))
    return watcher

  def _launch(self, run_dir: pathlib.Path, shape: Shape, output) -> list[subprocess.Popen]:
    mesh = {f: getattr(shape.mesh, f) for f in ('num_expert_partitions', 'num_model_partitions')}
    command = [sys.executable, *self._command, f'--gin.MODEL_DIR={str(run_dir)!r}']
    command += [f'--gin.config.MeshConfig.{name}={value}' for name, value in mesh.items()]
    environment = dict(self._environment)
    more = [[]]
    if shape.hosts > 1:
      with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{probe.getsockname()[1]}'
      many = [
        '--multiprocess',
        f'--coordinator_address={address}',
        f'--process_count={shape.hosts}',
      ]
      more = [[*many, f'--process_index={index}'] for index in range(shape.hosts)]
    flag = f'--xla_force_host_platform_device_count={shape.devices // shape.hosts}'
    flags = _DEVICES.sub('', environment.get('XLA_FLAGS', ''))
    if environment.get('JAX_PLATFORMS') == 'cpu':
      environment['XLA_FLAGS'] = f'{flags} {flag}'.strip()
    return [
      subprocess.Popen(
        [*command, *own],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
      )
      for own in more
    ]

  def _wait(self, processes, watcher: Watcher, moment: Moment | None, began: float, tell) -> None:
    """Returns after the kill, or when a process has ended by itself."""
    if moment is None:
      return
    arrived = began if moment.phase == 'import' else None
    while all(process.poll() is None for process in processes):
      now = time.monotonic()
      if arrived is None and watcher.arrived(moment):
        arrived = now
      if arrived is not None and now - arrived >= moment.wait:
        moment.found, moment.at_step = watcher.doing(), watcher.steps()
        processes[moment.process % len(processes)].send_signal(moment.number)
        return
      if now - began > PATIENCE:
        return
      tell(watcher.doing(), watcher.steps())
      time.sleep(_POLL)
    moment.found, moment.at_step = 'ended before', watcher.steps()

  def _reap(self, processes, tell, watcher: Watcher) -> list[int]:
    """Exit codes; whoever does not end is no survivor."""
    deadline = time.monotonic() + PATIENCE
    while any(process.poll() is None for process in processes):
      if time.monotonic() > deadline:
        raise Failed(f'A start did not end within {PATIENCE:.0f} s; it was {watcher.doing()}.')
      tell(watcher.doing(), watcher.steps())
      time.sleep(0.05)
    return [process.returncode for process in processes]

  def _judge(self, codes: list[int], moment: Moment | None, shape: Shape, output: str) -> None:
    """Raises Failed where a start ended in a way that it should not."""
    fine = {0}
    if moment is not None and moment.found != 'ended before':
      fine |= {STOPPED} if moment.number == signal.SIGTERM else {-signal.SIGKILL}
      if moment.number == signal.SIGTERM and moment.found in ('import', 'start', 'setup'):
        fine.add(-signal.SIGTERM)  # nothing is there yet that could be saved
      if shape.hosts > 1:
        fine.add(ALONE)
    if set(codes) - fine:
      told = '\n'.join(output.strip().splitlines()[-15:])
      what = 'undisturbed' if moment is None else f'with {moment.signal_name} in {moment.found}'
      raise Failed(f'A start on {shape} {what} ended with {codes}, not {sorted(fine)}: {told}')
