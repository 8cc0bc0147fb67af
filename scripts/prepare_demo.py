"""Builds the demo corpora and vocabulary: python -m scripts.prepare_demo [--directory DIR].

Source: the running interpreter's standard library. About 10 s; a no-op when the data is there.
"""

from __future__ import annotations

from scripts import quiet

quiet.import_tensorflow()

from absl import app, flags

from tasks import demo_corpus, locations

_DIRECTORY = flags.DEFINE_string(
  'directory', None, 'Where to put the data; OPENMOE_DATA_DIR or runs/demo_data by default.'
)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'Unknown arguments: {argv[1:]}')
  directory = _DIRECTORY.value or locations.data_dir()
  manifest = demo_corpus.prepare(directory)
  for corpus, count in manifest['documents'].items():
    print(f'{corpus}: {count} documents, {manifest["characters"][corpus]:,} characters')
  print(f'{manifest["pieces"]} pieces and {manifest["extra_ids"]} sentinels in {directory}')


if __name__ == '__main__':
  app.run(main)
