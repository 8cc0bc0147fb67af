"""Rules: when they fire and clear, what they make of odd values, what a configuration may say."""

import json
import math

import pytest

from openmoe.config import ConfigError
from openmoe.health import PRESETS, Action, HealthConfig, Measure, Rule
from openmoe.health.monitor import Monitor


def changes(rule: Rule, values, begin: int = 1, monitor=None) -> list[tuple[int, bool]]:
  """(step, fired or cleared) of one value a step."""
  monitor = monitor or Monitor([rule])
  found = []
  for step, value in enumerate(values, begin):
    record = {'step': step, 'kind': rule.kind, rule.metric: value}
    found += [(event.step, event.fired) for event in monitor.feed(record)]
  return found


def test_a_share_of_the_window_fires_and_fewer_clear():
  rule = Rule('x', 'x', above=1.0, window=4, share=0.75, clear=0.25)
  assert changes(rule, [2, 0, 2, 0, 2, 2, 0, 2, 0, 2, 0, 0, 0, 2, 2, 2]) == [
    (6, True),  # 2 0 2 2
    (12, False),  # 0 2 0 0
    (16, True),
  ]


def test_one_point_of_a_window_does_not_fire():
  rule = Rule('x', 'x', above=1.0, window=5, share=0.6, clear=0.2)
  assert changes(rule, [0, 0, 0, 99, 0, 0, 0, 0, 99, 0]) == []


def test_below():
  rule = Rule('x', 'x', below=0.5, window=2, share=1.0, clear=0.0)
  assert changes(rule, [1, 0.4, 0.4, 0.5, 0.5]) == [(3, True), (5, False)]


def test_a_rule_sleeps_through_its_first_steps():
  rule = Rule('x', 'x', above=1.0, window=2, share=1.0, clear=0.0, after=5)
  assert changes(rule, [9] * 10) == [(7, True)]


def test_ratio_is_of_the_median_before_and_needs_half_a_baseline():
  rule = Rule(
    'x', 'x', above=2.0, measure=Measure.RATIO, baseline=8, window=1, share=1.0, clear=0.0
  )
  assert changes(rule, [1, 1, 1, 9]) == []
  assert changes(rule, [1, 1, 1, 1, 9, 1]) == [(5, True), (6, False)]
  floored = Rule(**(vars(rule) | {'floor': 5.0}))
  assert changes(floored, [1, 1, 1, 1, 9, 11]) == [(6, True)]


def test_robust_z_takes_no_notice_of_spikes_in_its_baseline():
  rule = Rule(
    'x', 'x', above=5.0, measure=Measure.ROBUST_Z, baseline=10, window=1, share=1.0, clear=0.0
  )
  noise = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.1, 0.9]
  assert changes(rule, [*noise, 9.0, 1.0, 9.0, 1.0]) == [
    (9, True), (10, False), (11, True), (12, False),
  ]  # fmt: skip


def test_a_new_level_becomes_the_baseline():
  rule = Rule(
    'x', 'x', above=5.0, measure=Measure.ROBUST_Z, baseline=10, window=1, share=1.0, clear=0.0,
    floor=0.1,
  )  # fmt: skip
  (fired, cleared) = changes(rule, [1.0] * 10 + [3.0] * 10)
  assert fired == (11, True)
  assert cleared[1] is False


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_values_that_are_not_finite_are_beyond_and_no_baseline(value):
  rule = Rule(
    'x', 'x', above=5.0, measure=Measure.ROBUST_Z, baseline=4, window=1, share=1.0, clear=0.0,
    floor=0.1,
  )  # fmt: skip
  assert changes(rule, [1.0, 1.0, 1.0, value, 1.0]) == [(4, True), (5, False)]


def test_other_kinds_and_missing_or_odd_values_are_passed_over():
  rule = Rule('x', 'x', above=1.0, window=1, share=1.0, clear=0.0)
  monitor = Monitor([rule])
  for odd in ({}, {'x': '9'}, {'x': None}, {'x': True}, {'x': [9]}):
    assert monitor.feed({'step': 1, 'kind': 'train'} | odd) == []
  assert monitor.feed({'step': 1, 'kind': 'validation', 'x': 9}) == []
  assert len(monitor.feed({'step': 1, 'x': 9})) == 1


