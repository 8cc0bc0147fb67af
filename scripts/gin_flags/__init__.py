"""t5x's command line: gin files, gin bindings, and the errors a wrong name deserves.

--gin_file=A --gin_file=B      read in order; later bindings win
--gin.NAME=VALUE               a macro (or scope/module.Class.field), after all files
--gin_search_paths=DIR,DIR     where relative gin files are looked for, before the project

Names of modules that the gin files import may be used in bindings. jax's own flags work too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence

import gin
import jax
from absl import app, flags, logging

from openmoe.config import ConfigError
from openmoe.observe import command
from scripts.gin_flags import files, hints

jax.config.config_with_absl()

_FILES = flags.DEFINE_multi_string('gin_file', [], 'Gin file; repeat for several, later wins.')
_BINDINGS = flags.DEFINE_multi_string('gin_bindings', [], 'As --gin.NAME=VALUE.')
_PATHS = flags.DEFINE_list('gin_search_paths', [], 'Directories to look for gin files in first.')

# What gin raises for names, values and calls that are wrong.
_ERRORS = (
  *(ValueError, AttributeError, ImportError, TypeError, SyntaxError),
  *(KeyError, NameError, RuntimeError),
)


def rewrite(argv: Sequence[str]) -> list[str]:
  """--gin.NAME=VALUE -> --gin_bindings=NAME=VALUE: absl wants the names of flags beforehand."""
  return [re.sub(r'^--?gin\.(.+)$', r'--gin_bindings=\1', arg, flags=re.DOTALL) for arg in argv]


def run(main: Callable[[], int | None]) -> None:
  """Runs a script: reads the command line, ends the process with main's exit code."""

  def parse_flags(argv: Sequence[str]) -> list[str]:
    try:
      rest = flags.FLAGS(argv)
      if len(rest) > 1:
        raise flags.Error(f'{rest[1:]} belong to no flag.')
    except flags.Error as error:
      raise SystemExit(command.fail(f'{error} {hints.of_flag(str(error))}')) from error
    return rest

  def begin(argv: Sequence[str]) -> int | None:
    del argv
    logging.set_verbosity(logging.WARNING)
    return main()

  app.run(command.guarded(begin), argv=rewrite(sys.argv), flags_parser=parse_flags)


def _find(name: str, where: Sequence) -> files.epath.Path:
  try:
    return files.find(name, where, f'--gin_file={name}')
  except ConfigError as error:
    if not (ours := hints.run_file(name)):
      raise
    raise ConfigError(f'--gin_file={name}: {ours}') from error


def _read(name: str, where: Sequence) -> Iterator[files.Part]:
  """The parts of a gin file; one of t5x is refused before its own includes are looked for."""
  for part in files.parts(_find(name, where), where):
    if imported := hints.T5X_IMPORT.search(part.own):
      raise ConfigError(
        f'{part.path} is a gin file of t5x ({imported[0]}): '
        f'`python -m scripts.import_gin {name}` says the same in our names. {hints.run_file(name)}'
      )
    yield part


def _check_macros(found: Sequence[files.Part], bindings: Sequence[str]) -> None:
  """Refuses macros that nothing reads: gin itself would take a misspelt one in silence."""
  read = files.macros_read([*(part.text for part in found), *bindings])
  given = [(f'--gin.{b.partition("=")[0].strip()}', b.partition('=')[0].strip()) for b in bindings]
  given += [
    (f'{part.path}: {name}', name) for part in found for name, _ in files.macros_set(part.own)
  ]
  for where, name in given:
    if '.' in name or '/' in name or name in read:
      continue
    hint = hints.counterpart(name) or hints.nearest(name, read)
    raise ConfigError(f'{where}: no gin file reads a macro {name}. {hint}')


def parse() -> None:
  """Reads the gin flags into gin's global configuration.

  Raises:
    ConfigError: a file or name does not exist, a macro is required and not given, a value cannot
      be parsed; with the nearest names.
  """
  if not _FILES.value:
    raise ConfigError('Give at least one --gin_file; gin/models and gin/runs hold the usual ones.')
  bindings, where = _BINDINGS.value, files.places(_PATHS.value)
  for binding in bindings:
    if wrong := hints.wrong_value(binding):
      raise ConfigError(wrong)
  found = [part for name in _FILES.value for part in _read(name, where)]
  _check_macros(found, bindings)
  missing = files.required([*(part.own for part in found), *bindings])
  if missing:
    given = ' '.join(f'--gin.{name}=VALUE' for name in missing)
    raise ConfigError(f'{", ".join(missing)} must be set: add {given} or a gin/experiments file.')
  for part in found:
    _give(part.text, part.path)
  imports = files.imports(found)
  for binding in bindings:
    _give(imports + binding, f'--gin.{binding}')
  _give('', 'The gin files', then=gin.finalize)


def _give(text: str, what: str, then: Callable[[], None] | None = None) -> None:
  try:
    gin.parse_config(text)
    if then:
      then()
  except _ERRORS as error:
    raise hints.explain(error, what) from error


def bindings(function: str) -> dict:
  """Arguments that gin binds for a function, with all configs made and validated.

  Raises:
    ConfigError: as parse(), or from the configs themselves.
  """
  try:
    return gin.get_bindings(function, resolve_references=True)
  except ConfigError as error:
    raise hints.plain_words(error, _BINDINGS.value) from error
  except _ERRORS as error:
    if 'not supported between instances' in str(error) and _BINDINGS.value:
      given = ' '.join(f'--gin.{binding}' for binding in _BINDINGS.value)
      raise ConfigError(
        f'A value has the wrong type (None or text where a number belongs): look at {given}.'
      ) from error
    raise hints.explain(error) from error
