"""What a set of gin files says: bindings under their modules' full names, as gin has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from convert.core.tensors import ConvertError
from convert.t5x_gin.parse import Macro, Reference, Statement, parse
from openmoe.checkpoint.paths import read_small

REQUIRED = Macro('gin.REQUIRED')
_LARGEST_FILE = 1 << 20
_MOST_FILES = 256


@dataclasses.dataclass(frozen=True)
class Bound:
  """One value in use.

  Attributes:
    scope: that it was given for.
    name: of the configurable, with its module, and the argument.
    value: without macros.
    where: file and line.
  """

  scope: str
  name: str
  value: Any
  where: str

  def __str__(self) -> str:
    scope = f'{self.scope}/' if self.scope else ''
    value = self.value if isinstance(self.value, Reference | Macro) else repr(self.value)
    return f'{scope}{self.name} = {value}'


class Configuration:
  """Bindings of gin files, read in order; later ones win.

  Attributes:
    macros: (value, where) by name.
    used: macros that something in use reads.
  """

  def __init__(self, paths: Sequence[str], search_paths: Sequence[str] = ()):
    """Reads files and what they include.

    Args:
      paths: files.
      search_paths: where includes are looked for, also without their first folder: the original's
        include 'flaxformer/flaxformer/t5x/...' is found in a checkout of flaxformer.

    Raises:
      ConvertError: a file is missing, includes itself, or is no gin file.
    """
    self.macros: dict[str, tuple[Any, str]] = {}
    self.used: set[str] = set()
    self._bindings: dict[tuple[str, str, str], tuple[Any, str]] = {}
    self._modules: dict[str, str] = {}
    self._places = [epath.Path(p) for p in (*search_paths, '.')]
    self._count = 0
    for path in paths:
      self._read(self._find(path, path), ())

  def _find(self, name: str, asked: str) -> epath.Path:
    shorter = name.partition('/')[2]
    for place in self._places:
      for part in (name, shorter):
        if part and (place / part).is_file():
          return place / part
    where = ', '.join(str(p) for p in self._places)
    raise ConvertError(
      f'{asked} is not in {where}; give the checkouts of t5x and flaxformer that it belongs to: '
      '--gin_search_paths=T5X,FLAXFORMER.'
    )

  def _read(self, path: epath.Path, above: tuple[str, ...]) -> None:
    self._count += 1
    if str(path) in above or self._count > _MOST_FILES:
      raise ConvertError(f'{path} includes itself, by way of {list(above)}; remove one include.')
    try:
      text = read_small(path, _LARGEST_FILE).decode('utf-8-sig')
    except (OSError, ValueError) as error:
      raise ConvertError(f'{path} cannot be read: {error}') from error
    for statement in parse(text, str(path)):
      where = f'{path} line {statement.line}'
      if statement.kind == 'import':
        self._modules[statement.name] = statement.value
      elif statement.kind == 'include':
        asked = f"{where}: include '{statement.name}'"
        self._read(self._find(statement.name, asked), (*above, str(path)))
      else:
        self._bind(statement, where)

  def _bind(self, statement: Statement, where: str) -> None:
    value = self._named(statement.value)
    if not statement.argument:
      self.macros[statement.name] = (value, where)
      return
    key = (statement.scope, self._whole(statement.name), statement.argument)
    self._bindings.pop(key, None)
    self._bindings[key] = (value, where)

  def _whole(self, name: str) -> str:
    """A selector with its module's full name."""
    first, dot, rest = name.partition('.')
    return f'{self._modules.get(first, first)}{dot}{rest}'

  def _named(self, value: Any) -> Any:
    if isinstance(value, Reference):
      return dataclasses.replace(value, name=self._whole(value.name))
    if isinstance(value, list | tuple):
      return type(value)(self._named(x) for x in value)
    if isinstance(value, dict):
      return {k: self._named(v) for k, v in value.items()}
    return value

  def resolve(self, value: Any, seen: tuple[str, ...] = ()) -> Any:
    """A value without macros; a macro that nothing sets, and an enum's member, stay as they are.

    Raises:
      ConvertError: a macro is its own value.
    """
    if isinstance(value, Macro) and value.name in self.macros:
      if value.name in seen:
        raise ConvertError(f'The macro {value.name} is its own value, by way of {list(seen)}.')
      self.used.add(value.name)
      return self.resolve(self.macros[value.name][0], (*seen, value.name))
    if isinstance(value, list | tuple):
      return type(value)(self.resolve(x, seen) for x in value)
    if isinstance(value, dict):
      return {k: self.resolve(v, seen) for k, v in value.items()}
    return value

  def _of(self, name: str, scopes: Sequence[str]) -> Iterator[Bound]:
    """What a configurable is given where scopes are active; the innermost wins."""
    found: dict[tuple[str, str], Bound] = {}
    levels = ['', *('/'.join(scopes[: i + 1]) for i in range(len(scopes)))]
    for (scope, owner, argument), (value, where) in self._bindings.items():
      # A method's arguments belong to its class.
      if scope in levels and (owner == name or owner.startswith(f'{name}.')):
        key = (owner, argument)
        if key in found and levels.index(found[key].scope) > levels.index(scope):
          continue
        found[key] = Bound(scope, f'{owner}.{argument}', value, where)
    for bound in found.values():
      yield dataclasses.replace(bound, value=self.resolve(bound.value))

  def reached(self, root: str) -> Iterator[Bound]:
    """All that a call of `root` would read, each once."""
    waiting, seen, given = [(root, ())], set(), set()
    while waiting:
      name, scopes = waiting.pop(0)
      if (name, scopes) in seen:
        continue
      seen.add((name, scopes))
      for bound in self._of(name, scopes):
        if (bound.scope, bound.name) not in given:
          given.add((bound.scope, bound.name))
          yield bound
        for other in _references(bound.value):
          inner = tuple(other.scope.split('/')) if other.scope else scopes
          waiting.append((other.name, inner))

  def has(self, root: str) -> bool:
    """Whether anything is bound for a configurable."""
    return any(owner == root for _, owner, _ in self._bindings)

  def unread(self) -> list[str]:
    """'NAME = value (where)' of macros with a value that nothing in use reads."""
    return [
      f'{name} = {value if isinstance(value, Reference | Macro) else repr(value)} ({where})'
      for name, (value, where) in self.macros.items()
      if name not in self.used and value not in (None, REQUIRED)
    ]


def _references(value: Any) -> Iterator[Reference]:
  if isinstance(value, Reference):
    yield value
  elif isinstance(value, list | tuple):
    for part in value:
      yield from _references(part)
  elif isinstance(value, dict):
    for part in value.values():
      yield from _references(part)
