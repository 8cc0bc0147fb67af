"""A programme switches at the exact token, also when killed around it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from openmoe.config import ConfigError, DataConfig
from openmoe.data.stages import StagedStream, format_plan, plan_table
from openmoe.data.stream import ShardedStream
from openmoe.programme import Programme, Stage
from tests.data import case

ROWS, STEPS = 2, (3, 4)


@pytest.fixture(scope='module')
def programme(tmp_path_factory) -> Programme:
  case.make_corpus(tmp_path_factory.mktemp('stages'), 'staged')
  first = DataConfig('staged_ul2', {'inputs': 64, 'targets': 64}, ROWS, num_shards=1)
  second = DataConfig('staged_full_lm', {'targets': 96}, ROWS, num_shards=1)
  return Programme(
    (
      Stage('ul2', STEPS[0] * first.batch_size * first.row_length, first),
      Stage('full_lm', STEPS[1] * second.batch_size * second.row_length, second),
    )
  )


def all_shards(data: DataConfig):
  return range(data.num_shards)


@pytest.fixture(scope='module')
def whole(programme):
  """All batches, and the position after each."""
  targets, states = [], []
  with StagedStream(programme, all_shards) as stream:
    for batch in stream:
      targets.append(batch.targets)
      states.append(stream.state())
  return targets, states


def test_stages_and_tokens_of_every_step(programme):
  assert programme.total_steps == sum(STEPS)
  found = [programme.at(step) for step in range(programme.total_steps)]
  assert found == [(0, i) for i in range(3)] + [(1, i) for i in range(4)]
  tokens = [programme.tokens_before(step) for step in range(programme.total_steps + 1)]
  assert tokens == [0, 256, 512, 768, 960, 1152, 1344, 1536]
  with pytest.raises(ValueError, match='outside the programme of 7 steps'):
    programme.at(7)


def test_it_switches_at_the_exact_step(programme, whole):
  targets, _ = whole
  assert [t.shape[1] for t in targets] == [128] * 3 + [96] * 4
  for index, stage in enumerate(programme.stages):
    with ShardedStream(stage.data, [0]) as alone:
      first = sum(STEPS[:index])
      for step, batch in enumerate(itertools.islice(alone, STEPS[index])):
        np.testing.assert_array_equal(batch.targets, targets[first + step])


@pytest.mark.parametrize('killed_after', [2, 3, 4])
def test_killed_just_before_at_and_just_after_the_switch(programme, whole, killed_after):
  targets, states = whole
  with StagedStream(programme, all_shards) as stream:
    stream.restore(states[killed_after - 1])
    rest = [batch.targets for batch in stream]
  assert len(rest) == len(targets) - killed_after
  for found, expected in zip(rest, targets[killed_after:], strict=True):
    np.testing.assert_array_equal(found, expected)


def test_a_position_names_its_stage(whole):
  _, states = whole
  assert list(states[2]) == ['ul2-shard_00000-of-00001']
  assert list(states[3]) == ['full_lm-shard_00000-of-00001']


def test_finished_stages_must_stay_and_the_current_one_may_grow(programme, whole):
  _, states = whole
  first, second = programme.stages
  longer = Programme((first, Stage('full_lm', 2 * second.tokens, second.data)))
  for step, left in ((2, 1 + 8), (5, 2 + 4)):
    with StagedStream(longer, all_shards) as stream:
      stream.restore(states[step - 1])
      assert len(list(stream)) == left
  grown = Programme((Stage('ul2', 2 * first.tokens, first.data), second))
  with StagedStream(grown, all_shards) as stream, pytest.raises(ConfigError, match='must stay'):
    stream.restore(states[4])
  shrunk = Programme((Stage('ul2', first.tokens // 3, first.data), second))
  with StagedStream(shrunk, all_shards) as stream, pytest.raises(ConfigError, match='must not end'):
    stream.restore(states[1])


@pytest.mark.parametrize('step', [3, 4])
def test_without_a_position_the_stage_begins_here(programme, whole, step):
  targets, _ = whole
  with StagedStream(programme, all_shards, step=step) as stream:
    found = [batch.targets for batch in stream]
  assert len(found) == 7 - step
  np.testing.assert_array_equal(found[0], targets[3])


def test_a_complete_programme_has_no_more(programme, whole):
  _, states = whole
  with StagedStream(programme, all_shards, step=7) as stream:
    stream.restore(states[-1])
    assert list(stream) == []


def test_stages_that_end_inside_a_step_are_refused(programme):
  data = programme.stages[0].data
  with pytest.raises(ConfigError, match='Nearest: 256 or 512'):
    Stage('x', 300, data)
  with pytest.raises(ConfigError, match='names of their own'):
    Programme((programme.stages[0], programme.stages[0]))


def test_the_plan_gives_tokens_and_epochs(programme):
  rows = plan_table(programme, {'staged_ul2': 384})
  assert [(r['source'], r['tokens'], r['epochs']) for r in rows] == [
    ('staged_ul2', 768, 2.0),
    ('staged_full_lm', 768, None),
  ]
  assert 'unknown' in format_plan(rows)
