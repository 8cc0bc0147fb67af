"""The routing atlas: python -m scripts.atlas VERB ...

  record --checkpoint=RUN --data='texts/*.jsonl' --out=FOLDER
      what every router decides about every token: experts, weights, slots, drops, probabilities
  analyse FOLDER... --out=PAGES [--only=groups,flow]
      pages, pictures and tables of a record, or of the checkpoints of a run
  compare FOLDER FOLDER --out=PAGES
      two records of the same tokens
  intervene --checkpoint=RUN --data=... --variant='ban=mlp.3:0,5' --out=PAGES
      what a change of the decisions costs; --replay=FOLDER follows a record
  losses [--experts=32 --top_k=2 --layers=4]
      balance losses of other systems, and what a weight of theirs is in ours
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

import importlib
import sys

from openmoe.atlas import identities
from openmoe.atlas.counts import Study
from openmoe.atlas.record import Record
from openmoe.layers.moe import balance
from openmoe.observe.text import visible
from scripts import atlas_interventions, atlas_models


def check(args) -> int:
  """Prints every identity of every record."""
  wrong = 0
  for folder in args.records:
    print(visible(f'{folder}: {Record(folder).name}'))
    for one in identities.identities(Study(Record(folder))):
      wrong += not one.holds
      print(f'  {"ok   " if one.holds else "WRONG"} {one.name} (off by at most {one.worst:.2g})')
  return int(bool(wrong))


def analyse(args) -> int:
  """Writes the pages of one record, or of a series."""
  only = command.names(args.only) if args.only else None
  show = lambda name: print(visible(name), file=sys.stderr)
  options = {'experts': not args.no_experts, 'show': show}
  pages_lib = importlib.import_module('openmoe.atlas.pages')
  written = pages_lib.write_atlas(args.records, args.out, only, **options)
  print(visible(f'{len(written)} pages; begin with {written[-1]}'))
  return 0


def compare(args) -> int:
  """Writes the page about two records."""
  pages_lib = importlib.import_module('openmoe.atlas.pages')
  print(visible(pages_lib.write_comparison(args.records, args.out)[0]))
  return 0


def losses(args) -> int:
  """Prints the table of balance losses."""
  rows = balance.table(args.experts, args.top_k, args.layers)
  widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
  for row in ({name: name for name in rows[0]}, *rows):
    print('  '.join(f'{text:<{widths[name]}}' for name, text in row.items()).rstrip())
  return 0


@command.guarded
def main(argv: list[str] | None = None) -> int:
  parser = command.Parser(__doc__)
  verbs = parser.add_subparsers(required=True, metavar='VERB')
  atlas_models.add_record(verbs.add_parser('record', help='of a checkpoint'))
  atlas_interventions.add_intervene(verbs.add_parser('intervene', help='change the decisions'))
  sub = verbs.add_parser('analyse', help='pages of records')
  sub.add_argument('records', nargs='+', metavar='FOLDER')
  sub.add_argument('--out', required=True, help='folder of the pages')
  sub.add_argument('--only', help='names of analyses, with commas')
  sub.add_argument('--no_experts', action='store_true', help='no page for each expert')
  sub.set_defaults(run=analyse)
  sub = verbs.add_parser('compare', help='two records')
  sub.add_argument('records', nargs=2, metavar='FOLDER')
  sub.add_argument('--out', required=True, help='folder of the page')
  sub.set_defaults(run=compare)
  sub = verbs.add_parser('losses', help='balance losses side by side')
  for name, default in (('experts', 32), ('top_k', 2), ('layers', 4)):
    sub.add_argument(f'--{name}', type=int, default=default)
  sub.set_defaults(run=losses)
  sub = verbs.add_parser('check', help='identities of records')
  sub.add_argument('records', nargs='+', metavar='FOLDER')
  sub.set_defaults(run=check)
  args = parser.parse_args(argv)
  return args.run(args)


if __name__ == '__main__':
  sys.exit(main())
