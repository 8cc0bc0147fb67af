"""Documents that are not to be trained on: a versioned list, honoured without moving any other.

  {"version": 2, "exclude": {"demo_prose": ["texts/prose.jsonl:17", 80231]}}

Corpora are named as inspect_data names the source of a row, documents as it names them: by file
and record, or by number. The stream is cut into examples as it always is, and an example in which
an excluded document has a token is left out as a whole; every other one is the same, and they
follow one another as before. So a run may go on with a longer list, or a shorter one, from any of
its checkpoints. What was read ahead when it was saved (some hundred examples a shard) goes on.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping

from openmoe.checkpoint import safe_json
from openmoe.checkpoint.paths import Unreadable, read_small
from openmoe.config import ConfigError

EXCLUDED = -2  # in place of the number of a document that is left out
MARKED = -3  # in place of the number of a document that is looked for
_LIMIT = 256 << 20  # bytes of a list


@dataclasses.dataclass(frozen=True)
class Exclusion:
  """A list of documents.

  Attributes:
    path: where it was read.
    version: that its author gave it.
    digest: SHA-256 of the file, 16 digits.
    documents: corpus -> file and record, or number, of each.
  """

  path: str
  version: int
  digest: str
  documents: Mapping[str, tuple[str | int, ...]]

  def plain(self) -> dict[str, object]:
    """What a checkpoint says of it."""
    count = sum(map(len, self.documents.values()))
    return {'version': self.version, 'digest': self.digest, 'documents': count}


@functools.lru_cache(maxsize=8)
def _load(path: str, stamp: tuple) -> Exclusion:
  del stamp  # a file that changes is read again
  try:
    content = read_small(path, _LIMIT)
    told = safe_json.parse(content, path)
    version = safe_json.field(told, 'version', int, path)
    listed = safe_json.field(told, 'exclude', dict, path)
  except Unreadable as error:
    raise ConfigError(f'The list of excluded documents cannot be read: {error}') from error
  documents = {}
  for corpus, names in listed.items():
    if not isinstance(names, list) or not all(type(name) in (int, str) for name in names):
      raise ConfigError(f'{path}: documents of {corpus} must be a list of FILE:RECORD or numbers.')
    documents[corpus] = tuple(names)
  return Exclusion(path, version, hashlib.sha256(content).hexdigest()[:16], documents)


def load(path: str) -> Exclusion:
  """Reads a list.

  Raises:
    ConfigError: it is not there, or no such list.
  """
  try:
    status = os.stat(path)
  except OSError as error:
    raise ConfigError(
      f'The list of excluded documents {path} cannot be read ({error.strerror}); check '
      'DataConfig.exclude.'
    ) from error
  return _load(path, (status.st_mtime_ns, status.st_size))


@dataclasses.dataclass
class _Active:
  numbers: Mapping[str, frozenset[int]]
  find: Callable[[str], int | None]
  met: set[str] = dataclasses.field(default_factory=set)  # corpora that know their documents
  marked: bool = False


_active: contextvars.ContextVar[_Active | None] = contextvars.ContextVar('excluded', default=None)


@contextlib.contextmanager
def applied(
  numbers: Mapping[str, frozenset[int]],
  name: str,
  wanted: str | int | None = None,
  find: Callable[[str], int | None] = lambda corpus: None,
) -> Iterator[None]:
  """Pipelines that are built inside leave these documents out, and mark the one that is wanted.

  Args:
    numbers: corpus -> numbers of its documents.
    name: of the mixture or task, for messages.
    wanted: document whose examples are marked, for messages.
    find: corpus -> its number there, or None.

  Raises:
    ConfigError: a corpus that is listed is not built in a way that knows its documents, or none
      has the document that is wanted.
  """
  active = _Active(numbers, find)
  token = _active.set(active)
  try:
    yield
  finally:
    _active.reset(token)
  if unknown := sorted(numbers.keys() - active.met):
    raise ConfigError(
      f'Documents of {", ".join(unknown)} are to be excluded from {name}, which has no such corpus '
      'or does not know its documents (the reference tasks do not); '
      f'known there: {sorted(active.met) or "none"}.'
    )
  if wanted is not None and not active.marked:
    raise ConfigError(
      f'{name} has no document {wanted!r}; corpora that know their documents: '
      f'{", ".join(sorted(active.met)) or "none (the reference tasks do not)"}. Name it as '
      'inspect_data does in the rows of a step, FILE:RECORD with records from 1, or by its number.'
    )


def signs(corpus: str | None) -> dict[int, list[int]]:
  """What stands in place of numbers of documents in the pipeline that is being built.

  Returns:
    EXCLUDED or MARKED -> numbers of documents of the corpus.
  """
  active = _active.get()
  if active is None or corpus is None:
    return {}
  active.met.add(corpus)
  found = {EXCLUDED: sorted(active.numbers.get(corpus, ()))}
  if (number := active.find(corpus)) is not None:
    active.marked = True
    found[MARKED] = [number]
  return {sign: numbers for sign, numbers in found.items() if numbers}
