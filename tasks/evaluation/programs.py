"""Programs in what a model wrote: inside a fence, or the text itself."""

from __future__ import annotations

import ast
import re

# A line that begins with three or more ` or ~; whatever follows names the language.
_OPEN = re.compile(r'^(?P<margin>[ \t]*)(?P<fence>`{3,}|~{3,})(?P<info>[^\n`]*)$', re.MULTILINE)


def blocks(text: str) -> list[str]:
  """Contents of the fences in a text; the last may have been left open by a limit of length."""
  text, found, place = text.replace('\r\n', '\n'), [], 0
  while opened := _OPEN.search(text, place):
    fence = re.escape(opened.group('fence'))
    begin = opened.end() + 1
    closed = re.compile(rf'^[ \t]*{fence}[`~]*[ \t]*$', re.MULTILINE).search(text, begin)
    # Some put the closing fence behind the last line.
    closed = closed or re.compile(rf'{fence}[ \t]*$', re.MULTILINE).search(text, begin)
    end = closed.start() if closed else len(text)
    # A fence inside a list is moved to the right, and its lines with it.
    margin = re.compile(rf'^{opened.group("margin")}', re.MULTILINE)
    found.append(margin.sub('', text[begin:end]))
    place = closed.end() if closed else len(text)
  return found


def _defines(code: str, name: str) -> bool:
  return bool(re.search(rf'^\s*(?:(?:async )?def|class) {name}\b|^{name}\s*=', code, re.MULTILINE))


def called(tests: str) -> set[str]:
  """Names that tests call: what a program has to define is among them."""
  return set(re.findall(r'\b([A-Za-z_]\w*)\(', tests))


def program(text: str, names: set[str]) -> str:
  """The program that a text holds: of several fences the first that defines one of the names.

  Without a fence it is the text; where no block defines a name, the first block.
  """
  found = blocks(text)
  if not found:
    return text
  return next((b for b in found if any(_defines(b, name) for name in names)), found[0])


def _named(source: str) -> list[tuple[str | None, ast.stmt]]:
  """Statements of a text with what each defines; none if the text is not Python."""
  try:
    body = ast.parse(source).body
  except SyntaxError:
    return []
  kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
  return [(node.name if isinstance(node, kinds) else None, node) for node in body]


def defined(source: str) -> list[str]:
  """Functions and classes that a program defines at its top level."""
  return [name for name, _ in _named(source) if name]


def without(source: str, name: str) -> str:
  """A program less what it defines under a name."""
  return ast.unparse(ast.Module([node for found, node in _named(source) if found != name], []))


def imports(source: str) -> str:
  """The imports of a text's top level."""
  kept = [node for _, node in _named(source) if isinstance(node, (ast.Import, ast.ImportFrom))]
  return ast.unparse(ast.Module(kept, []))
