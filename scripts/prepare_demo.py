"""Builds the demo corpora and vocabulary: python -m scripts.prepare_demo [--directory DIR].

Source: the running interpreter's standard library. About 10 s; a no-op when the data is there.
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import sys

from scripts import quiet

quiet.import_tensorflow()

from openmoe.config import ConfigError
from tasks import demo_corpus, locations


@command.guarded
def main(argv: list[str] | None = None) -> None:
  parser = command.Parser(__doc__)
  parser.add_argument(
    '--directory', help='where to put the data; OPENMOE_DATA_DIR or runs/demo_data by default'
  )
  directory = parser.parse_args(argv).directory or locations.data_dir()
  try:
    manifest = demo_corpus.prepare(directory)
  except OSError as error:
    raise ConfigError(
      f'{directory} cannot be written ({error.strerror}); give another --directory, or set '
      'OPENMOE_DATA_DIR.'
    ) from error
  for corpus, count in manifest['documents'].items():
    print(f'{corpus}: {count} documents, {manifest["characters"][corpus]:,} characters')
  print(f'{manifest["pieces"]} pieces and {manifest["extra_ids"]} sentinels in {directory}')


if __name__ == '__main__':
  sys.exit(main())
