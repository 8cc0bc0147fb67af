"""Building TFDS data sets from raw folders: which there are, and their checksums."""

from __future__ import annotations

import hashlib
import pathlib

import tensorflow_datasets as tfds

from openmoe.config import ConfigError
from tasks.builders import corpora, instructions

BUILDERS = {**corpora.BUILDERS, **instructions.BUILDERS}
FOLDERS = {
  **{f'redpajama_{subset}': f'redpajama/{subset}' for subset in corpora.REDPAJAMA},
  'the_stack_dedup': 'the_stack_dedup',
  'orca': 'orca',
  'wildchat_gpt4_sft': 'wildchat',
}
BOOKS = 'RedPajama no longer publishes its books (book/book.jsonl): built only from your own copy.'


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
    for number, line in enumerate(listing.read_text(encoding='utf-8').splitlines(), start=1):
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
      with known[0].open('rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
      if digest != fields[0].lower():
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
