"""Says a gin file of t5x and flaxformer in our names: python -m scripts.import_gin FILE [FILE ...]

  python -m scripts.import_gin t5x/examples/t5/t5_1_1/examples/openmoe_large.gin \\
    --gin_search_paths=T5X,FLAXFORMER > gin/experiments/mine.gin
  python -m scripts.train --gin_file=gin/runs/pretrain.gin --gin_file=gin/experiments/mine.gin \\
    --gin.MODEL_DIR="'runs/mine'"

The files are read as text: nothing that they name is imported or run. t5x and flaxformer need not
be installed; only the gin files that are included must be there. Bindings without a counterpart
stand at the end as comments, and how many there are is said on standard error. Exit code 64: a
file is missing, is no gin file, or is no run of t5x.
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import pathlib
import sys

from convert.t5x_gin.configuration import Configuration
from convert.t5x_gin.translate import as_gin, translate


@command.guarded
def main(argv: list[str] | None = None) -> None:
  parser = command.Parser(__doc__)
  parser.add_argument('files', nargs='+', metavar='FILE', help='gin files, later ones win')
  parser.add_argument(
    '--gin_search_paths', type=command.names, default=[], metavar='DIR,...',
    help='checkouts in which included files are looked for',
  )  # fmt: skip
  args = parser.parse_args(argv)
  found = Configuration(args.files, args.gin_search_paths)
  told = translate(found, pathlib.PurePath(args.files[-1]).stem)
  print(as_gin(told, ', '.join(pathlib.PurePath(name).name for name in args.files)), end='')
  if told.unplaced:
    print(f'{len(told.unplaced)} bindings could not be placed; see the end.', file=sys.stderr)


if __name__ == '__main__':
  sys.exit(main())
