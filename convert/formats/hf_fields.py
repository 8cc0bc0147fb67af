"""Values of a config.json, which anybody may have written: of the right type, or refused."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from convert.core.tensors import ConvertError
from openmoe.checkpoint.fields import shown

REMEDY = 'repair it, or download it again'


def refuse(name: str, value: object, rule: str, where: str = 'config.json') -> ConvertError:
  """The error about a value that is not what it has to be."""
  return ConvertError(f'{where}: {name}={shown(value)} must be {rule}; {REMEDY}.')


def count(config: Mapping[str, Any], name: str, default: Any = None, least: int = 1) -> int:
  """A whole number.

  Raises:
    ConvertError: it is missing without a default, or no whole number of at least `least`.
  """
  value = config.get(name, default)
  if not isinstance(value, int) or isinstance(value, bool) or value < least:
    raise refuse(name, value, f'a whole number of at least {least}')
  return value


def number(config: Mapping[str, Any], name: str, default: Any = None) -> float:
  """A finite number.

  Raises:
    ConvertError: it is missing without a default, or no finite number.
  """
  value = config.get(name, default)
  if not isinstance(value, int | float) or isinstance(value, bool) or not -1e30 < value < 1e30:
    raise refuse(name, value, 'a finite number')
  return float(value)


def tokens(value: object, name: str, vocab_size: int, where: str) -> tuple[int, ...]:
  """Token ids, of one or of a list; none of null.

  Raises:
    ConvertError: one is no token below vocab_size.
  """
  found = []
  for one in value if isinstance(value, list) else [value]:
    if one is None:
      continue
    if type(one) is not int or not 0 <= one < vocab_size:
      raise refuse(name, one, f'a token below vocab_size={vocab_size}', where)
    found.append(one)
  return tuple(found)


def of_class(
  config: Mapping[str, Any], names: Iterable[tuple[str, str]], kind: type
) -> dict[str, Any]:
  """Fields of a configuration class, those that config.json has.

  Args:
    names: (name there, field of `kind`), whose annotation says what it must be.

  Raises:
    ConvertError: a number is none; texts are left to the class.
  """
  hints = typing.get_type_hints(kind)
  found = {}
  for name, field in names:
    hint = hints[field]
    optional = isinstance(hint, types.UnionType)
    if name not in config or (optional and config[name] is None):
      continue
    hint = typing.get_args(hint)[0] if optional else hint
    read = {int: count, float: number}.get(hint)
    found[field] = read(config, name) if read else config[name]
  return found
