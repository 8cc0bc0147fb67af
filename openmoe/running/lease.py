"""One run directory, one run: a lease in the directory that a dead owner's successor takes over.

`lease.json` says who trains here, and its owner counts it up every few seconds. Whoever comes
second looks: an owner on this machine is asked for by its process number; any other is watched for
a while, and has gone when the count stands still. Nobody's clock is compared with anybody else's.
On an object store, where nothing can be locked, two that come at once both write, and the last one
has it: the other finds that out before it goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Self

from openmoe.checkpoint import fields, safe_json
from openmoe.checkpoint.paths import Unreadable, absolute, is_remote, write_whole
from openmoe.config import ConfigError

NAME = 'lease.json'
BEAT = 10.0  # seconds between two counts
_GONE = 3.5  # beats without a count after which an owner is taken for dead
_SETTLE = 2.0  # seconds after which a write without a lock has met those of others
_SIZE = 1024  # bytes of the file; always the same, so that counting needs no room on the disk


class DirectoryInUse(ConfigError):
  """Another run has this directory."""


@dataclasses.dataclass(frozen=True)
class Owner:
  """Who has a lease.

  Attributes:
    key: its own, of this start of the run.
    host, pid: for messages.
    machine: tells the process numbers of two machines, starts of a machine or containers apart.
    began: of the process, in the machine's own time: numbers are used again.
    count: goes up while the owner lives.
  """

  key: str
  host: str
  pid: int
  machine: str
  began: int
  count: int = 0

  def lives(self) -> bool | None:
    """Whether the process is there; None where it cannot be seen from here."""
    if not self.machine or self.machine != _machine():
      return None
    return _began(self.pid) == self.began


def _machine() -> str:
  """This start of this machine and this container's processes; '' where that cannot be told."""
  try:
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()
    return f'{boot}/{os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return ''


def _began(pid: int) -> int:
  """When a process began, in ticks since the machine did; 0 for one that is gone or a zombie."""
  try:
    fields = (
      pathlib.Path(f'/proc/{pid}/stat').read_text(encoding='utf-8').rpartition(')')[2].split()
    )
  except OSError:
    return 0
  return 0 if fields[0] in 'ZX' else int(fields[19])


@contextlib.contextmanager
def _locked(directory) -> Iterator[bool]:
  """Lets one at a time into a local directory; yields whether the file system can do that."""
  if is_remote(directory):
    yield False
    return
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:  # NFS locks no directories
      yield False
    else:
      yield True
  finally:
    os.close(descriptor)


def _this_process() -> Owner:
  pid = os.getpid()
  return Owner(uuid.uuid4().hex, platform.node(), pid, _machine(), _began(pid))


class Lease:
  """Holds a run directory while it is entered.

  Args:
    model_dir: run directory, local or gs://; made if need be.
    beat: seconds between two counts.
    note: receives that an owner is waited for, or was succeeded.

  Raises:
    DirectoryInUse: on entering, if another run has it.
    ConfigError: on entering, if it cannot be written.
  """

  def __init__(
    self, model_dir: str | os.PathLike, *, beat: float = BEAT, note: Callable[[str], None] = print
  ):
    self._directory = absolute(model_dir)
    self._path = self._directory / NAME
    self._beat = beat
    self._note = note
    self._mine = _this_process()
    self._lost: Owner | None = None
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._count, name='lease', daemon=True)

  def __enter__(self) -> Self:
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      self._take()
    except OSError as error:
      raise ConfigError(
        f'The run directory {self._directory} cannot be used: {error}. Set MODEL_DIR to a place '
        'that can be written.'
      ) from error
    self._thread.start()
    return self

  def __exit__(self, *unused) -> None:
    self._ended.set()
    self._thread.join()
    self.release()

  def release(self) -> None:
    """Gives the directory free for whoever comes next."""
    with contextlib.suppress(OSError):
      if (owner := self._read()) and owner.key == self._mine.key:
        self._path.unlink()

  def check(self) -> None:
    """Raises DirectoryInUse once another run has taken the directory from this one."""
    if self._lost is not None:
      raise DirectoryInUse(
        f'{self._directory} was taken over by process {self._lost.pid} on {self._lost.host}, as '
        'this one had not counted its lease for long (stopped, or cut off from the directory). '
        'The other goes on; this one ends without a further save.'
      )

  # --- taking it

  def _take(self) -> None:
    owner = self._read()
    if owner is not None:
      self._refuse_if_alive(owner)
    with _locked(self._directory) as locked:
      now = self._read()
      if now is not None and (owner is None or now != owner):
        raise self._in_use(now)  # another successor was faster
      write_whole(self._path, self._encoded(self._mine))
    if not locked:
      time.sleep(min(_SETTLE, self._beat))
    found = self._read()
    if found is None or found.key != self._mine.key:
      raise self._in_use(found or self._mine)
    if owner is not None:
      self._note(f'Took over from process {owner.pid} on {owner.host}, which is gone.')

  def _refuse_if_alive(self, owner: Owner) -> None:
    """Raises DirectoryInUse where the owner lives; waits to see it count where need be."""
    lives = owner.lives()
    if lives:
      raise self._in_use(owner)
    patience = 0 if lives is False else _GONE * self._beat
    if patience:
      self._note(
        f'{self._directory} was held by process {owner.pid} on {owner.host}; waiting '
        f'{patience:.0f} s to see whether it still counts.'
      )
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
      time.sleep(min(1.0, self._beat / 4))
      now = self._read()
      if now is None:
        return
      if (now.key, now.count) != (owner.key, owner.count):
        raise self._in_use(now)

  def _in_use(self, owner: Owner) -> DirectoryInUse:
    return DirectoryInUse(
      f'{self._directory} is in use: process {owner.pid} on {owner.host} trains there. Two runs in '
      'one directory destroy each other: set another MODEL_DIR, or wait for that one to end.'
    )

  # --- keeping it

  def _count(self) -> None:
    while not self._ended.wait(self._beat):
      self._mine = dataclasses.replace(self._mine, count=self._mine.count + 1)
      try:
        owner = self._read()
        if owner is not None and owner.key != self._mine.key:
          self._lost = owner
          return
        self._write(self._mine)
      except OSError:
        continue  # a disk that fails for longer lets the lease run out, which check() tells

  def _write(self, owner: Owner) -> None:
    if is_remote(self._path) or not self._path.exists():
      write_whole(self._path, self._encoded(owner))
      return
    with open(self._path, 'r+b', buffering=0) as file:
      file.write(self._encoded(owner))

  def _encoded(self, owner: Owner) -> bytes:
    return json.dumps(dataclasses.asdict(owner)).encode().ljust(_SIZE - 1) + b'\n'

  def _read(self, path=None) -> Owner | None:
    """Who a file says has the directory; None without a file, or with one that a kill has cut."""
    path = path or self._path
    try:
      return fields.read(Owner, safe_json.read(path, limit=1 << 16), os.fspath(path))
    except FileNotFoundError:
      return None
    except (Unreadable, ConfigError):
      return Owner('', 'an unknown machine', 0, '', 0)
