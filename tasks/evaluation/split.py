"""Parts a program's text from tests that stand in it, as HumanEval and MBPP append them.

Tests are `assert`, calls of `check`, and its definition. What the text may do there is little:
tests are run where the verdict is, and whoever wrote the program may have written them. So a test
that imports something, or names what starts with an underscore or belongs to frames and code, is
left to the program, and of the built-in names only such as compute are had without it.
"""

from __future__ import annotations

import ast
import builtins
import re

_PURE = """abs all any ascii bin bool bytearray bytes callable chr complex dict divmod enumerate
filter float frozenset hash hex id int isinstance issubclass iter len list map max min next oct ord
pow print range repr reversed round set slice sorted str sum tuple type zip False None True Ellipsis
NotImplemented __build_class__"""
_ERRORS = {
  name: kind
  for name, kind in vars(builtins).items()
  if isinstance(kind, type) and issubclass(kind, BaseException)
}
BUILTINS = {name: getattr(builtins, name) for name in _PURE.split()} | _ERRORS
_INNER = re.compile(r'_|(gi|cr|ag|f|tb|co)_')

# Statements of tests, or none; then the first statement of the program and the one after its last.
Part = tuple[list[ast.stmt], int, int]


def _calls_check(node: ast.stmt) -> bool:
  call = node.value if isinstance(node, ast.Expr) else None
  return isinstance(call, ast.Call) and getattr(call.func, 'id', None) == 'check'


def _harmless(node: ast.stmt) -> bool:
  for inner in ast.walk(node):
    if isinstance(inner, (ast.Import, ast.ImportFrom)):
      return False
    name = getattr(inner, 'attr', None) or getattr(inner, 'id', None)
    if isinstance(name, str) and name != '_' and _INNER.match(name):
      return False
  return True


def _names(nodes: list[ast.stmt], context: type[ast.expr_context]) -> set[str]:
  inner = [inner for node in nodes for inner in ast.walk(node)]
  return {n.id for n in inner if isinstance(n, ast.Name) and isinstance(n.ctx, context)}


class Text:
  """A text, read.

  Attributes:
    program: the text with a `pass` for every test, so that the program cannot read them.
    parts: what is to be run, one after the other.
    own: built-in names that mean the program's: those it defines, if the tests name nothing
      else of it (some of MBPP's functions are called `sum` or `max`).

  Raises:
    SyntaxError, ValueError: the text is no program.
  """

  def __init__(self, source: str):
    body = ast.parse(source, 'program').body
    checked = any(map(_calls_check, body))
    tests, self.parts = [], []
    for i, node in enumerate(body):
      defines = isinstance(node, ast.FunctionDef) and node.name == 'check' and checked
      if (isinstance(node, ast.Assert) or _calls_check(node) or defines) and _harmless(node):
        tests.append(node)
        self.parts.append(([node], i, i + 1))
      elif self.parts and not self.parts[-1][0]:
        self.parts[-1] = ([], self.parts[-1][1], i + 1)
      else:
        self.parts.append(([], i, i + 1))
    self.program = _without(source, tests) if tests else source
    rest = [node for node in body if node not in tests]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    defined = {node.name for node in rest if isinstance(node, kinds)}
    named = _names(tests, ast.Load) & (defined | _names(rest, ast.Store))
    others = any(not hasattr(builtins, name) for name in named)
    self.own = set() if others else named & defined


def _without(source: str, tests: list[ast.stmt]) -> str:
  # Columns count bytes; lines end as the parser has them end, not as str.splitlines does.
  lines = re.split(rb'(?<=\n)|(?<=\r)(?!\n)', source.encode())
  for node in reversed(tests):
    first = min([node.lineno, *(d.lineno for d in getattr(node, 'decorator_list', ()))]) - 1
    last = node.end_lineno - 1
    before, after = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
    lines[first : last + 1] = [before + b'pass' + after + b'\n' * (last - first)]
  return b''.join(lines).decode()
