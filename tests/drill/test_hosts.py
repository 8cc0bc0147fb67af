"""The same run on other numbers of processes and devices: the same batches, numbers to rounding."""

import os
import pathlib
import signal
from collections.abc import Sequence

import pytest

from openmoe.config import MeshConfig
from openmoe.drill.compare import compare
from openmoe.drill.moments import Moment
from openmoe.drill.starts import Shape, Starts
from openmoe.observe.metrics import read_records
from tests.drill.test_drill import small_run

STEPS = 30


def train_on(folder: pathlib.Path, shapes: Sequence[Shape], data_shards: int = 2) -> pathlib.Path:
  """A run whose starts are on these, one after the other, each stopped by a signal but the last."""
  command = ['-m', 'scripts.train', '--tiny', f'--tiny_steps={STEPS}', *small_run()]
  starts = Starts([*command, f'--gin.DATA_SHARDS={data_shards}'], os.environ)
  for number, shape in enumerate(shapes, start=1):
    step = number * STEPS // len(shapes)
    moment = Moment('step', step, 0.0, int(signal.SIGTERM)) if number < len(shapes) else None
    watcher = starts.run(folder, shape, moment)
    assert number == 1 or watcher.resumed_at() >= step - STEPS // len(shapes)
  return folder


def assert_the_same(one: pathlib.Path, two: pathlib.Path) -> None:
  found = {aspect.name: aspect for aspect in compare(one, two, STEPS)}
  assert found['batches'].same, found['batches']
  assert found['batches'].count == STEPS * 4
  losses = [[r['loss'] for r in read_records(run, 'train')] for run in (one, two)]
  assert len(losses[0]) == len(losses[1]) == STEPS
  assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-6
  for name in ('parameters', 'optimizer'):
    assert found[name].difference < 1e-5, found[name]


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """One process with eight devices, undisturbed; experts on four of them, model on two."""
  return train_on(tmp_path_factory.mktemp('alone') / 'run', [Shape(1, 8, MeshConfig(4, 2))])


@pytest.mark.slow
def test_two_processes_equal_one(alone, tmp_path):
  """The expert axis spans both."""
  assert_the_same(alone, train_on(tmp_path / 'run', [Shape(2, 8, MeshConfig(4, 2))]))


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_devices_and_meshes(alone, tmp_path):
  """Two processes, then one, then four with half of the devices, whose model axis spans two."""
  shapes = [
    Shape(2, 8, MeshConfig(4, 2)),
    Shape(1, 8, MeshConfig(2, 2)),
    Shape(4, 4, MeshConfig(2, 2)),
  ]
  assert_the_same(alone, train_on(tmp_path / 'run', shapes))
