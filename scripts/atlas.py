"""The routing atlas: python -m scripts.atlas VERB ...

  record --checkpoint=RUN --data='texts/*.jsonl' --out=FOLDER
      what every router decides about every token: experts, weights, slots, drops, probabilities
  check FOLDER...
      the identities that hold of every record

--checkpoint is a run directory, one of its checkpoints, or a Hugging Face folder. --data are .txt,
.jsonl, .json, .csv and .parquet files; labels come from the fields source, domain and language of
their records, and the source is the file's name where they have none. A record that was broken off
goes on with the same command. docs/ROUTING.md says what the figures mean and what they do not.
Exit codes: 0, 1 where a check fails, 64, 65 for damaged data.
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import sys

from openmoe.atlas import identities
from openmoe.atlas.counts import Study
from openmoe.atlas.record import Record
from openmoe.observe.text import visible
from scripts import atlas_models


def check(args) -> int:
  """Prints every identity of every record."""
  wrong = 0
  for folder in args.records:
    print(visible(f'{folder}: {Record(folder).name}'))
    for one in identities.identities(Study(Record(folder))):
      wrong += not one.holds
      print(f'  {"ok   " if one.holds else "WRONG"} {one.name} (off by at most {one.worst:.2g})')
  return int(bool(wrong))


@command.guarded
def main(argv: list[str] | None = None) -> int:
  parser = command.Parser(__doc__)
  verbs = parser.add_subparsers(required=True, metavar='VERB')
  atlas_models.add_record(verbs.add_parser('record', help='of a checkpoint'))
  sub = verbs.add_parser('check', help='identities of records')
  sub.add_argument('records', nargs='+', metavar='FOLDER')
  sub.set_defaults(run=check)
  args = parser.parse_args(argv)
  return args.run(args)


if __name__ == '__main__':
  sys.exit(main())
