"""Keeps a command running: starts it again when its process or machine is lost, and else stops.

Stops at 0 (complete), 64 (refused), 65 (damaged or diverged), 66 (the data ended), 130 (Ctrl-C),
and at the third death in a row at one step. Anything else is started again: 75 (stopped after
saving), 69 (another process was lost), 137 and other signals, 255 of ssh. The wait doubles while no
step is gained. Standard library alone: it may run where nothing of the project is installed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

FINAL = {
  0: 'complete',
  64: 'it cannot run as configured',
  65: 'data are damaged, or training has diverged',
  66: 'the training data ended',
  130: 'interrupted',
}
STOPPED = 75
LOST = 255  # what ssh ends with, and what is said of a machine that has gone
DEATHS = 3  # in a row at one step
_TIMELINE = 'timeline.jsonl'


class Place:
  """Where the command runs: here. Others tell how to start, watch and stop it elsewhere."""

  def __init__(self):
    self._child: subprocess.Popen | None = None

  def prepare(self, note: Callable[[str], None]) -> None:
    """Makes sure that there is a machine; may wait."""

  def run(self, command: Sequence[str]) -> int:
    """Runs the command to its end; its exit code, 128 + n for signal n as a shell has it."""
    self._child = subprocess.Popen(command)
    try:
      code = self._child.wait()
    finally:
      self._child = None
    return 128 - code if code < 0 else code

  def stop(self) -> None:
    """Asks the command to save and stop, from a signal handler."""
    if self._child:
      self._child.send_signal(signal.SIGTERM)


@dataclasses.dataclass
class Attempt:
  """One start of the command.

  Attributes:
    begin, seconds: when it was started, and how long it ran.
    waited: seconds between the end of the one before and this.
    code: exit code.
    first, last: steps done when it went on and at its last sign; None where nothing tells.
    lost: steps of it that the next one did again.
  """

  begin: float
  waited: float
  seconds: float = 0.0
  code: int = 0
  first: int | None = None
  last: int | None = None
  lost: int = 0

  @property
  def productive(self) -> float:
    """Seconds of it that were not done again."""
    made = (self.last or 0) - (self.first or 0)
    return self.seconds * (1 - min(self.lost, made) / made) if made > 0 else 0.0


class Keeper:
  """Starts a command until it is done.

  Args:
    command: what is run.
    run_dir: its run directory, by whose timeline steps are counted; None counts none.
    place: where.
    log: file of JSON lines: one an attempt, and the sum at the end.
    wait, most_wait: seconds before the second start, and at most.
    note: receives what happens, as one line of text each.
    sleep: waits so many seconds.
  """

  def __init__(
    self,
    command: Sequence[str],
    run_dir: str | None,
    place: Place,
    log: str,
    wait: float = 10.0,
    most_wait: float = 600.0,
    note: Callable[[str], None] = print,
    sleep: Callable[[float], None] = time.sleep,
  ):
    self._command, self._run_dir, self._place = list(command), run_dir, place
    self._log, self._wait, self._most = pathlib.Path(log), wait, most_wait
    self._note, self._sleep = note, sleep
    self._asked = False
    self.attempts: list[Attempt] = []

  def keep(self) -> int:
    """Runs until it is done; the exit code of the last start."""
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._stop)
    wait, deaths, waited = self._wait, 0, 0.0
    while True:
      attempt = self._once(waited)
      end = self._why_end(attempt)
      deaths = deaths + 1 if self._died_again(attempt) else 1
      if end is None and attempt.code != STOPPED and deaths >= DEATHS:
        end = f'{deaths} deaths in a row at step {attempt.last}: this does not pass by itself'
      if end:
        self._sum_up(attempt.code, end)
        return attempt.code
      gained = attempt.last is not None and attempt.last > (attempt.first or 0)
      wait = self._wait if gained or attempt.code == STOPPED else min(2 * wait, self._most)
      self._note(f'keep: ended with {attempt.code} at step {attempt.last}; again in {wait:g} s.')
      begin = time.monotonic()
      self._sleep(wait)
      waited = time.monotonic() - begin
      if self._asked:
        self._sum_up(attempt.code, 'asked to stop')
        return attempt.code

  def _stop(self, number: int, frame: Any) -> None:
    self._asked = True
    self._place.stop()

  def _once(self, waited: float) -> Attempt:
    before = starts_of(self._run_dir)
    self._place.prepare(self._note)
    attempt = Attempt(time.time(), waited)
    begin = time.monotonic()
    try:
      attempt.code = self._place.run(self._command)
    except OSError as error:
      self._note(f'keep: {self._command[0]}: {error.strerror}')
      attempt.code = 64  # there is no such command; nothing to wait for
    attempt.seconds = time.monotonic() - begin
    after = starts_of(self._run_dir)
    if len(after) > len(before):
      attempt.first, attempt.last = after[-1]
      previous = self.attempts[-1] if self.attempts else None
      if previous and previous.last is not None:
        previous.lost = max(0, previous.last - attempt.first)
    elif after:  # it died before it had a word to say
      attempt.first = attempt.last = after[-1][1]
    self.attempts.append(attempt)
    self._write(dataclasses.asdict(attempt) | {'kind': 'attempt'})
    return attempt

  def _why_end(self, attempt: Attempt) -> str | None:
    return 'asked to stop' if self._asked else FINAL.get(attempt.code)

  def _died_again(self, attempt: Attempt) -> bool:
    """Whether this death is at the step of the one before."""
    if len(self.attempts) < 2 or attempt.code == STOPPED:
      return False
    before = self.attempts[-2]
    return before.code != STOPPED and before.last == attempt.last

  def _sum_up(self, code: int, why: str) -> None:
    wall = time.time() - self.attempts[0].begin
    productive = sum(attempt.productive for attempt in self.attempts)
    facts = {'attempts': len(self.attempts), 'code': code, 'why': why}
    facts |= {'wall': wall, 'productive': productive, 'lost': max(0.0, wall - productive)}
    self._write({'kind': 'end'} | facts)
    count = f'{len(self.attempts)} start{"s" if len(self.attempts) > 1 else ""}'
    self._note(
      f'keep: {why} ({code}) after {count} and {wall:.0f} s, of which {productive:.0f} s made '
      f'steps that stay. {self._log} has each.'
    )

  def _write(self, record: dict[str, Any]) -> None:
    try:
      self._log.parent.mkdir(parents=True, exist_ok=True)
      with self._log.open('a', encoding='utf-8') as file:
        file.write(json.dumps(record) + '\n')
    except OSError as error:
      self._note(f'keep: {self._log} cannot be written ({error.strerror}).')


def starts_of(run_dir: str | None) -> list[tuple[int, int]]:
  """(first, last step) of every process that a run's timeline knows."""
  found: list[tuple[int, int]] = []
  phases = 0
  for line in _read(run_dir).splitlines():
    try:
      record = json.loads(line)
      kind, step = record['kind'], int(record['step'])
    except (ValueError, TypeError, KeyError, RecursionError):
      continue
    if kind == 'start':
      found.append((0, 0))
      phases = 0
    elif found and kind not in ('setup', 'commit'):
      first, last = found[-1]
      phases += 1
      found[-1] = (step, step) if phases == 1 else (first, max(last, step))
  return found


def _read(run_dir: str | None) -> str:
  if run_dir is None:
    return ''
  if '://' in run_dir:
    got = subprocess.run(
      ['gcloud', 'storage', 'cat', f'{run_dir.rstrip("/")}/{_TIMELINE}'],
      capture_output=True, encoding='utf-8', errors='replace', check=False,
    )  # fmt: skip
    return got.stdout if got.returncode == 0 else ''
  path = pathlib.Path(run_dir) / _TIMELINE
  return path.read_text(encoding='utf-8', errors='replace') if path.is_file() else ''


def run_dir_of(command: Sequence[str]) -> str | None:
  """The run directory that --gin.MODEL_DIR='DIR' of a command names, or MODEL_DIR around it."""
  for argument in reversed(command):
    if match := re.fullmatch(r"""--?gin\.MODEL_DIR=["'](.+)["']""", argument):
      return match[1]
  return os.environ.get('MODEL_DIR')
