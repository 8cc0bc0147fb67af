"""Columns of benchmark records: checked for what they should hold, whatever the file's kind.

Files of one benchmark differ in spelling: a label is 1, 1.0, '1', 'B' or '(b)'; a list is a list
or, in a .csv, the text of one. What is understood is taken alike from all of them. What is not is
refused with the record, never guessed at: a wrong reading would be a wrong score.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from openmoe.data.files import DamagedFile, parse_json, without_surrogates
from tasks.records import Record, whole_text

LETTERS = 'ABCDEFGHIJ'
_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_LIST = re.compile(rf'\[\s*(?:(?:{_QUOTED})[\s,]*)+\]', re.DOTALL)
_SHOWN = 60  # characters of a value in an error


def refuse(record: Record, said: str) -> DamagedFile:
  """The error for a record, to be raised."""
  return DamagedFile(f'{getattr(record, "where", "a record")}: {said}')


def shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= _SHOWN else f'{text[:_SHOWN]}...'


def has(record: Record, *names: str) -> bool:
  return any(name in record for name in names)


def get(record: Record, *names: str) -> Any:
  """The column with the first of these names that is there.

  Raises:
    DamagedFile: there is none.
  """
  for name in names:
    if name in record:
      return record[name]
  raise refuse(
    record,
    f'columns {sorted(map(str, record))} and no {names[0]!r}; use the file as it is published.',
  )


def as_text(record: Record, name: str, value: Any) -> str:
  """A value as text: text or a number, as an option may be one.

  Raises:
    DamagedFile: it is something else.
  """
  if isinstance(value, str):
    return value
  if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
    return str(value)
  said = 'is empty: is this a split without answers?' if value is None else 'holds no text'
  raise refuse(record, f'{name!r} {said} ({shown(value)}).')


def text(record: Record, *names: str, empty: bool = True) -> str:
  """A column of text; `empty` says whether it may be blank.

  Raises:
    DamagedFile: it is not there, or no text.
  """
  found = as_text(record, names[0], get(record, *names))
  if not empty and not found.strip():
    raise refuse(record, f'{names[0]!r} is empty; repair or remove the record.')
  return found


def structure(value: Any) -> Any:
  """A list or object; text of JSON, or of a Python or NumPy list of texts, as .csv files have it.

  Anything else is given back as it is.
  """
  if not isinstance(value, str) or value.lstrip()[:1] not in ('[', '{'):
    return value
  try:
    found = parse_json(value, 'a cell')
  except DamagedFile:
    return _python_list(value)
  # Escapes in a cell may be halves of surrogate pairs, as they may in a .json file.
  return whole_text(found, 'a cell')


def _python_list(value: str) -> list[str] | str:
  if not _LIST.fullmatch(value.strip()):
    return value
  quoted = re.findall(_QUOTED, value, re.DOTALL)
  try:
    return [without_surrogates(ast.literal_eval(text)) for text in quoted]
  except (ValueError, SyntaxError):  # a line end or half an escape between the quotes
    return value


def texts(record: Record, value: Any, name: str, least: int = 2) -> list[str]:
  """A list of at least so many texts, from a value of the record.

  Raises:
    DamagedFile: it is something else.
  """
  found = structure(value)
  if not isinstance(found, Sequence) or isinstance(found, str | bytes) or len(found) < least:
    raise refuse(record, f'{name!r} must be a list of at least {least}, not {shown(value)}.')
  return [as_text(record, name, item) for item in found]


def fields(record: Record, value: Any, name: str) -> Mapping[str, Any]:
  """An object with fields, from a value of the record.

  Raises:
    DamagedFile: it is something else.
  """
  found = structure(value)
  if not isinstance(found, Mapping):
    raise refuse(record, f'{name!r} must be an object with fields, not {shown(value)}.')
  return found


def whole(value: Any) -> int | None:
  """A whole number, also as 1.0 or '1'; None for anything else."""
  if isinstance(value, str) and re.fullmatch(r'\s*[+-]?[0-9]{1,18}(\.0{0,9})?\s*', value):
    return int(value.strip().split('.')[0])
  if isinstance(value, float) and value.is_integer():
    return int(value)
  return value if isinstance(value, int) and not isinstance(value, bool) else None


def hidden(value: Any) -> bool:
  """Whether a label is one of the marks of a split without answers: nothing, or -1."""
  if value is None or value != value or (isinstance(value, str) and not value.strip()):
    return True
  return whole(value) == -1


def letter(value: Any) -> int | None:
  """Place in the alphabet of 'B', 'b', '(B)', 'B.' or 'B)', from 0; None for anything else."""
  found = re.fullmatch(r'\s*\(?([A-Ja-j])[.):]?\s*', value) if isinstance(value, str) else None
  return LETTERS.index(found.group(1).upper()) if found else None


def label(record: Record, *names: str, count: int, first: int = 0, by_letter: bool = False) -> int:
  """Which of the choices is right, from 0.

  Args:
    record: holds the label.
    names: of its column; the first that is there.
    count: of choices.
    first: the number of the first choice in the file.
    by_letter: whether letters are understood as well.

  Raises:
    DamagedFile: it is hidden, or names none of the choices.
  """
  value = get(record, *names)
  if hidden(value):
    raise refuse(
      record,
      f'{names[0]!r} is empty or -1 ({shown(value)}): this is a split without answers; take one '
      'with them.',
    )
  number = whole(value)
  index = number - first if number is not None else (letter(value) if by_letter else None)
  if index is None or not 0 <= index < count:
    letters = f', or a letter up to {LETTERS[min(count, 10) - 1]}' if by_letter else ''
    raise refuse(
      record, f'{names[0]!r} is {shown(value)}, not {first} to {first + count - 1}{letters}.'
    )
  return index
