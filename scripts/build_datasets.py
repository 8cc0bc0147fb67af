"""Builds TFDS data sets from raw folders: python -m scripts.build_datasets --raw_dir=R --data_dir=D

Builds whichever data sets have a raw folder below --raw_dir (R/redpajama/c4, R/the_stack_dedup,
R/wildchat, ...), one after the other; what is built already is left alone, so an interrupted call
is resumed by the same command. A data set appears in --data_dir when it is whole, or not at all.
A sha256 list beside or inside a raw folder (*sha256*, as RedPajama publishes) is verified first.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import sys

from scripts import quiet

quiet.import_tensorflow()

import tensorflow_datasets as tfds
from absl import app, flags, logging

from openmoe.config import ConfigError
from tasks.builders import corpora, instructions

_RAW = flags.DEFINE_string('raw_dir', None, 'Folder of raw folders.', required=True)
_DATA = flags.DEFINE_string('data_dir', None, 'TFDS directory, local or gs://.', required=True)
_ONLY = flags.DEFINE_list('only', [], 'Names of data sets; empty builds all that are found.')
_LANGUAGES = flags.DEFINE_list('languages', [], 'Languages of The Stack; empty builds all.')

BUILDERS = {**corpora.BUILDERS, **instructions.BUILDERS}
FOLDERS = {
  **{f'redpajama_{subset}': f'redpajama/{subset}' for subset in corpora.REDPAJAMA},
  'the_stack_dedup': 'the_stack_dedup',
  'orca': 'orca',
  'wildchat_gpt4_sft': 'wildchat',
  'mmlu': 'mmlu',
  'human_eval': 'human_eval',
}
_BOOKS = 'RedPajama no longer publishes its books (book/book.jsonl): built only from your own copy.'


def verify_checksums(folder: pathlib.Path) -> int:
  """Compares files with the sha256 lists of `folder` ('<hex>  <path>' a line).

  Files that a list names and that are not there are left out, as with sha256sum
  --ignore-missing: a part of a corpus can be built.

  Returns:
    The number of files verified.

  Raises:
    ConfigError: naming the file that differs.
  """
  verified = 0
  for listing in sorted(folder.rglob('*sha256*')):
    for number, line in enumerate(listing.read_text().splitlines(), start=1):
      if not line.strip():
        continue
      fields = line.split(maxsplit=1)
      if len(fields) != 2 or len(fields[0]) != 64:
        raise ConfigError(f'{listing}:{number}: {line!r} is not "<sha256>  <path>".')
      name = fields[1].lstrip('*').strip()
      known = [p for p in (listing.parent / name, folder / name, folder.parent / name)
               if p.is_file()]  # fmt: skip
      if not known:
        continue
      digest = hashlib.sha256()
      with known[0].open('rb') as f:
        while block := f.read(1 << 22):
          digest.update(block)
      if digest.hexdigest() != fields[0].lower():
        raise ConfigError(f'{known[0]} differs from its checksum in {listing}; download it again.')
      verified += 1
  return verified


def build(name: str, raw: pathlib.Path, data_dir: str) -> str:
  """Builds one data set; returns 'built' or 'already there'."""
  builder = BUILDERS[name](data_dir=data_dir)
  if builder.info.splits:
    return 'already there'
  verified = verify_checksums(raw)
  config = tfds.download.DownloadConfig(manual_dir=str(raw), try_download_gcs=False)
  builder.download_and_prepare(download_config=config)
  counts = ', '.join(f'{k} {v.num_examples:,}' for k, v in builder.info.splits.items())
  return f'built: {counts} examples, {verified} checksums verified'


def main(argv: list[str]) -> int:
  if len(argv) > 1:
    raise app.UsageError(f'Unknown arguments: {argv[1:]}')
  logging.set_verbosity(logging.WARNING)
  tfds.disable_progress_bar()
  if _LANGUAGES.value:
    os.environ[corpora.LANGUAGES_VARIABLE] = ','.join(_LANGUAGES.value)
  wanted = _ONLY.value or list(BUILDERS)
  unknown = sorted(set(wanted) - set(BUILDERS))
  if unknown:
    print(f'error: --only={unknown}: choose from {sorted(BUILDERS)}', file=sys.stderr)
    return 64
  found = 0
  for name in wanted:
    raw = pathlib.Path(_RAW.value) / FOLDERS[name]
    if not raw.is_dir():
      note = f' {_BOOKS}' if name == 'redpajama_book' else ''
      print(f'{name}: no folder {raw}; skipped.{note}')
      if _ONLY.value:
        return 66
      continue
    found += 1
    try:
      print(f'{name}: {build(name, raw, _DATA.value)}', flush=True)
    except ConfigError as error:
      print(f'error: {name}: {error}', file=sys.stderr)
      return 65
  if not found:
    print(f'error: no raw folder of {sorted(FOLDERS.values())} in {_RAW.value}', file=sys.stderr)
    return 66
  return 0


if __name__ == '__main__':
  app.run(main)
