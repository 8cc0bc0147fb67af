"""t5x's command line: gin files, gin bindings, and the errors a wrong name deserves.

--gin_file=A --gin_file=B      read in order; later bindings win
--gin.NAME=VALUE               a macro (or scope/module.Class.field), after all files
--gin_search_paths=DIR,DIR     where relative gin files are looked for, after the project
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import pathlib
import re
from collections.abc import Sequence

import gin
from absl import flags

from openmoe import config as config_lib
from openmoe.config import ConfigError

ROOT = pathlib.Path(__file__).resolve().parent.parent

_FILES = flags.DEFINE_multi_string('gin_file', [], 'Gin file; repeat for several, later wins.')
_BINDINGS = flags.DEFINE_multi_string('gin_bindings', [], 'As --gin.NAME=VALUE.')
_PATHS = flags.DEFINE_list('gin_search_paths', [], 'More directories to look for gin files in.')

# Bindings on the command line may name the config classes, as the gin files do.
_IMPORTS = 'from __gin__ import dynamic_registration\nfrom openmoe import config\n'


def rewrite(argv: Sequence[str]) -> list[str]:
  """--gin.NAME=VALUE -> --gin_bindings=NAME=VALUE: absl wants the names of flags beforehand."""
  return [re.sub(r'^--?gin\.(.+)$', r'--gin_bindings=\1', arg, flags=re.DOTALL) for arg in argv]


def _find(name: str, places: Sequence[pathlib.Path]) -> pathlib.Path:
  for place in places:
    if (place / name).is_file():
      return place / name
  known = [str(p.relative_to(ROOT)) for p in sorted((ROOT / 'gin').rglob('*.gin'))]
  near = difflib.get_close_matches(name, known, n=3) or known
  raise ConfigError(f'--gin_file={name} is not in {[str(p) for p in places]}. Nearest: {near}.')


def _check_macros(texts: Sequence[str], bindings: Sequence[str]) -> None:
  """Refuses macros that nothing reads: gin itself would take a misspelt one in silence."""
  read = set(re.findall(r'%([A-Za-z_]\w*)(?![\w.])', '\n'.join([*texts, *bindings])))
  for binding in bindings:
    name, equals, _ = binding.partition('=')
    name = name.strip()
    if not equals:
      raise ConfigError(f'--gin.{binding} has no value; write --gin.{name}=VALUE.')
    if '.' in name or '/' in name or name in read:
      continue
    near = difflib.get_close_matches(name.upper(), sorted(read), n=3, cutoff=0.5)
    hint = f'Did you mean {" or ".join(near)}?' if near else f'There are: {sorted(read)}.'
    raise ConfigError(f'--gin.{name}: no gin file reads a macro {name}. {hint}')


def _known_names() -> list[str]:
  names = []
  for cls in vars(config_lib).values():
    if isinstance(cls, type) and dataclasses.is_dataclass(cls):
      names += [cls.__name__, *(field.name for field in dataclasses.fields(cls))]
  return sorted(set(names))


def explain(error: Exception) -> ConfigError:
  """A gin error with the nearest valid names."""
  text = str(error).strip()
  if isinstance(error.__cause__ or error.__context__, ConfigError):
    return error.__cause__ or error.__context__
  words = re.findall(r"['\"`.]([A-Za-z_]\w*)['\"`]", text)
  hints = []
  for word in words:
    near = difflib.get_close_matches(word, _known_names(), n=3)
    if near and near[0] != word:
      hints.append(f'{word}: did you mean {" or ".join(near)}?')
  return ConfigError(' '.join([text, *dict.fromkeys(hints)]))


def parse() -> None:
  """Reads the gin flags into gin's global configuration.

  Raises:
    ConfigError: a file or name does not exist, a macro is required and not given, a value cannot
      be parsed; with the nearest names.
  """
  if not _FILES.value:
    raise ConfigError('Give at least one --gin_file; gin/models and gin/runs hold the usual ones.')
  places = [pathlib.Path.cwd(), ROOT, ROOT / 'gin', *map(pathlib.Path, _PATHS.value)]
  paths = [_find(name, places) for name in _FILES.value]
  for place in places:
    gin.add_config_file_search_path(os.fspath(place))
  texts = [path.read_text() for path in paths]
  _check_macros(texts, _BINDINGS.value)
  missing = _required([*texts, *_BINDINGS.value])
  if missing:
    given = ' '.join(f'--gin.{name}=VALUE' for name in missing)
    raise ConfigError(f'{", ".join(missing)} must be set: add {given} or a gin/experiments file.')
  try:
    for path in paths:
      gin.parse_config_file(os.fspath(path))
    gin.parse_config(_IMPORTS + '\n'.join(_BINDINGS.value))
    gin.finalize()
  except (ValueError, AttributeError, ImportError, TypeError, SyntaxError, KeyError) as error:
    raise explain(error) from error


def _required(texts: Sequence[str]) -> list[str]:
  """Macros that are declared required and that nothing sets."""
  bound = '\n'.join(texts)
  wanted = re.findall(r'^([A-Z_0-9]+)\s*=\s*%gin\.REQUIRED', bound, re.MULTILINE)
  given = re.findall(r'^([A-Z_0-9]+)\s*=(?!\s*%gin\.REQUIRED)', bound, re.MULTILINE)
  return [name for name in dict.fromkeys(wanted) if name not in given]


def bindings(function: str) -> dict:
  """Arguments that gin binds for a function, with all configs made and validated.

  Raises:
    ConfigError: as parse(), or from the configs themselves.
  """
  try:
    return gin.get_bindings(function, resolve_references=True)
  except ConfigError:
    raise
  except (ValueError, AttributeError, TypeError, RuntimeError) as error:
    raise explain(error) from error
