"""Replays of a recorded run: silent where it was well, and every planted fault is raised."""

import json
import math
import pathlib

import pytest

from openmoe.health import PRESETS, HealthConfig, Rule
from openmoe.health.replay import replay
from scripts import health as script

ROOT = pathlib.Path(__file__).parents[2]
# All 200 steps of gin/experiments/demo.gin, one record a step (LOG_PERIOD=1).
HEALTHY = ROOT / 'tests' / 'golden' / 'healthy_run.jsonl'
FROM = 120  # the step that a fault is planted at


def healthy() -> list[dict]:
  return [json.loads(line) for line in HEALTHY.read_text(encoding='utf-8').splitlines()]


def written(folder: pathlib.Path, records: list[dict]) -> pathlib.Path:
  lines = (json.dumps(r | {'time': 0.0}) + '\n' for r in records)
  (folder / 'metrics.jsonl').write_text(''.join(lines), encoding='utf-8')
  return folder


def test_a_healthy_run_of_200_steps_raises_nothing(tmp_path):
  found = replay(written(tmp_path, healthy()), HealthConfig())
  assert found.events == []
  assert found.records == 208
  assert found.blind == ['skipped_steps']  # nothing was to be skipped
  awake = [rule for rule in PRESETS if rule.kind == 'train' and rule.after < 100]
  assert len(awake) >= 14


@pytest.mark.parametrize('period', [5, 10])
def test_nor_does_it_where_fewer_steps_are_recorded(tmp_path, period):
  records = [r for r in healthy() if r['kind'] != 'train' or r['step'] % period == 0]
  assert replay(written(tmp_path, records), HealthConfig()).events == []


def times(factor):
  return lambda value, since: value * factor


def at_once(value):
  return lambda old, since: value


# Rule -> what becomes of its scalar, of its value and the steps since FROM, and for how many steps.
FAULTS = {
  'dead_experts': (lambda old, since: 470.0 + since, 100),
  'load_peak': (at_once(6.5), 100),
  'load_entropy': (at_once(0.45), 100),
  'avoidable_drops': (at_once(0.25), 100),
  'drops_rise': (times(1.7), 100),
  'late_drops': (at_once(0.35), 100),
  'late_drops_rise': (times(1.4), 100),
  'router_logits': (times(2.2), 100),
  'router_logits_large': (lambda old, since: 2.2 * 1.06**since, 100),
  'loss_spike': (lambda old, since: old + 2.5, 3),
  'loss_peak': (lambda old, since: old + 6.0, 1),
  'gradient_norm': (times(15.0), 3),
  'nonfinite_expert': (at_once(1.0), 100),
  'skipped_steps': (at_once(0.75), 100),
  'stalled_input': (at_once(0.4), 100),
  'goodput': (at_once(0.3), 100),
}


@pytest.mark.parametrize('name', FAULTS)
def test_a_planted_fault_is_raised_by_its_rule(tmp_path, name):
  rule = next(rule for rule in PRESETS if rule.name == name)
  change, steps = FAULTS[name]
  records = healthy()
  for record in records:
    since = record['step'] - FROM
    if record['kind'] == rule.kind and 0 <= since < steps:
      record[rule.metric] = change(record.get(rule.metric), since)
  fired = [e for e in replay(written(tmp_path, records), HealthConfig()).events if e.fired]
  # Logits that grow without end are a rise first; a rise in the last quarter may be large, too.
  also = {'router_logits_large': {'router_logits'}, 'late_drops': {'late_drops_rise'}}
  assert {e.rule.name for e in fired} - also.get(name, set()) == {name}
  first = next(e for e in fired if e.rule.name == name)
  assert FROM <= first.step <= FROM + 80
  assert name in first.text


def test_saturation_that_falls_is_raised(tmp_path):
  records = healthy()
  records += [
    {'step': step, 'kind': 'checkpoint', 'nonfinite_experts': 0.0, 'router_saturation': 0.1}
    for step in (1050, 1100)
  ]
  (event,) = replay(written(tmp_path, records), HealthConfig()).events
  assert (event.step, event.rule.name, event.fired) == (1100, 'saturation_falls', True)


def test_every_preset_has_a_planted_fault():
  assert {rule.name for rule in PRESETS} == {*FAULTS, 'saturation_falls'}


def test_values_that_are_not_finite_are_raised(tmp_path):
  records = healthy()
  for record in records:
    if record['kind'] == 'train' and record['step'] >= FROM:
      record['loss'] = record['loss_max'] = str(math.nan)
  fired = {e.rule.name for e in replay(written(tmp_path, records), HealthConfig()).events}
  assert fired == {'loss_spike', 'loss_peak'}


def test_a_spike_fires_and_clears(tmp_path):
  records = healthy()
  for record in records:
    if record['kind'] == 'train' and FROM <= record['step'] < FROM + 3:
      record['loss'] += 3.0
  events = replay(written(tmp_path, records), HealthConfig()).events
  assert [(e.rule.name, e.fired) for e in events] == [('loss_spike', True), ('loss_spike', False)]


def test_records_of_before_are_watched_as_far_as_they_go(tmp_path):
  records = [{'step': s, 'kind': 'train', 'loss': 3.0, 'grad_norm': 1.0} for s in range(1, 90)]
  found = replay(written(tmp_path, records), HealthConfig())
  assert found.events == []
  assert 'load_peak' in found.blind
  assert 'loss_spike' not in found.blind


# --- the command


def test_the_command_prints_events_and_json(tmp_path, capsys):
  records = healthy()
  for record in records:
    if record['step'] >= FROM and record['kind'] == 'train':
      record['expert_load_max'] = 9.0
  run = str(written(tmp_path, records))
  assert script.main([run]) == 0
  shown = ' '.join(capsys.readouterr().out.split())
  for part in ('load_peak', 'fired', '17 rules over 208 records, 1 fired', 'skipped_steps'):
    assert part in shown
  assert script.main([run, '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  assert [(e['rule'], e['kind']) for e in found['events']] == [('load_peak', 'fired')]
  assert found['events'][0]['step'] == 135
  assert len(found['rules']) == 17


def test_a_gin_file_extends_the_rules(tmp_path, capsys):
  run = str(written(tmp_path, healthy()))
  guard = f'--gin_file={ROOT}/gin/health/guard.gin'
  tighter = '--gin.skip_spikes/health.Rule.above=1.5'
  assert script.main([run, guard, tighter, '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  assert {e['rule'] for e in found['events']} == {'skip_spikes'}
  assert {e['action'] for e in found['events']} == {'skip'}
  assert len(found['rules']) == 18


def test_what_is_no_run_is_refused(tmp_path, capsys):
  assert script.main([str(tmp_path)]) == 64
  assert 'holds no metrics.jsonl' in capsys.readouterr().err


def test_a_rule_of_ones_own_sees_validation(tmp_path):
  rule = Rule('validation', 'loss', kind='validation', above=4.7, window=2, share=1.0, clear=0.0)
  events = replay(written(tmp_path, healthy()), HealthConfig(rules=(rule,))).events
  assert {e.rule.name for e in events} == {'validation'}
