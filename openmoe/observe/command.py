"""What every command does around its work: exit codes, Ctrl-C, closed pipes, messages in one line.

An exception that a user can do something about has an `exit_code`: 64 where something cannot be
done as asked (EX_USAGE), 65 where data are damaged (EX_DATAERR). Everything else is a fault of ours
and keeps its traceback. Imports the standard library alone, so that a command can call prepare()
before its slow imports.
"""

from __future__ import annotations

import argparse
import errno
import functools
import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from openmoe.observe.text import visible

USAGE, DAMAGED, INTERRUPTED = 64, 65, 130
_REMEDIES = {
  errno.ENOSPC: 'the disk is full: free some space, then give the same command again',
  errno.EDQUOT: 'the quota is used up: free some space, then give the same command again',
  errno.EROFS: 'it lies on a read-only file system: choose another place',
  errno.EACCES: 'this user may not: choose another place, or change its permissions',
  errno.EPERM: 'this user may not: choose another place, or change its permissions',
  errno.ENOENT: 'there is no such file or directory: check the path',
  errno.ENOTDIR: 'a file lies where a directory belongs: choose another place',
  errno.EISDIR: 'it is a directory; a file belongs there',
  errno.EEXIST: 'something lies there already: choose another place',
  errno.ENAMETOOLONG: 'the name is too long: choose another',
  errno.EIO: 'the disk failed: check it, or take another copy',
}


def prepare(name: str) -> None:
  """Makes a program of a module before it imports what is slow.

  Ctrl-C ends it in silence, standard streams that are closed lead nowhere, input is UTF-8, and
  output replaces what the terminal cannot show.

  Args:
    name: the module's __name__; a module that is only imported changes nothing.
  """
  if name != '__main__':
    return
  sys.excepthook, sys.unraisablehook = _excepthook, _unraisablehook
  if sys.stdin is None:
    sys.stdin = open(os.devnull, encoding='utf-8')  # noqa: SIM115 (until the process ends)
  for stream in ('stdout', 'stderr'):
    if getattr(sys, stream) is None:
      setattr(sys, stream, open(os.devnull, 'w', encoding='utf-8'))  # noqa: SIM115 (as above)
  sys.stdin.reconfigure(encoding='utf-8')
  sys.stdout.reconfigure(errors='replace')


def _excepthook(kind, error, traceback) -> None:
  if issubclass(kind, KeyboardInterrupt):
    raise SystemExit(_interrupted())
  sys.__excepthook__(kind, error, traceback)


def _unraisablehook(unraisable) -> None:
  # Writes of a save that has failed, and was told of, come back to a loop that is gone.
  if str(unraisable.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(unraisable)


def guarded(main: Callable[..., int | None]) -> Callable[..., int]:
  """main, returning an exit code also where it raises: see the module's docstring."""

  @functools.wraps(main)
  def run(*args, **kwargs) -> int:
    try:
      code = main(*args, **kwargs) or 0
      sys.stdout.flush()
    except KeyboardInterrupt:
      return _interrupted()
    except BrokenPipeError:  # `| head` has seen enough
      _lead_nowhere()
      return 0
    except Exception as error:
      message = explain(error)
      if message is None:
        raise
      if isinstance(error, OSError):
        _lead_nowhere()
      return fail(message, getattr(error, 'exit_code', USAGE))
    return code

  return run


def fail(message: str, code: int = USAGE) -> int:
  """Prints an error as one line that no file can colour or forge; returns the exit code."""
  line = visible(re.sub(r'\s*\n\s*', ' ', message.strip()))
  print(f'error: {line}', file=sys.stderr)
  return code


def explain(error: BaseException) -> str | None:
  """The message for a user, or None where the error is not one of a user's."""
  if hasattr(error, 'exit_code'):
    return str(error)
  if not isinstance(error, OSError):
    return None
  what = ' -> '.join(str(name) for name in (error.filename, error.filename2) if name is not None)
  remedy = _REMEDIES.get(error.errno, error.strerror or str(error))
  return f'{what}: {remedy}.' if what else f'Reading or writing failed: {remedy}.'


def _interrupted() -> int:
  print(file=sys.stderr)
  return INTERRUPTED


def _lead_nowhere() -> None:
  """Gives what is left in a standard output that cannot be written to nobody.

  Else Python tries again when it ends, and complains.
  """
  try:
    sys.stdout.flush()
  except OSError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
  """Arguments of a command: its module's docstring as help, no abbreviations, exit code 64."""

  def __init__(self, doc: str | None = None, **options):
    options = {'formatter_class': argparse.RawDescriptionHelpFormatter} | options
    options = {'description': doc, 'allow_abbrev': False} | options
    super().__init__(**options)

  def error(self, message: str) -> NoReturn:
    """Ends the program for a wrong argument."""
    self.print_usage(sys.stderr)
    raise SystemExit(fail(message))


def names(text: str) -> list[str]:
  """Type of an argument: words with commas between them.

  >>> names('a,b')
  ['a', 'b']
  """
  return [word.strip() for word in text.split(',') if word.strip()]
