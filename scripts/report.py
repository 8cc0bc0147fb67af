"""Writes report.html: what a run was, on one page: python -m scripts.report RUN [RUN ...]

  python -m scripts.report runs/openmoe_tiny               # runs/openmoe_tiny/report.html
  python -m scripts.report runs/a runs/b --out compare.html  # side by side

RUN is a run directory. The page is one file that opens no connection.
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import sys

from openmoe.checkpoint.paths import absolute, write_whole
from openmoe.observe.text import visible
from openmoe.report.build import NAME, report


@command.guarded
def main(argv: list[str] | None = None) -> None:
  parser = command.Parser(__doc__)
  parser.add_argument('runs', metavar='RUN', nargs='+', help='run directory')
  parser.add_argument(
    '--out', help=f'where to write; default: {NAME} of one run, here where there are several'
  )
  arguments = parser.parse_args(argv)
  place = NAME if len(arguments.runs) > 1 else absolute(arguments.runs[0]) / NAME
  path = absolute(arguments.out or place)
  write_whole(path, report(arguments.runs).encode())
  print(visible(str(path)))


if __name__ == '__main__':
  sys.exit(main())
