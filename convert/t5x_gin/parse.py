"""A parser of gin files: statements with values, as data.

Gin's own parser needs every module that a file names. This one needs none: Python's tokenizer cuts
the text, and what may stand in a value is a literal, %MACRO, @scope/name or @scope/name(), and
lists, tuples and dicts of these.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import token
import tokenize
from collections.abc import Iterator, Sequence
from typing import Any

from convert.core.tensors import ConvertError

_SKIPPED = (token.COMMENT, token.NL, token.INDENT, token.DEDENT, token.ENCODING)
_END = (token.NEWLINE, token.ENDMARKER)
_WORDS = {'True': True, 'False': False, 'None': None}
_CLOSING = {'[': ']', '(': ')', '{': '}'}


@dataclasses.dataclass(frozen=True)
class Macro:
  """%NAME."""

  name: str

  def __str__(self) -> str:
    return f'%{self.name}'


@dataclasses.dataclass(frozen=True)
class Reference:
  """@scope/name or @scope/name()."""

  scope: str
  name: str
  called: bool

  def __str__(self) -> str:
    scope = f'{self.scope}/' if self.scope else ''
    return f'@{scope}{self.name}{"()" if self.called else ""}'


@dataclasses.dataclass(frozen=True)
class Statement:
  """One statement.

  Attributes:
    kind: 'import', 'include' or 'binding'.
    line: where it stands.
    scope: of a binding.
    name: alias of an import, path of an include, selector of a binding; a macro for no argument.
    argument: of the selector, '' for a macro.
    value: dotted module of an import; value of a binding.
  """

  kind: str
  line: int
  scope: str = ''
  name: str = ''
  argument: str = ''
  value: Any = None


def parse(text: str, where: str) -> list[Statement]:
  """The statements of a gin file.

  Raises:
    ConvertError: naming file and line where it is none.
  """
  try:
    pieces = list(tokenize.generate_tokens(io.StringIO(text).readline))
  except (tokenize.TokenError, SyntaxError) as error:
    raise ConvertError(f'{where} is no gin file: {error.args[0]}.') from error
  try:
    return list(_Parser(pieces, where).statements())
  except RecursionError as error:
    raise ConvertError(f'{where} is nested too deeply to be a gin file.') from error


class _Parser:
  def __init__(self, pieces: Sequence[tokenize.TokenInfo], where: str):
    # Blocks end where a line is not indented; all else about space is left out.
    self._pieces = [p for p in pieces if p.type not in _SKIPPED]
    self._at, self._where = 0, where

  @property
  def _now(self) -> tokenize.TokenInfo:
    return self._pieces[min(self._at, len(self._pieces) - 1)]

  def _wrong(self, wanted: str) -> ConvertError:
    line, found = self._now.start[0], self._now.string.strip() or 'the end of the line'
    return ConvertError(f'{self._where} line {line}: {found!r} where {wanted} belongs.')

  def _take(self, *strings: str) -> bool:
    if self._now.string in strings and self._now.type != token.STRING:
      self._at += 1
      return True
    return False

  def _need(self, string: str) -> None:
    if not self._take(string):
      raise self._wrong(repr(string))

  def _word(self) -> str:
    if self._now.type != token.NAME:
      raise self._wrong('a name')
    self._at += 1
    return self._pieces[self._at - 1].string

  def _dotted(self) -> str:
    words = [self._word()]
    while self._take('.'):
      words.append(self._word())
    return '.'.join(words)

  def _scoped(self) -> tuple[str, str]:
    """(scope, dotted name)."""
    parts = [self._dotted()]
    while self._take('/'):
      parts.append(self._dotted())
    return '/'.join(parts[:-1]), parts[-1]

  def _end(self) -> None:
    if self._now.type not in _END:
      raise self._wrong('the end of the statement')
    self._at += 1

  def statements(self) -> Iterator[Statement]:
    while self._now.type != token.ENDMARKER:
      line = self._now.start[0]
      if self._take('import'):
        yield self._import(line)
      elif self._take('from'):
        yield self._import(line, self._dotted())
      elif self._take('include'):
        yield Statement('include', line, name=self._text())
      else:
        yield from self._binding(line)
        continue
      self._end()

  def _import(self, line: int, package: str = '') -> Statement:
    if package:
      self._need('import')
    module = self._dotted()
    alias = module if package else module.split('.')[0]
    whole = f'{package}.{module}' if package else alias
    if self._take('as'):
      alias, whole = self._word(), f'{package}.{module}' if package else module
    return Statement('import', line, name=alias, value=whole)

  def _binding(self, line: int) -> Iterator[Statement]:
    scope, name = self._scoped()
    if self._take(':'):
      self._end()
      while self._now.type == token.NAME and self._now.start[1] > 0:
        line, argument = self._now.start[0], self._word()
        self._need('=')
        yield Statement('binding', line, scope, name, argument, self._value())
        self._end()
      return
    self._need('=')
    selector, _, argument = name.rpartition('.')
    if selector:
      yield Statement('binding', line, scope, selector, argument, self._value())
    else:
      yield Statement('binding', line, scope, argument, '', self._value())
    self._end()

  def _text(self) -> str:
    if self._now.type != token.STRING:
      raise self._wrong('a text in quotes')
    text = ''
    while self._now.type == token.STRING:
      value = ast.literal_eval(self._now.string)
      if not isinstance(value, str):
        raise self._wrong('a text in quotes')
      text += value
      self._at += 1
    return text

  def _value(self) -> Any:
    if self._take('%'):
      return Macro(self._dotted())
    if self._take('@'):
      scope, name = self._scoped()
      called = self._take('(')
      if called:
        self._need(')')
      return Reference(scope, name, called)
    if self._now.string in _CLOSING and self._now.type == token.OP:
      return self._container()
    if self._now.type == token.STRING:
      return self._text()
    if self._now.string in _WORDS:
      return _WORDS[self._word()]
    sign = -1 if self._take('-') else 1
    if self._now.type != token.NUMBER:
      raise self._wrong('a value')
    self._at += 1
    return sign * ast.literal_eval(self._pieces[self._at - 1].string)

  def _container(self) -> Any:
    opening = self._now.string
    self._at += 1
    closing, found, comma = _CLOSING[opening], [], False
    while not self._take(closing):
      if found and not comma:
        raise self._wrong(f"',' or {closing!r}")
      value = self._value()
      if opening == '{':
        self._need(':')
        value = (value, self._value())
      found.append(value)
      comma = self._take(',')
    if opening == '{':
      try:
        return dict(found)
      except TypeError as error:
        raise self._wrong('a key that can be compared') from error
    if opening == '(' and len(found) == 1 and not comma:
      return found[0]
    return tuple(found) if opening == '(' else found
