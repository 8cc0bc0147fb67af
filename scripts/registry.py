"""Arguments that say where tasks and their data come from; scripts with argparse share them."""

from __future__ import annotations

import argparse
import importlib

import seqio

from openmoe.config import ConfigError
from openmoe.observe import command

_MODULES = 'tasks.demo,tasks.pretraining,tasks.sft'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """--modules, --tfds_data_dir and --cache_dirs."""
  several = {'type': command.names, 'metavar': 'NAME,...'}
  parser.add_argument(
    '--modules', default=command.names(_MODULES), help='modules that register tasks', **several
  )
  parser.add_argument('--tfds_data_dir', help='where TFDS data sets lie')
  parser.add_argument('--cache_dirs', default=[], help='where scripts.cache_tasks wrote', **several)


def load(args: argparse.Namespace) -> None:
  """Registers tasks and says to seqio where their data lie.

  Raises:
    ConfigError: a module or directory does not exist.
  """
  for module in args.modules:
    try:
      importlib.import_module(module)
    except ModuleNotFoundError as error:
      raise ConfigError(
        f'--modules names {module}, which cannot be imported ({error}); name modules of this '
        'directory or of PYTHONPATH, as tasks.demo.'
      ) from error
  if getattr(args, 'text_files', None):
    from tasks.text_files import UserFiles

    UserFiles(args.text_files).register()
  if args.tfds_data_dir:
    use_tfds_dir(args.tfds_data_dir)
  seqio.add_global_cache_dirs(args.cache_dirs)


def use_tfds_dir(path: str) -> None:
  """Reads TFDS data sets from a directory, local or gs://.

  Raises:
    ConfigError: it does not exist.
  """
  from etils import epath

  if not epath.Path(path).exists():
    raise ConfigError(f'--tfds_data_dir={path} does not exist; build data sets there, or fix it.')
  seqio.set_tfds_data_dir_override(path)
