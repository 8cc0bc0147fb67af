"""Gets the task files of BIG-bench-Lite: python -m scripts.fetch_bigbench_lite [--out DIR]

They are taken from the source archive of bigbench 1.0.0, which pip downloads from the package index
that it is set up to use and checks by its digest. The archive, 358 MB, is read once: 71 MB of it,
the 24 folders, are kept. With everything in place, nothing is done.

  --archive FILE     a copy of the archive that is already here
  --keep_archive     leave the archive in DIR
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import pathlib
import sys

from tasks.bigbench import fetch, files


@command.guarded
def main(argv: list[str] | None = None) -> None:
  parser = command.Parser(__doc__)
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path(files.DEFAULT_DIR))
  parser.add_argument('--archive', type=pathlib.Path, help=f'a local copy of {fetch.ARCHIVE}')
  parser.add_argument('--index_url', help='package index (default: the one pip is set up to use)')
  parser.add_argument('--keep_archive', action='store_true')
  args = parser.parse_args(argv)
  changed = fetch.fetch(args.out, args.archive, args.index_url, args.keep_archive)
  print(f'{len(files.TASKS)} tasks in {args.out}{"" if changed else " (already there)"}')


if __name__ == '__main__':
  sys.exit(main())
