"""Stand-ins for two packages that t5x imports and hardly uses: python -m openmoe_t5x.stubs FOLDER

airio is asked for four classes by isinstance alone, jestimator for an optimizer that nothing here
names, and t5x's precompile for t5's mixtures, which gin files of this project do not use. None of
the three installs beside a present jax. Put FOLDER on PYTHONPATH, after all real packages.
"""

from __future__ import annotations

import pathlib

from openmoe.observe import command

FILES = {
  'airio/__init__.py': '',
  'airio/core.py': """class DatasetProviderBase: ...
class Task(DatasetProviderBase): ...
class Mixture(DatasetProviderBase): ...
class AirIODatasetIterator: ...
""",
  'airio/pygrain_common.py': '',
  'jestimator/__init__.py': '',
  'jestimator/amos.py': """import typing
class ScaleByAmosState(typing.NamedTuple):
  count: object = None
def amos(*args, **kwargs):
  raise NotImplementedError('jestimator is a stand-in here; install it for its optimizer')
""",
  'jestimator/amos_helper.py': 'state_partition_rule = None\n',
  't5/__init__.py': '',
  't5/data/__init__.py': '',
  't5/data/mixtures.py': '',
}


def write(folder: pathlib.Path) -> None:
  """Writes the stand-ins into a folder.

  Raises:
    OSError: it cannot be written.
  """
  for name, text in FILES.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')


@command.guarded
def main(argv: list[str] | None = None) -> None:
  parser = command.Parser(__doc__)
  parser.add_argument('folder', type=pathlib.Path, help='where they go')
  write(parser.parse_args(argv).folder)


if __name__ == '__main__':
  raise SystemExit(main())
