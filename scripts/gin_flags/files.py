"""Gin files as texts: found, read with all they include, and what their macros are."""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import re
from collections.abc import Iterator, Sequence

from etils import epath

from openmoe.checkpoint.paths import is_remote
from openmoe.config import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]
_INCLUDE = re.compile(r"""^include\s+['"]([^'"]+)['"]\s*(#.*)?$""")
_IMPORT = re.compile(r'^(from|import)\s')
_MACRO = re.compile(r'^([A-Za-z_]\w*)[ \t]*=(?!=)[ \t]*(.*)$', re.MULTILINE)
_REQUIRED = '%gin.REQUIRED'
_CONFIG = 'from openmoe import config'


@dataclasses.dataclass(frozen=True)
class Part:
  """Lines of a gin file between two includes.

  Attributes:
    path: of the file.
    text: as gin takes it; lines of the file's other parts are empty, but for the imports above.
    own: the lines themselves.
  """

  path: str
  text: str
  own: str


def places(search_paths: Sequence[str]) -> list[epath.Path]:
  """Where relative names are looked for: the user's own first."""
  return [epath.Path(p) for p in (*search_paths, pathlib.Path.cwd(), ROOT, ROOT / 'gin')]


def find(name: str, where: Sequence[epath.Path], asked: str) -> epath.Path:
  """The file of a name, local or gs://.

  Args:
    asked: how the user said it, for the message.

  Raises:
    ConfigError: it is nowhere; with the nearest names.
  """
  for place in [epath.Path()] if is_remote(name) else where:
    path = epath.Path(name) if is_remote(name) else place / name
    if path.is_file():
      return path
  known = [str(p.relative_to(ROOT)) for p in sorted((ROOT / 'gin').rglob('*.gin'))]
  near = difflib.get_close_matches(name, known, n=3) or known
  raise ConfigError(f'{asked} is not in {[str(p) for p in where]}. Nearest: {near}.')


def parts(
  path: epath.Path, where: Sequence[epath.Path], above: tuple[str, ...] = ()
) -> Iterator[Part]:
  """A file's parts and those of the files that it includes, in the order gin reads them.

  Raises:
    ConfigError: an included file is not there or includes itself, or one is not UTF-8.
  """
  if str(path) in above:
    raise ConfigError(f'{path} includes itself, by way of {list(above)}; remove one include.')
  try:
    lines = path.read_bytes().decode('utf-8-sig').split('\n')
  except UnicodeDecodeError as error:
    raise ConfigError(f'{path} is not UTF-8 ({error}); save it as UTF-8.') from error
  begin = 0
  for number, line in enumerate([*lines, None]):
    included = _INCLUDE.match(line.strip()) if line is not None else None
    if line is not None and not included:
      continue
    before = [other if _IMPORT.match(other) else '' for other in lines[:begin]]
    own = '\n'.join(lines[begin:number])
    if own.strip():
      yield Part(str(path), '\n'.join([*before, own]), own)
    if included:
      asked = f"{path} line {number + 1}: include '{included[1]}'"
      yield from parts(find(included[1], where, asked), where, (*above, str(path)))
    begin = number + 1


def imports(found: Sequence[Part]) -> str:
  """The import statements of all parts, each once: what bindings of the command line may name."""
  lines = [line for part in found for line in part.own.split('\n') if _IMPORT.match(line)]
  first = 'from __gin__ import dynamic_registration'  # gin wants it before all others
  return ''.join(f'{line}\n' for line in dict.fromkeys([first, _CONFIG, *lines]))


def macros_read(texts: Sequence[str]) -> set[str]:
  """Names that stand as %NAME somewhere."""
  return set(re.findall(r'%([A-Za-z_]\w*)(?![\w.])', '\n'.join(texts)))


def macros_set(text: str) -> list[tuple[str, str]]:
  """(name, value as written) of every macro that a text assigns, in order."""
  return [(m[1], m[2].strip()) for m in _MACRO.finditer(text)]


def required(texts: Sequence[str]) -> list[str]:
  """Macros that are declared required and that nothing sets."""
  pairs = [pair for text in texts for pair in macros_set(text)]
  given = {name for name, value in pairs if not value.startswith(_REQUIRED)}
  wanted = [name for name, value in pairs if value.startswith(_REQUIRED)]
  return [name for name in dict.fromkeys(wanted) if name not in given]
