"""Frozen dataclasses as plain values, and back from values that nobody vouches for.

What is read may come from anywhere: types, ranges, sizes, nesting and control characters are
checked before a value is used, and every error names file, field, value, rule and remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from openmoe.config import ConfigError

T = TypeVar('T')
LARGEST_INT = 2**63 - 1
LONGEST_LINE, LONGEST_TEXT, LONGEST_LIST = 1024, 1 << 18, 1000
REMEDY = 'take an undamaged copy of the file'
# What is done once for each of so many: a wrong number here must not cost hours.
_MOST = {'num_layers': 4096, 'num_sparse_layers': 4096, 'num_experts': 1 << 16}
_MOST |= {'vocab_size': 1 << 28, 'embed_dim': 1 << 24, 'mlp_dim': 1 << 24}
_MOST |= {'num_heads': 1 << 16, 'head_dim': 1 << 16}


def shown(value: object) -> str:
  """A value for a message: one line, cut to 80 characters, control characters escaped."""
  text = repr(value)
  return text if len(text) <= 80 else f'{text[:77]}...'


def plain(value: Any) -> Any:
  """A dataclass as values that JSON has: enums by value, tuples as lists, nested as dicts."""
  if dataclasses.is_dataclass(value):
    return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
  if isinstance(value, enum.Enum):
    return value.value
  return [plain(item) for item in value] if isinstance(value, tuple) else value


def read(kind: type[T], fields: object, where: str, remedy: str = REMEDY) -> T:
  """A dataclass from plain values; fields that are left out take their defaults.

  Args:
    kind: the dataclass; its annotations say what is allowed. A field of text is one line, but for
      those whose name ends in `_text`.
    where: the file and, for a part of it, the field, for messages.

  Raises:
    ConfigError: something is missing, unknown, of another type, out of range, or breaks a rule.
  """
  if not isinstance(fields, Mapping):
    raise ConfigError(f'{where} is {shown(fields)}, not an object with named fields; {remedy}.')
  hints = typing.get_type_hints(kind)
  known = [field.name for field in dataclasses.fields(kind)]
  for name in fields:
    if name not in known:
      near = difflib.get_close_matches(str(name), known, n=1)
      hint = f' (nearest: {near[0]})' if near else ''
      raise ConfigError(
        f'{where} has the field {shown(name)}={shown(fields[name])}, which {kind.__name__} does '
        f'not have here{hint}; take a version of this project that knows it, or {remedy}.'
      )
  missing = [
    field.name
    for field in dataclasses.fields(kind)
    if field.name not in fields
    and field.default is dataclasses.MISSING
    and field.default_factory is dataclasses.MISSING
  ]
  if missing:
    raise ConfigError(f'{where} lacks {", ".join(missing)}, which every {kind.__name__} has; '
                      f'{remedy}.')  # fmt: skip
  values = {
    name: _value(hints[name], value, name, f'{where}: {name}', remedy)
    for name, value in fields.items()
  }
  try:
    return kind(**values)
  except ConfigError as error:
    raise ConfigError(f'{where}: {str(error).rstrip(".")}; {remedy}.') from error


def _value(hint: Any, value: Any, name: str, where: str, remedy: str) -> Any:
  """`value` as the annotation `hint` has it."""
  refuse = lambda rule: ConfigError(f'{where}={shown(value)} must be {rule}; {remedy}.')
  if typing.get_origin(hint) in (types.UnionType, typing.Union):
    if value is None:
      return None
    (hint,) = (h for h in typing.get_args(hint) if h is not type(None))
  if typing.get_origin(hint) is tuple:
    if not isinstance(value, list | tuple) or len(value) > LONGEST_LIST:
      raise refuse(f'a list of at most {LONGEST_LIST} values')
    inner = typing.get_args(hint)[0]
    return tuple(_value(inner, item, name, where, remedy) for item in value)
  if dataclasses.is_dataclass(hint):
    return read(hint, value, where, remedy)
  if isinstance(hint, type) and issubclass(hint, enum.Enum):
    known = [member.value for member in hint]
    if not isinstance(value, str) or value not in known:
      raise refuse(f'one of {known}')
    return hint(value)
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if hint is bool:
    if not isinstance(value, bool):
      raise refuse('true or false')
  elif hint is int:
    most = _MOST.get(name, LARGEST_INT)
    if not is_number or not isinstance(value, int) or not 0 <= value <= most:
      raise refuse(f'a whole number from 0 to {most}')
  elif hint is float:
    if not is_number or abs(value) > 1e30 or not math.isfinite(value):
      raise refuse('a finite number')
    return float(value)
  elif hint is str:
    _check_text(value, name, refuse)
  return value


def _check_text(value: Any, name: str, refuse) -> None:
  if name.endswith('_text'):
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
      raise refuse(f'a text of at most {LONGEST_TEXT} characters')
  elif not isinstance(value, str) or len(value) > LONGEST_LINE or not value.isprintable():
    raise refuse(f'a text of at most {LONGEST_LINE} characters without control characters')