def test_a_monitor_goes_on_where_another_stopped():
  rules = [
    Rule('a', 'x', above=2.0, measure=Measure.RATIO, baseline=6, window=3, share=0.6, clear=0.0),
    Rule('b', 'x', above=3.0, window=4, share=0.5, clear=0.25),
    Rule('t', 'goodput', above=3.0),
  ]
  values = [1.0, 1.5, 0.5, 1.0, 4.0, 3.9, 1.0, 5.0, 1.0, 1.0, 1.0, 1.0, 7.0, 7.0]
  record = lambda step: {'step': step, 'kind': 'train', 'x': values[step], 'goodput': 9.0}
  for stop in range(len(values)):
    whole, first, second = Monitor(rules), Monitor(rules), Monitor(rules)
    expected = [whole.feed(record(step)) for step in range(len(values))]
    found = [first.feed(record(step)) for step in range(stop)]
    second.restore(json.loads(json.dumps(first.state())))
    found += [second.feed(record(step)) for step in range(stop, len(values))]
    timeless = lambda events: [[e for e in es if e.rule.name != 't'] for es in events]
    assert timeless(found) == timeless(expected)
  assert 't' not in whole.state()


@pytest.mark.parametrize(
  'state',
  [
    None, [], 3, {'x': 3}, {'x': {'values': 3, 'beyond': []}}, {'y': {}},
    {'x': {'values': ['a'], 'beyond': []}}, {'x': {'values': [], 'beyond': [7]}},
    {'x': {'values': [], 'beyond': [[0]]}}, {'x': {'values': [math.nan], 'beyond': []}},
  ],
)  # fmt: skip
def test_a_state_that_is_none_of_ours_counts_as_nothing(state):
  monitor = Monitor([Rule('x', 'x', above=1.0)])
  monitor.restore(state)
  assert monitor.state() == {}


def test_every_preset_has_reasons_and_sources():
  assert len({rule.name for rule in PRESETS}) == len(PRESETS)
  for rule in PRESETS:
    assert len(rule.why) > 20, rule.name
    assert len(rule.source) > 10, rule.name


def test_a_configuration_adds_replaces_changes_and_leaves_out():
  mine = Rule('mine', 'accuracy', below=0.1)
  other = Rule('load_peak', 'expert_load_max', above=3.0)
  config = HealthConfig((mine, other), {'loss_spike': 'skip'}, ('goodput',))
  table = {rule.name: rule for rule in config.table()}
  assert table['mine'] == mine
  assert table['load_peak'].above == 3.0
  assert table['loss_spike'].action is Action.SKIP
  assert 'goodput' not in table
  assert len(table) == len(PRESETS)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: Rule('a', 'loss'), 'needs one limit'),
    (lambda: Rule('a', 'loss', above=1.0, below=1.0), 'needs one limit'),
    (lambda: Rule('a', 'loss', above=1.0, share=0.3), 'must lie under share'),
    (lambda: Rule('a', 'loss', above=1.0, window=0), 'Rule.window=0'),
    (lambda: Rule('a', 'loss', above=1.0, action='stpo'), "Did you mean 'stop'"),
    (lambda: Rule('a', 'goodput', below=0.5, action='stop'), 'can only be note'),
    (lambda: Rule('a', 'accuracy', below=0.5, action='skip'), 'steps can be skipped where'),
    (lambda: Rule('a', 'loss', above=1.0, factor=2.0), 'factor=2.0'),
    (lambda: Rule('', 'loss', above=1.0), 'needs a name'),
    (lambda: HealthConfig(actions={'los': 'stop'}), "names a rule 'los'"),
    (lambda: HealthConfig(without=('los',)), "names a rule 'los'"),
    (lambda: HealthConfig(actions={'goodput': 'stop'}), 'can only be note'),
  ],
)
def test_what_cannot_be_is_refused_in_words(make, message):
  with pytest.raises(ConfigError, match=message):
    make()
