"""What follows from a rule inside a run: scalars, skipped steps, a lower rate, saves and stops."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from openmoe.health import HealthConfig, Rule
from openmoe.health.guard import guarded
from openmoe.health.routers import DeadTime, effective_experts, router_scalars
from openmoe.health.watch import EVENTS, Unhealthy, Watch
from openmoe.observe.timeline import Timeline
from openmoe.train_step import TrainState
from openmoe.types import RouterStats


def stats(load_le, dropped=0.0, late=0.0, usage=1.0, z=1.0) -> RouterStats:
  load_le = np.asarray(load_le, np.float32)
  per_layer = lambda x: np.broadcast_to(np.float32(x), load_le.shape[0])
  return RouterStats(
    load_balance_loss=per_layer(2.0),
    router_z_loss=per_layer(z),
    expert_load_e=load_le,
    dropped_fraction=per_layer(dropped),
    tokens_left_behind=per_layer(0.1),
    expert_usage=per_layer(usage),
    router_confidence=per_layer(0.5),
    late_dropped_fraction=per_layer(late),
  )


def test_scalars_of_routers_are_as_many_for_any_number_of_experts():
  uniform = np.full((2, 4), 0.25)
  few, many = router_scalars(stats(uniform)), router_scalars(stats(np.full((48, 512), 1 / 512)))
  assert few.keys() == many.keys()
  for scalars in (few, many):
    assert scalars['expert_load_max'] == pytest.approx(1.0)
    assert scalars['effective_experts'] == pytest.approx(1.0)


def test_scalars_of_routers_have_the_values_that_they_are_named_for():
  scalars = router_scalars(
    stats([[0.7, 0.1, 0.1, 0.1], [0.5, 0.5, 0.0, 0.0]], dropped=0.5, late=0.75, usage=0.8, z=9.0)
  )
  assert scalars['expert_load_max'] == pytest.approx(2.8)
  assert scalars['expert_load_min'] == 0.0
  assert scalars['effective_experts'] == pytest.approx(0.5)
  assert scalars['dead_experts'] == 2
  assert scalars['late_drop_excess'] == pytest.approx(0.25)
  # 0.5 / 0.8 slots a pair: 0.375 must be dropped, 0.125 is for imbalance.
  assert scalars['avoidable_drops'] == pytest.approx(0.125)
  assert scalars['router_logsumexp'] == pytest.approx(3.0)
  assert effective_experts(np.array([1.0, 0.0, 0.0, 0.0])) == 0.25


def test_dead_time_is_of_one_expert_and_not_of_any():
  dead = DeadTime()
  first, second = np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]])
  assert [dead.add(x) for x in (first, first, second, second, second, first)] == [1, 2, 1, 2, 3, 1]


# --- the compiled step


def toy_step(state, batch, *, optimizer, schedule):
  loss, grad = jax.value_and_grad(lambda w: jnp.sum((w - batch) ** 2))(state.params)
  updates, opt_state = optimizer.update(grad, state.opt_state, state.params)
  scalars = {'loss': loss, 'grad_norm': optax.global_norm(grad), 'learning_rate': schedule(0)}
  params = optax.apply_updates(state.params, updates)
  return TrainState(state.step + 1, params, opt_state), {'scalars': scalars}


@pytest.fixture(scope='module')
def toy():
  optimizer = optax.adam(0.1)
  fixed = {'optimizer': optimizer, 'schedule': lambda step: jnp.float32(0.1)}
  plain = jax.jit(functools.partial(toy_step, **fixed))
  careful = jax.jit(functools.partial(guarded(toy_step), **fixed))
  params = jnp.array([1.0, -2.0])
  return plain, careful, TrainState(jnp.int32(0), params, optimizer.init(params))


def controls(**given):
  inf = np.float32(math.inf)
  return {'rate_scale': np.float32(1.0), 'loss': inf, 'grad_norm': inf} | given


def test_the_guard_changes_nothing_in_a_step_that_is_well(toy):
  plain, careful, state = toy
  batch = jnp.array([0.5, 0.5])
  expected, _ = plain(state, batch)
  found, metrics = careful(state, batch, controls())
  jax.tree.map(np.testing.assert_array_equal, expected, found)
  assert metrics['scalars']['skipped'] == 0


@pytest.mark.parametrize(
  ('value', 'limits'),
  [
    (0.5, {'loss': np.float32(6.4)}),
    (0.5, {'grad_norm': np.float32(5.0)}),
    (math.nan, {}),
    (math.inf, {}),
  ],
)
def test_a_skipped_step_changes_neither_parameters_nor_moments_but_counts(toy, value, limits):
  _, careful, state = toy
  found, metrics = careful(state, jnp.array([value, value]), controls(**limits))
  assert metrics['scalars']['skipped'] == 1
  np.testing.assert_array_equal(found.params, state.params)
  np.testing.assert_array_equal(found.opt_state[0].mu, state.opt_state[0].mu)
  assert found.step == 1
  assert found.opt_state[0].count == 1


def test_a_lower_rate_scales_the_step(toy):
  plain, careful, state = toy
  batch = jnp.array([0.5, 0.5])
  whole, _ = plain(state, batch)
  half, metrics = careful(state, batch, controls(rate_scale=np.float32(0.5)))
  moved, expected = half.params - state.params, (whole.params - state.params) / 2
  np.testing.assert_allclose(moved, expected, rtol=1e-5)
  assert metrics['scalars']['learning_rate'] == pytest.approx(0.05)


# --- a run


SPIKE = Rule('spike', 'loss', above=10.0, window=1, share=1.0, clear=0.0)


def watch(tmp_path, *rules, start=0, state=None, notes=None) -> Watch:
  found = Watch(HealthConfig(rules), Timeline(tmp_path, print))
  found.open(tmp_path, start, state, print if notes is None else notes.append)
  return found


def steps(at: Watch, losses, begin=1, period=1) -> list[dict]:
  """Shows steps to a watch as record_step does; the records."""
  records = []
  for step, loss in enumerate(losses, begin):
    dead = stats([[0.0, 1.0] if step > 3 else [0.5, 0.5]])
    scalars = {'loss': loss, 'grad_norm': 2 * loss, 'skipped': float(loss > 10)}
    scalars |= at.see(scalars, dead)
    if step % period == 0:
      record = {'step': step, 'kind': 'train'} | scalars | at.summary()
      at.judge(record, lambda: 40)
      records.append(record)
  return records


def test_records_hold_peaks_of_the_steps_between_and_dead_times(tmp_path):
  first, second = steps(watch(tmp_path), [1.0, 5.0, 2.0, 3.0, 2.0, 1.0], period=3)
  assert (first['loss_max'], second['loss_max']) == (5.0, 3.0)
  assert second['grad_norm_max'] == 6.0
  assert (first['dead_steps'], second['dead_steps']) == (0, 3)
  assert 0 <= second['goodput'] <= 1
  assert 'skipped_fraction' not in first


def test_a_step_that_is_not_finite_is_a_peak_and_survives_json(tmp_path):
  at = watch(tmp_path)
  at.see({'loss': math.nan, 'grad_norm': 1.0}, None)
  state = json.loads(json.dumps(at.state(), allow_nan=False))['health']
  again = watch(tmp_path, state=state)
  assert again.summary()['loss_max'] == math.inf


def test_a_stop_names_the_rule_the_value_and_the_last_good_checkpoint(tmp_path):
  rule = dataclasses.replace(SPIKE, action='stop', why='Too large.')
  with pytest.raises(Unhealthy) as error:
    steps(watch(tmp_path, rule), [1.0, 11.0, 1.0])
  assert error.value.exit_code == 65
  for part in ('spike at step 2', 'loss 11', 'above 10', 'Too large.', 'checkpoint_40', 'without'):
    assert part in str(error.value)


def test_a_save_is_asked_for_once(tmp_path):
  notes = []
  at = watch(tmp_path, dataclasses.replace(SPIKE, action='save'), notes=notes)
  assert not at.save_due()
  steps(at, [1.0, 11.0, 12.0])
  assert at.save_due()
  assert not at.save_due()
  assert notes[0].startswith('Health: spike at step 2: loss 11, above 10 (save).')


def test_events_are_written_once_across_resumes(tmp_path):
  with watch(tmp_path, SPIKE) as at:
    steps(at, [1.0, 11.0, 1.0, 11.0])
  with watch(tmp_path, SPIKE, start=3) as at:
    steps(at, [11.0], begin=4)
  lines = [json.loads(line) for line in (tmp_path / EVENTS).read_text().splitlines()]
  assert [(line['step'], line['kind']) for line in lines] == [
    (2, 'fired'),
    (3, 'cleared'),
    (4, 'fired'),
  ]
  assert lines[0]['rule'] == 'spike'
  assert lines[0]['action'] == 'note'


def test_events_that_cannot_be_written_stop_nothing(tmp_path):
  notes = []
  at = watch(tmp_path, SPIKE, notes=notes)
  (tmp_path / EVENTS).mkdir()
  steps(at, [1.0, 11.0])
  assert any(EVENTS in note and 'training goes on' in note for note in notes)


def test_a_watch_that_is_interrupted_anywhere_decides_the_same(tmp_path):
  """Records, limits and rates at every step, whatever the step it was saved and taken up after."""
  z = {'measure': 'robust_z', 'baseline': 4, 'floor': 0.1}
  one = {'window': 1, 'share': 1.0, 'clear': 0.0}
  rules = (
    Rule('skips', 'loss', above=5.0, action='skip', **z, **one),
    Rule('slows', 'loss_max', above=9.0, action='lower_rate', factor=0.25, **one),
  )
  losses = [1.0, 1.1, 0.9, 1.0, 12.0, 1.1, 1.0, 30.0, 0.9, 0.8, 0.7, 0.9]
  clock = ('goodput', 'stalled_fraction')
  timeless = lambda rs: [{k: v for k, v in r.items() if k not in clock} for r in rs]

  def run(stops):
    at, records, seen, begin = watch(tmp_path, *rules), [], [], 0
    for stop in (*stops, len(losses)):
      for step in range(begin, stop):
        seen.append(at.controls())
        records += timeless(steps(at, [losses[step]], begin=step + 1, period=3))
      state = json.loads(json.dumps(at.state()))['health']
      at, begin = watch(tmp_path, *rules, start=stop, state=state), stop
    return records, seen

  records, seen = run(())
  assert records[-1]['skipped_steps'] == 2
  assert records[1]['skipped_fraction'] == pytest.approx(1 / 3)
  rates = [c['rate_scale'] for (c,) in seen]
  assert set(rates) == {1.0, 0.25}
  assert any(math.isfinite(c['loss']) for (c,) in seen)
  for stop in range(1, len(losses)):
    assert run((stop,)) == (records, seen), stop


@pytest.mark.parametrize(
  'state',
  [
    3, [], {'rules': 3}, {'dead_steps': 'a'}, {'dead_steps': [[1], [1, 2]]},
    {'dead_steps': [['a']]}, {'skipped': {'steps': -1}},
    {'peaks': {'loss': 'a', 'grad_norm': 'nan'}},
  ],
)  # fmt: skip
def test_a_checkpoint_that_says_odd_things_of_health_is_taken_up_without(tmp_path, state):
  assert watch(tmp_path, state=state).state() == watch(tmp_path).state()
