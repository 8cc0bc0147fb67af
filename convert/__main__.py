"""Converts checkpoints between t5x, Hugging Face and ours, and checks them; see verbs.py."""

from __future__ import annotations

import ctypes

from openmoe.observe import command

# Of glibc's malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX.
_MALLOC_OPTIONS = ((-3, 32 << 20), (-1, 64 << 20), (-8, 2))

command.prepare(__name__)


def _bound_the_heap() -> None:
  """Keeps glibc from holding on to large freed blocks, without returning every small piece.

  Left alone it raises its threshold for mapped blocks as they are freed, and keeps hundreds of
  megabytes; if pieces were mapped as well, page faults would take most of the time.
  """
  libc = ctypes.CDLL(None)
  if hasattr(libc, 'mallopt'):
    for option, value in _MALLOC_OPTIONS:
      libc.mallopt(option, value)


@command.guarded
def main(argv: list[str] | None = None) -> int:
  """The command line; returns its exit code."""
  _bound_the_heap()
  # Here, because the libraries take seconds, in which Ctrl-C may come.
  from convert import verbs

  return verbs.run(argv)


if __name__ == '__main__':
  raise SystemExit(main())
