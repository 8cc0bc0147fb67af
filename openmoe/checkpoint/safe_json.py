"""JSON that anybody may have written: the one room where it is read.

`loads` has one error for all that can be wrong with a text. For files of facts, which are small and
shallow, `read` and `parse` also refuse what would fill memory, recurse too deep, or fail somewhere
later as a value of another type; `field` takes one value of a known type out of a mapping.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from openmoe.checkpoint.paths import Unreadable, read_small

LIMIT = 32 << 20  # bytes of a file
DEPTH = 64  # of lists and mappings in one another
CONTAINERS = 2 << 20  # lists and mappings: some 64 bytes each, however short their text
_NAMES = {dict: 'an object', list: 'a list', str: 'a text', bool: 'true or false', int: 'a count'}
_MISSING = object()


class JsonError(ValueError):
  """A text is no JSON, or such that reading it would not end well; the message says why.

  Attributes:
    position: ' at line 3 column 7', or '' where it is not known.
  """

  position = ''


def loads(text: str, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
  """json.loads with one error for everything that can be wrong.

  Args:
    hook: makes an object of its pairs.

  Raises:
    JsonError: see there.
  """
  try:
    return json.loads(text, object_pairs_hook=hook)
  except json.JSONDecodeError as error:
    found = JsonError(error.msg)
    found.position = f' at line {error.lineno} column {error.colno}'
    raise found from None
  except RecursionError:
    raise JsonError('nested too deeply') from None
  except Unreadable:  # of the hook
    raise
  except ValueError:  # int() takes no number of more than 4300 digits
    raise JsonError('a number that is too long') from None


def read(path: os.PathLike | str, kind: type = dict, *, limit: int = LIMIT) -> Any:
  """The value in a JSON file.

  Args:
    kind: what it has to be: dict or list.
    limit: bytes.

  Raises:
    Unreadable: the file is too large or no file, or as parse().
    OSError: it cannot be read.
  """
  return parse(read_small(path, limit), os.fspath(path), kind)


def parse(content: bytes, where: str, kind: type = dict, *, once: bool = False) -> Any:
  """The value of a JSON text.

  Args:
    where: what a message calls it.
    once: refuses a name that one object has twice.

  Raises:
    Unreadable: it is no JSON in UTF-8, too deep, of too many parts, or of another kind.
  """
  content = content.removeprefix(b'\xef\xbb\xbf')  # as editors on Windows put it there
  if not content.strip():
    raise Unreadable(f'{where} is empty: copying or downloading it failed; get it again.')
  if content.lstrip().startswith(b'<'):
    raise Unreadable(f'{where} is a web page and no JSON, as of an error; download it again.')
  if content.count(b'[') + content.count(b'{') > CONTAINERS:
    raise Unreadable(f'{where} has more than {CONTAINERS} lists and objects.')

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
      seen: set[str] = set()
      doubled = sorted({name for name, _ in pairs if name in seen or seen.add(name)})
      raise Unreadable(f'{where}: {doubled[:8]!s} is there more than once.')
    return found

  try:
    value = loads(content.decode('utf-8'), unique if once else None)
  except UnicodeDecodeError as error:
    raise Unreadable(
      f'{where} is no JSON in UTF-8 (byte {error.start + 1}); get it again, or save it as UTF-8.'
    ) from error
  except JsonError as error:
    raise Unreadable(f'{where} is no JSON: {error}{error.position}; get it again.') from error
  _check_depth_and_text(value, where)
  if not isinstance(value, kind):
    raise Unreadable(f'{where} holds {_name(type(value))}; {_name(kind)} belongs there.')
  return value


def field(value: Mapping[str, Any], name: str, kind: type, where: str, default=_MISSING) -> Any:
  """value[name], which must be of `kind`; an int is a count or size: no bool, not negative.

  Raises:
    Unreadable: it is missing without a default, or of another type.
  """
  if name not in value and default is not _MISSING:
    return default
  if name not in value:
    raise Unreadable(f'{where} lacks {name}.')
  found = value[name]
  wrong = not isinstance(found, (int, float) if kind is float else kind)
  wrong |= isinstance(found, bool) and kind is not bool
  if wrong or (kind is int and found < 0):
    raise Unreadable(f'{where}: {name} is {_shown(found)}; {_name(kind)} belongs there.')
  return found


def _check_depth_and_text(value: Any, where: str) -> None:
  waiting = [iter((value,))]
  while waiting:
    for child in waiting[-1]:
      if isinstance(child, str):
        _check_text(child, where)
      elif isinstance(child, (dict, list)):
        if len(waiting) > DEPTH:
          raise Unreadable(f'{where} is nested deeper than {DEPTH} levels.')
        if isinstance(child, dict):
          for name in child:
            _check_text(name, where)
        waiting.append(iter(child.values() if isinstance(child, dict) else child))
        break
    else:
      waiting.pop()


def _check_text(text: str, where: str) -> None:
  # Half a surrogate pair parses, and then cannot be printed or be a file's name.
  if not text.isascii():
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise Unreadable(f'{where} has {text[:80]!a}, which is no valid text.') from error


def _name(kind: type) -> str:
  return _NAMES.get(kind, 'a number' if kind is float else 'null')


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f'{text[:77]}...'
