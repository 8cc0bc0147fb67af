"""Health in real runs: what is not finite is skipped, and never saved; what the runs look at."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe import train as train_lib
from openmoe.config import MoEConfig
from openmoe.feed import Feed
from openmoe.health import HealthConfig, Rule
from openmoe.health.watch import EVENTS, Unhealthy
from openmoe.layers.moe.layer import route_groups
from openmoe.observe.metrics import read_records
from openmoe.running.probe import Probe, nonfinite_experts, saturation
from tests.run_case import arguments, corpus, source_of, timeless

SKIP = Rule('skip', 'loss', above=1e6, window=1, share=1.0, clear=0.0, action='skip')
SAVE = Rule('save', 'skipped_steps', above=0.5, window=1, share=1.0, clear=0.0, action='save')


class Killed(BaseException):
  """Stands for SIGKILL."""


def poisoned(monkeypatch, *, dies_at: int = 0) -> None:
  """Makes the sixth batch of a run give a loss that is not a number, wherever the run began."""
  take = Feed.__next__

  def give(self):
    step = self._stream._step
    if step == dies_at - 1:
      raise Killed
    batch = take(self)
    return batch.replace(loss_weights=batch.loss_weights * jnp.nan) if step == 5 else batch

  monkeypatch.setattr(Feed, '__next__', give)


@pytest.fixture(scope='module')
def source():
  return source_of(corpus())


def test_a_step_that_is_not_finite_is_skipped_alike_in_a_run_that_is_killed(
  source, tmp_path, monkeypatch
):
  health = HealthConfig((SKIP, SAVE))
  with monkeypatch.context() as patch:
    poisoned(patch)
    whole = train_lib.train(**arguments(tmp_path / 'whole', source, log_period=2), health=health)
  with monkeypatch.context() as patch:
    poisoned(patch, dies_at=8)
    with pytest.raises(Killed):
      train_lib.train(**arguments(tmp_path / 'killed', source, log_period=2), health=health)
  with monkeypatch.context() as patch:
    poisoned(patch)
    again = train_lib.train(**arguments(tmp_path / 'killed', source, log_period=2), health=health)
  assert whole.complete
  assert again.complete
  # The rule saved right after the step that was skipped, which no period of saves would have.
  assert again.resumed_from == 6
  records = read_records(tmp_path / 'whole', 'train')
  assert [r['skipped_steps'] for r in records] == [0, 0, 1, 1, 1, 1]
  assert [r['skipped_fraction'] for r in records] == [0, 0, 0.5, 0, 0, 0]
  assert not np.isfinite(records[2]['loss'])
  assert np.isfinite(records[3]['loss'])
  assert timeless(tmp_path / 'killed') == timeless(tmp_path / 'whole')
  assert (tmp_path / 'killed' / EVENTS).read_text() == (tmp_path / 'whole' / EVENTS).read_text()
  for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(again.params), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# --- before a save


AXES = {
  'moe': {
    'experts': {
      'wi': {'kernel': ('groups', 'expert', 'embed')},
      'wo': {'kernel': ('groups', 'expert', 'mlp')},
    }
  },
  'attention': {'out': {'kernel': ('groups', 'expert', 'embed')}},
  'norm': {'scale': ('embed',)},
}


def test_experts_that_are_not_finite_are_counted_once_each():
  params = jax.tree.map(
    lambda names: np.zeros((2, 4, 3)[: len(names)], np.float32),
    AXES,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  assert nonfinite_experts(params, AXES) == 0
  params['moe']['experts']['wi']['kernel'][0, 1, 2] = np.nan
  params['moe']['experts']['wo']['kernel'][0, 1, 0] = np.inf  # the same expert
  params['moe']['experts']['wo']['kernel'][1, 1, 0] = np.inf  # that of another layer
  params['attention']['out']['kernel'][0, 1, 0] = np.nan  # another expert of the layer
  params['norm']['scale'][0] = np.nan  # no expert
  assert nonfinite_experts(params, AXES) == 3


def test_saturation_counts_choices_in_any_order_of_routed_tokens():
  before = np.array([[[0, 1], [2, 3], [0, 1], [-1, -1]]])
  now = np.array([[[1, 0], [2, 0], [2, 3], [-1, -1]]])
  assert saturation(before, now) == pytest.approx(3 / 6)
  assert saturation(now, now) == 1.0


@pytest.mark.parametrize(
  'state',
  [
    None, [], {'shape': [1, 1, 1]}, {'shape': [2, 1, 1], 'choices': 'AAA='},
    {'shape': 'x', 'choices': ''}, {'shape': [1, 1, 1], 'choices': '!'},
    {'shape': [1, 1, -1], 'choices': 'AAA='}, {'shape': [1, 1, 1], 'choices': 'AA=='},
  ],
)  # fmt: skip
def test_a_state_that_is_none_of_ours_counts_as_nothing(state):
  probe = Probe(nn.Dense(1), {}, None, jax.make_mesh((1,), ('data',)))
  probe.restore(state)
  assert probe.state() == {}
  probe.restore({'shape': [1, 1, 1], 'choices': 'AwA='})
  assert probe.state() == {'probe': {'shape': [1, 1, 1], 'choices': 'AwA='}}


def test_an_expert_that_is_not_finite_is_never_saved(source, tmp_path, monkeypatch):
  looks = []

  def look(self, params, follow):
    looks.append(follow)
    return {'nonfinite_experts': float(len(looks) == 2)}

  monkeypatch.setattr(Probe, '__call__', look)
  with pytest.raises(Unhealthy, match='nonfinite_expert at step 8.*checkpoint_4'):
    train_lib.train(**arguments(tmp_path, source))
  assert looks == [True, True]
  assert not (tmp_path / 'checkpoint_8').exists()


# --- what is dropped at the end of rows


class Routes(nn.Module):
  config: MoEConfig

  @nn.compact
  def __call__(self, x_btd):
    return route_groups(x_btd, None, self.config, True)[1]


@pytest.mark.parametrize(('group', 'dispatch'), [(8, 'scatter'), (16, 'scatter'), (16, 'dropless')])
def test_drops_of_the_last_quarter_are_those_of_a_loop(group, dispatch):
  config = MoEConfig(4, group_size=group, dispatch=dispatch, min_expert_capacity=1)
  x_btd = jax.random.normal(jax.random.key(0), (4, 8, 6))
  routing = Routes(config).init_with_output(jax.random.key(1), x_btd)[0]
  slot_btk = np.asarray(routing.slot_gtk).reshape(4, 8, 2)
  capacity = np.inf if routing.capacity is None else routing.capacity
  lost = [slot_btk[b, t, k] >= capacity for b in range(4) for t in (6, 7) for k in range(2)]
  assert float(routing.stats.late_dropped_fraction) == pytest.approx(np.mean(lost))
  assert dispatch == 'dropless' or any(lost)


def test_rows_of_one_token_have_a_last_quarter():
  config = dataclasses.replace(MoEConfig(4, group_size=8), min_expert_capacity=1)
  routing = Routes(config).init_with_output(jax.random.key(1), jnp.ones((8, 1, 6)))[0]
  stats = routing.stats
  assert float(stats.late_dropped_fraction) == pytest.approx(float(stats.dropped_fraction))
