"""Says which items of two evaluations came out differently, and why.

  python -m scripts.compare_evals A B [--all] [--json]

A and B are directories that scripts.evaluate wrote, or single result files. Reasons: the prompt's
text differs; the same text became other tokens; the model is another one; or everything is the same
and the numbers differ (numerics). Items whose log-probabilities moved without moving the figure are
counted, and listed with --all.
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import dataclasses
import json
import sys

from openmoe.evaluation import comparison, results
from openmoe.observe.text import visible


@command.guarded
def main(argv: list[str] | None = None) -> None:
  parser = command.Parser(__doc__)
  parser.add_argument('a')
  parser.add_argument('b')
  parser.add_argument('--all', action='store_true', help='also items whose figure is the same')
  parser.add_argument('--json', action='store_true', help='one JSON object and nothing else')
  args = parser.parse_args(argv)
  one, two = results.load_all(args.a), results.load_all(args.b)
  found = comparison.compare_all(one, two)
  if args.json:
    plain = lambda entry: entry | {'changes': [dataclasses.asdict(c) for c in entry['changes']]}
    print(json.dumps({name: plain(entry) for name, entry in found.items()}))
    return
  counts = {name: len(one[name]['items']) for name in found}
  for line in comparison.report(found, counts, args.all):
    print(visible(line))


if __name__ == '__main__':
  sys.exit(main())
