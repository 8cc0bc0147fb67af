"""Mutates a file many times and looks at what its reader does: refuses it by name, or reads it."""

from __future__ import annotations

import pathlib
import random
import resource
import signal
from collections.abc import Callable

from tests.fuzz import mutate

SECONDS = 20  # for one mutation; a right one takes milliseconds
MEMORY = 700 << 20  # bytes that the process may grow by over all mutations of a file
LONGER = 60  # times as many under `slow`


def _hung(*unused):
  raise AssertionError(f'no end after {SECONDS} s')


def _files(place: pathlib.Path) -> set[str]:
  return {str(p.relative_to(place)) for p in place.rglob('*')}


def _any(content: bytes, dice: random.Random, number: int) -> bytes:
  del number
  return mutate.of_file(content, dice)


def fuzz(
  path: pathlib.Path,
  use: Callable[[], object],
  times: int,
  seed: str,
  place: pathlib.Path,
  *,
  errors: tuple[type[BaseException], ...],
  mutation: Callable[[bytes, random.Random, int], bytes] = lambda x, dice, n: mutate.of_file(
    x, dice
  ),
  least: float = 0.25,
) -> None:
  """Mutates a file so often.

  Args:
    use: reads it; returns what it found wrong, if that is no error.
    errors: what a user is told in one line.
    mutation: (content, dice, number) -> content.
    least: share of mutations that the reader must notice; the others it reads.
    place: nothing may appear in it.

  Raises:
    AssertionError: a mutation took too long or too much memory, raised something else, or left
      something behind.
  """
  original, before = path.read_bytes(), _files(place)
  memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  dice, refused = random.Random(seed), 0
  signal.signal(signal.SIGALRM, _hung)
  for number in range(times):
    mutated = mutation(original, dice, number)
    path.write_bytes(mutated)
    signal.alarm(SECONDS)
    try:
      refused += bool(use())
    except errors:
      refused += 1
    except BaseException as error:
      (place / 'mutation').write_bytes(mutated)
      raise AssertionError(f'{seed}, mutation {number}: {error!r}') from error
    finally:
      signal.alarm(0)
  path.write_bytes(original)
  grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) << 10
  assert grown < MEMORY, f'{grown >> 20} MB more than before'
  assert _files(place) == before
  assert refused >= times * least, 'mutations that matter'
