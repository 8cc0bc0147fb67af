"""openmoe_t5x on t5x itself where it can be imported, on the fake elsewhere."""

import importlib.util
import sys

import pytest

from tests.openmoe_t5x import fake


@pytest.fixture(scope='session')
def plugin():
  """The modules of openmoe_t5x that import t5x."""
  installed = [] if importlib.util.find_spec('t5x') else fake.install()
  from openmoe_t5x import model, partitioner

  for name in installed:  # nobody else takes the fake for t5x
    del sys.modules[name]
  return model, partitioner
