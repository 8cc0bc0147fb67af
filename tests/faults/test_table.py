"""The fault table: one row a fault, what must happen then, and a test that it does.

python -m tests.faults.test_table    prints it
"""

import contextlib

import pytest

from tests.faults import of_runs, of_storage
from tests.faults.bench import Bench

ROWS = [
  *(*of_storage.CHECKPOINT, *of_storage.DISK),
  *(*of_runs.DATA, *of_runs.PROCESS, *of_runs.NUMERICS),
]


MARKED = [pytest.param(row, marks=[pytest.mark.slow] if row.slow else []) for row in ROWS]


@pytest.mark.parametrize('fault', MARKED, ids=str)
def test_fault(fault, tmp_path, monkeypatch):
  with contextlib.ExitStack() as opened:
    fault.check(Bench(tmp_path, monkeypatch, opened))


def test_the_table_covers_what_it_should():
  areas = [row.area for row in ROWS]
  assert len(ROWS) >= 30
  assert set(areas) == {'checkpoint', 'data', 'process', 'disk', 'numerics'}
  assert len({row.what for row in ROWS}) == len(ROWS)


if __name__ == '__main__':
  for row in ROWS:
    print(f'{row.area:11} {row.what:58} {row.must}')
