"""Paths and files: near or remote, of which step; read without surprises, written whole or not.

What is read here may come from anybody: a named pipe would never end, a device would end never.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from typing import BinaryIO

from etils import epath

PREFIX = 'checkpoint'
PARTIAL = '.partial'  # what an unfinished file's name ends with
LFS = b'version https://git-lfs.github.com/spec/'  # how a file begins that git-lfs did not fetch


class Unreadable(ValueError):
  """A file that is not what it has to be; the message names the file and the rule."""

  exit_code = 65


def is_remote(path: os.PathLike | str) -> bool:
  """Whether a path lies in an object store such as gs://.

  Objects there appear whole or not at all and carry the store's own checksum.
  """
  return '://' in os.fspath(path)


def absolute(path: os.PathLike | str) -> epath.Path:
  """A path that stays right when the working directory changes; remote ones are so already."""
  return epath.Path(path if is_remote(path) else os.path.abspath(path))


def checkpoint_name(step: int) -> str:
  """Name of a checkpoint's directory in its run directory."""
  return f'{PREFIX}_{step}'


def step_of(path: os.PathLike | str) -> int | None:
  """The step that a checkpoint directory is named for, or None for any other name.

  >>> step_of('runs/tiny/checkpoint_400'), step_of('runs/tiny/damaged_checkpoint_400')
  (400, None)
  """
  name = os.fspath(path).rstrip('/').rsplit('/', 1)[-1]
  named = re.fullmatch(PREFIX + r'_([0-9]{1,18})', name)
  return int(named[1]) if named else None


def is_inside(name: str) -> bool:
  """Whether a relative name stays in its directory; for names that a file tells.

  >>> is_inside('params/a.b/0.0'), is_inside('../a'), is_inside('/a'), is_inside('')
  (True, False, False, False)
  """
  return bool(name) and '\0' not in name and not {'', '.', '..'} & set(name.split('/'))


def open_regular(path: os.PathLike | str) -> BinaryIO:
  """Opens a file for reading; without a buffer where it is local.

  Raises:
    Unreadable: it is a pipe, a device or a directory.
    OSError: it cannot be opened.
  """
  if is_remote(path):
    return epath.Path(path).open('rb')
  # Without O_NONBLOCK the opening of a pipe waits for somebody who writes.
  descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  if not stat.S_ISREG(os.fstat(descriptor).st_mode):
    os.close(descriptor)
    raise Unreadable(f'{os.fspath(path)} is a pipe, a device or a directory; a file belongs here.')
  return os.fdopen(descriptor, 'rb', buffering=0)


def read_small(path: os.PathLike | str, limit: int) -> bytes:
  """A whole file of at most `limit` bytes.

  Raises:
    Unreadable: it is larger, no regular file, or a pointer in the place of one.
    OSError: it cannot be read.
  """
  parts, left = [], limit + 1
  with open_regular(path) as file:
    while left and (part := file.read(min(left, 1 << 24))):
      parts.append(part)
      left -= len(part)
  if not left:
    raise Unreadable(f'{os.fspath(path)} is larger than {limit} bytes; no such file needs more.')
  content = b''.join(parts)
  if content.startswith(LFS):
    raise Unreadable(
      f'{os.fspath(path)} is a Git LFS pointer, not the file: `git lfs pull` in its folder, or '
      'download it.'
    )
  return content


def write_whole(path: os.PathLike | str, content: bytes, *, sync: bool = False) -> None:
  """Replaces a file as a whole: a reader, a kill or a full disk never leaves half of it.

  Args:
    sync: waits until the disk has it.

  Raises:
    OSError: it cannot be written; what was there before still is.
  """
  if is_remote(path):
    epath.Path(path).write_bytes(content)
    return
  # Processes that write the same file do not meet in its unfinished form.
  unfinished = f'{os.fspath(path)}.{os.getpid()}{PARTIAL}'
  try:
    with open(unfinished, 'wb') as file:
      file.write(content)
      file.flush()
      if sync:
        os.fsync(file.fileno())
    os.replace(unfinished, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(unfinished)
    raise
