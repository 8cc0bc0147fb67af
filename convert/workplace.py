"""The conversion itself: one tensor at a time through bounded memory, read back, written down.

Everything happens in a directory beside the final one. Each tensor that is complete gets a line in
a journal with its digests; a conversion that is interrupted and started again checks those against
the files and does only the rest. The final name appears when all is done.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
from etils import epath

from convert.core.forms import RECEIPT
from convert.core.tensors import (
  PIECE,
  ConvertError,
  Stored,
  Writable,
  as_bytes,
  cast,
  digest,
  is_finite,
  same_bytes,
  sync_file,
  transpose,
  write_synced,
)
from openmoe.checkpoint import safe_json
from openmoe.checkpoint.paths import PARTIAL, Unreadable, is_remote

# Two a core: while one waits for the disk, another hashes or transposes.
THREADS = min(8, 2 * (os.cpu_count() or 1))
MEMORY = 96 << 20  # bytes in flight over all threads, besides one tensor that needs more


@dataclasses.dataclass(frozen=True)
class Job:
  """One tensor to move.

  Attributes:
    source: what is read.
    target: what is written; its layout is that of the source, or its transpose.
    transpose: exchanges the last two axes.
  """

  source: Stored
  target: Writable
  transpose: bool = False

  @property
  def name(self) -> str:
    return self.target.stored.name

  @property
  def operation(self) -> str:
    steps = ['transpose'] if self.transpose else []
    if self.source.dtype != self.target.stored.dtype:
      steps.append(f'cast {self.source.dtype.name} to {self.target.stored.dtype.name}')
    return ', '.join(steps) or 'copy'

  @property
  def memory(self) -> int:
    """Bytes this job holds at its worst: what is read, its new form, and what is read back."""
    whole = self.transpose and len(self.source.shape) == 2
    row = self.source.nbytes // max(1, self.source.rows)
    held = self.source.nbytes if whole else self.source.step() * row
    return held + 2 * min(self.target.stored.nbytes, max(PIECE, 0 if whole else held))


class Budget:
  """Lets jobs begin while their bytes together stay under a limit.

  One that is larger by itself may run beside them, but only one: so memory is bounded by the
  largest job and the limit, and the others need not wait for it.
  """

  def __init__(self, limit: int):
    self._limit, self._held, self._larger = limit, 0, False
    self._changed = threading.Condition()

  def acquire(self, size: int) -> None:
    with self._changed:
      if size > self._limit:
        self._changed.wait_for(lambda: not self._larger)
        self._larger = True
      else:
        self._changed.wait_for(lambda: self._held + size <= self._limit)
        self._held += size

  def release(self, size: int) -> None:
    with self._changed:
      if size > self._limit:
        self._larger = False
      else:
        self._held -= size
      self._changed.notify_all()


def _outgoing(job: Job, before: Any) -> Iterator[tuple[int, np.ndarray]]:
  """(first row, rows) in the target's layout and dtype; hashes what is read on the way."""
  dtype, name = job.target.stored.dtype, job.source.name

  def checked(x: np.ndarray) -> np.ndarray:
    before.update(as_bytes(x))
    if not is_finite(x):
      raise ConvertError(f'{name} has values that are not finite; `fsck` lists all such tensors.')
    return x

  if not job.transpose or len(job.source.shape) > 2:
    for start, x in job.source.pieces():
      x = checked(x)
      yield start, cast(transpose(x) if job.transpose else x, dtype, name)
    return
  x = np.empty(job.source.shape, job.source.dtype)
  for start, piece in job.source.pieces():
    x[start : start + len(piece)] = checked(piece)
  step = job.target.stored.step()
  for start in range(0, job.target.stored.rows, step):
    yield start, cast(transpose(x[:, start : start + step]), dtype, name)


def move(job: Job) -> dict[str, Any]:
  """Converts one tensor, reads back every piece, and returns its line of the receipt.

  Raises:
    ConvertError: a shape disagrees, a value is not finite or overflows, or what was read back is
      not what was written.
  """
  shape = job.source.shape
  expected = (*shape[:-2], shape[-1], shape[-2]) if job.transpose else shape
  if tuple(expected) != tuple(job.target.stored.shape):
    raise ConvertError(
      f'{job.source.name} has shape {list(shape)}; {job.name} takes '
      f'{list(job.target.stored.shape)} by {job.operation}. Is --model the right one?'
    )
  before, after = hashlib.sha256(), hashlib.sha256()
  plain = job.operation == 'copy'
  for start, x in _outgoing(job, before):
    x = np.ascontiguousarray(x)
    job.target.write(start, x)
    back = job.target.stored.read(start, start + len(x)) if x.ndim else job.target.stored.read(0, 1)
    if not same_bytes(back, x):
      raise ConvertError(f'{job.name}: rows from {start} read back other than they were written.')
    if not plain:
      after.update(as_bytes(back))
  return {
    'target': job.name,
    'source': job.source.name,
    'operation': job.operation,
    'shape': list(job.target.stored.shape),
    'dtype': job.target.stored.dtype.name,
    'sha256_before': before.hexdigest(),
    # Every piece was compared, so a copy has the digest of its source.
    'sha256_after': before.hexdigest() if plain else after.hexdigest(),
  }


