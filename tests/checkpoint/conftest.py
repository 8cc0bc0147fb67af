"""Fixtures of the checkpoint tests."""

import pytest

from openmoe.checkpoint.checkpointer import Checkpointer
from tests.checkpoint.case import IDENTITY


@pytest.fixture
def notes():
  return []


@pytest.fixture
def open_dir(tmp_path, notes):
  """Opens Checkpointers on the test's run directory and closes them at the end."""
  opened = []

  def open_it(path=tmp_path / 'run', keep=3, identity=IDENTITY, **kwargs):
    opened.append(Checkpointer(path, keep, identity, note=notes.append, **kwargs))
    return opened[-1]

  yield open_it
  for checkpointer in opened:
    checkpointer.close()
