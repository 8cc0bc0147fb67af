"""Builds TFDS data sets from raw folders: python -m scripts.build_datasets --raw_dir=R --data_dir=D

Builds whichever data sets have a raw folder below --raw_dir (R/redpajama/c4, R/the_stack_dedup,
R/wildchat, ...), one after the other; what is built already is left alone, so an interrupted call
is resumed by the same command. A data set appears in --data_dir when it is whole, or not at all.
A sha256 list beside or inside a raw folder (*sha256*, as RedPajama publishes) is verified first.
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import argparse
import os
import pathlib
import sys

from scripts import quiet

quiet.import_tensorflow()

import tensorflow_datasets as tfds

from openmoe.config import ConfigError
from tasks.builders import build, corpora

EXIT_NO_INPUT = 66


def build_all(args: argparse.Namespace) -> int:
  """Builds what is asked for or found; returns the exit code."""
  wanted = args.only or list(build.BUILDERS)
  unknown = sorted(set(wanted) - set(build.BUILDERS))
  if unknown:
    raise ConfigError(f'--only={unknown}: choose from {sorted(build.BUILDERS)}')
  found = 0
  for name in wanted:
    raw = pathlib.Path(args.raw_dir) / build.FOLDERS[name]
    if not raw.is_dir():
      note = f' {build.BOOKS}' if name == 'redpajama_book' else ''
      print(f'{name}: no folder {raw}; skipped.{note}')
      if args.only:
        return EXIT_NO_INPUT
      continue
    found += 1
    try:
      print(f'{name}: {build.build(name, raw, args.data_dir)}', flush=True)
    except ConfigError as error:  # what is asked for is right, so the data are not
      return command.fail(f'{name}: {error}', command.DAMAGED)
  if not found:
    places = sorted(build.FOLDERS.values())
    return command.fail(f'no raw folder of {places} in {args.raw_dir}', EXIT_NO_INPUT)
  return 0


@command.guarded
def main(argv: list[str] | None = None) -> int:
  parser = command.Parser(__doc__)
  parser.add_argument('--raw_dir', required=True, help='folder of raw folders')
  parser.add_argument('--data_dir', required=True, help='TFDS directory, local or gs://')
  names = {'type': command.names, 'default': [], 'metavar': 'NAME,...'}
  parser.add_argument('--only', help='data sets; default: all that are found', **names)
  parser.add_argument('--languages', help='of The Stack; default: all', **names)
  args = parser.parse_args(argv)
  tfds.disable_progress_bar()
  if args.languages:
    os.environ[corpora.LANGUAGES_VARIABLE] = ','.join(args.languages)
  return build_all(args)


if __name__ == '__main__':
  sys.exit(main())
