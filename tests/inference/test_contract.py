"""The contract of batches: it holds without capacity, and its check sees where it does not."""

import jax
import pytest

from openmoe.config import ConfigError
from openmoe.inference.contract import check
from openmoe.inference.model import CapacityWarning
from tests.inference import case

PROMPTS = [[5, 6, 7], [9], [12, 30, 8, 8, 20, 41, 33]]


@pytest.mark.parametrize('name', ['openmoe', 'jetmoe'])
def test_nothing_differs_without_capacity(name):
  rows = check(case.model(name), PROMPTS, 6, case.model(name, 2))
  assert [row.way for row in rows] == [
    'alone', 'in one batch', 'shuffled', 'padded to a long one', 'among hostile ones',
    'over devices',
  ]  # fmt: skip
  assert all((row.tokens, row.dropped) == (0, 0.0) and row.log_prob < 1e-4 for row in rows)


def test_with_capacity_a_crowd_takes_slots_away():
  with pytest.warns(CapacityWarning):
    rows = check(case.model('openmoe', capacity=True, batch_rows=16), PROMPTS, 6)
  found = {row.way: row for row in rows}
  assert found['among hostile ones'].dropped > 0.01
  assert found['among hostile ones'].log_prob > 1e-2


def test_prompts_are_needed():
  assert len(jax.devices()) == 8
  for wrong in ([], [[5], []]):
    with pytest.raises(ConfigError, match='prompts: at least one is needed, and none may be empty'):
      check(case.model('openmoe'), wrong, 2)