class Workplace:
  """The directory where a conversion grows, and its journal.

  Args:
    out: final directory; must not exist.
    plan: JSON-able description of the conversion; what an earlier, interrupted one left is only
      taken up if its plan is the same.

  Raises:
    ConvertError: `out` exists, or another process is converting to it.
  """

  def __init__(self, out: epath.Path, plan: Mapping[str, Any]):
    self.out, self._remote = out, is_remote(out)
    if out.exists():
      raise ConvertError(f'{out} exists already; remove it or choose another output.')
    # Object stores cannot rename, so there the receipt, written last, is the sign of completion.
    self.path = out if self._remote else out.parent / f'{out.name}.partial'
    self._plan = digest(plan)
    self._lock = threading.Lock()
    self._done: dict[str, dict[str, Any]] = {}
    self._journal = None
    if self._remote:
      return
    out.parent.mkdir(parents=True, exist_ok=True)
    self._take_lock()
    try:
      self._take_up()
    except BaseException:
      self.close()
      raise

  def _take_lock(self) -> None:
    # Beside the directory, so that it holds nothing but the checkpoint.
    self._journal_path = self.out.parent / f'.{self.out.name}.journal'
    self._lock_path = self.out.parent / f'.{self.out.name}.lock'
    while True:
      self._lock_file = open(self._lock_path, 'w', encoding='utf-8')  # noqa: SIM115 (held until close)
      try:
        # The kernel frees it when the process dies, however it dies.
        fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError as error:
        self._lock_file.close()
        raise ConvertError(f'Another process is converting to {self.out}; wait for it.') from error
      # The former holder removes its file: a lock on what is gone keeps nobody out.
      if _same_file(self._lock_file, self._lock_path):
        return
      self._lock_file.close()

  def _take_up(self) -> None:
    journal = self._journal_path
    lines = _json_lines(journal.read_bytes()) if journal.exists() else []
    if lines and lines[0].get('plan') == self._plan:
      is_text = lambda line, name: isinstance(line.get(name), str)
      whole = (n for n in lines[1:] if is_text(n, 'target') and is_text(n, 'sha256_after'))
      self._done = {line['target']: line for line in whole}
      _remove_leftovers(self.path)
    elif self.path.exists():
      shutil.rmtree(self.path)
    self.path.mkdir(parents=True, exist_ok=True)
    self._journal = open(journal, 'w', encoding='utf-8')  # noqa: SIM115 (held until close)
    self._note({'plan': self._plan})
    for line in self._done.values():
      self._note(line)

  def _note(self, line: Mapping[str, Any]) -> None:
    if self._journal is not None:
      self._journal.write(json.dumps(line) + '\n')
      self._journal.flush()

  def run(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Moves every tensor that an earlier attempt has not; receipt lines in the order of `jobs`.

    Raises:
      ConvertError: as move(); the first one stops the rest.
    """
    budget = Budget(MEMORY)

    def one(job: Job) -> dict[str, Any]:
      size = job.memory
      budget.acquire(size)
      try:
        known = self._done.get(job.name)
        if known and _matches(job, known):
          return known
        line = move(job)
      finally:
        budget.release(size)
      if not self._remote:
        job.target.sync()  # now, while others compute, and not all at the end
      with self._lock:
        self._note(line)
      return line

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
      futures = [pool.submit(one, job) for job in jobs]
      try:
        return [future.result() for future in futures]
      except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise

  def commit(self, receipt: bytes) -> None:
    """Syncs everything, writes the receipt and gives the directory its final name."""
    if self._remote:
      (self.path / RECEIPT).write_bytes(receipt)
      return
    write_synced(self.path / RECEIPT, receipt)
    _sync_tree(self.path)
    os.rename(self.path, self.out)
    sync_file(self.out.parent)
    self._journal.close()
    self._journal_path.unlink()
    self.close()

  def close(self) -> None:
    """Frees the lock; what is unfinished stays for another attempt."""
    if not self._remote and not self._lock_file.closed:
      if self._journal is not None and not self._journal.closed:
        self._journal.close()
      self._lock_path.unlink(missing_ok=True)
      self._lock_file.close()


def _same_file(file: IO, path: os.PathLike | str) -> bool:
  """Whether an open file is still what a path names."""
  try:
    return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
  except FileNotFoundError:
    return False


def _json_lines(content: bytes) -> list[dict[str, Any]]:
  """Whole lines before the first damaged one: the last may have been cut off."""
  lines = []
  for line in content.split(b'\n')[:-1]:
    try:
      lines.append(safe_json.parse(line, 'journal'))
    except Unreadable:
      break
  return lines


def _remove_leftovers(path: epath.Path) -> None:
  """Removes what a killed process leaves behind: unfinished files of TensorStore, a receipt."""
  for folder, _, files in os.walk(path):
    for name in files:
      if '.__lock' in name or name == RECEIPT or name.endswith(PARTIAL):
        os.unlink(os.path.join(folder, name))


def _matches(job: Job, line: Mapping[str, Any]) -> bool:
  """Whether a tensor of an earlier attempt is on the disk as the journal says."""
  try:
    return job.target.stored.sha256() == line['sha256_after']
  except ConvertError:
    return False  # its chunks did not all reach the disk: it is done again


def _sync_tree(path: os.PathLike | str) -> None:
  for folder, _, files in os.walk(path, topdown=False):
    for name in files:
      sync_file(os.path.join(folder, name))
    sync_file(folder)
