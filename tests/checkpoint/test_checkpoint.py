"""Saving and restoring on eight simulated devices: exact, on any mesh, the same model only."""

import json
import time

import jax
import jax.numpy as jnp
import optax
import pytest

from openmoe.checkpoint import manifest
from openmoe.checkpoint.checkpointer import Checkpointer, CheckpointError
from openmoe.checkpoint.description import identity_differences
from openmoe.config import ConfigError
from tests.checkpoint.case import (
  DATA,
  IDENTITY,
  abstract,
  assert_equal,
  checkpoints,
  make_state,
  mesh,
)


def test_restores_exactly_with_data_and_metadata(open_dir):
  state = make_state(step=7)
  checkpointer = open_dir()
  assert checkpointer.latest_step() is None
  checkpointer.save(7, state, DATA, {'tokens_seen': 4096, 'versions': {'jax': '0.10.2'}})
  checkpointer.wait()
  again = open_dir()
  assert again.latest_step() == 7
  restored, data, metadata = again.restore(7, abstract(state))
  assert_equal(restored, state)
  assert dict(data) == DATA
  assert metadata == {'tokens_seen': 4096, 'versions': {'jax': '0.10.2'}}


def test_a_save_compiles_nothing(open_dir):
  """By itself orbax cuts each array among its replicas, by a program for each place."""
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **more: compiled.append(name) if 'backend_compile' in name else None
  )
  state = jax.block_until_ready(make_state(step=2, scale=3))
  assert compiled  # the listener hears: making the state compiles
  compiled.clear()
  open_dir().save(2, state, DATA, {})
  assert not compiled


@pytest.mark.parametrize('shape', [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_restores_onto_another_mesh(open_dir, shape):
  state = make_state(step=3)
  checkpointer = open_dir()
  checkpointer.save(3, state, DATA, {})
  target = abstract(make_state(where=mesh(*shape)))
  restored, _, _ = checkpointer.restore(3, target)
  assert_equal(restored, state)
  wanted = jax.tree.map(lambda x: x.sharding, target)
  jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), restored, wanted)
  assert restored.params['layers']['experts'].sharding.mesh.shape['expert'] == shape[1]


def test_restores_without_a_mesh(open_dir):
  state = make_state(step=3)
  checkpointer = open_dir()
  checkpointer.save(3, state, DATA, {})
  restored, _, _ = checkpointer.restore(3, jax.eval_shape(lambda: state))
  assert_equal(restored, state)


def test_restores_parameters_alone(open_dir, tmp_path):
  state = make_state(step=3)
  writer = open_dir()
  writer.save(3, state, DATA, {})
  writer.wait()
  reader = open_dir(read_only=True)
  # Proof that nothing else is read: the optimizer state may be gone once the files are checked.
  assert reader.latest_step() == 3
  for path in (tmp_path / 'run/checkpoint_3/state').rglob('*'):
    if path.is_file():
      path.unlink()
  assert_equal(reader.restore_params(3, abstract(state.params)), state.params)


def test_a_save_is_not_changed_by_the_steps_after_it(open_dir):
  state = make_state(step=0, scale=512)
  before = jax.device_get(state.params)
  step = jax.jit(
    lambda s: s.replace(step=s.step + 1, params=jax.tree.map(lambda x: x * 1.5, s.params)),
    donate_argnums=0,
  )
  checkpointer = open_dir()
  target = abstract(state)
  checkpointer.save(0, state, DATA, {})
  for _ in range(5):
    state = step(state)  # the saved buffers are donated, and written over, while they are saved
  restored, _, _ = checkpointer.restore(0, target)
  assert_equal(restored.params, before)


def test_keeps_the_newest_n(open_dir, tmp_path):
  checkpointer = open_dir(keep=2)
  for step in (10, 20, 30, 40):
    checkpointer.save(step, make_state(step), DATA, {})
  checkpointer.wait()
  assert checkpoints(tmp_path / 'run') == ['checkpoint_30', 'checkpoint_40']


def test_saving_a_step_again_changes_nothing(open_dir, tmp_path):
  checkpointer = open_dir()
  checkpointer.save(5, make_state(5), DATA, {})
  checkpointer.wait()
  before = (tmp_path / 'run/checkpoint_5/manifest.json').read_text()
  checkpointer.save(5, make_state(5), DATA, {})
  checkpointer.wait()
  assert (tmp_path / 'run/checkpoint_5/manifest.json').read_text() == before


def test_another_model_is_refused_with_the_fields_named(open_dir):
  state = make_state(3)
  writer = open_dir()
  writer.save(3, state, DATA, {})
  writer.wait()
  other = {**IDENTITY, 'embed_dim': 32, 'moe': {'num_experts': 16, 'top_k': 2}}
  checkpointer = open_dir(identity=other)
  for attempt in (
    lambda: checkpointer.restore(3, abstract(state)),
    lambda: checkpointer.restore_params(3, abstract(state.params)),
  ):
    with pytest.raises(ConfigError, match='MODEL_DIR') as error:
      attempt()
    assert 'embed_dim is 16 there and 32 here' in str(error.value)
    assert 'moe.num_experts is 8 there and 16 here' in str(error.value)
    assert 'top_k' not in str(error.value)


def test_differences_name_absent_fields():
  assert identity_differences({'a': 1, 'b': {'c': 2}}, {'a': 1, 'b': {'d': 2}}) == [
    "b.c is 2 there and 'absent' here",
    "b.d is 'absent' there and 2 here",
  ]


def test_another_optimizer_is_refused(open_dir):
  state = make_state(3)
  checkpointer = open_dir()
  checkpointer.save(3, state, DATA, {})
  other = state.replace(opt_state=optax.sgd(0.1, momentum=0.9).init(state.params))
  with pytest.raises(ConfigError, match='optimizer'):
    checkpointer.restore(3, abstract(other))


def test_an_absent_step_is_named_with_those_that_exist(open_dir):
  checkpointer = open_dir()
  checkpointer.save(3, make_state(3), DATA, {})
  with pytest.raises(CheckpointError, match=r'checkpoint_4 does not exist.*\[3\]'):
    checkpointer.restore(4, abstract(make_state()))


def test_metadata_that_is_not_json_is_refused_at_once(open_dir):
  with pytest.raises(TypeError):
    open_dir().save(3, make_state(3), DATA, {'key': jnp.ones(3)})


def test_a_directory_that_cannot_be_made_is_refused_at_the_start(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ConfigError, match='MODEL_DIR'):
    Checkpointer(tmp_path / 'file' / 'run', 3, IDENTITY)
  with pytest.raises(ConfigError, match='does not exist'):
    Checkpointer(tmp_path / 'nowhere', 3, IDENTITY, read_only=True)


def test_a_save_blocks_only_for_the_copy(open_dir, monkeypatch):
  checkpointer = open_dir()
  checkpointer.save(10, make_state(10), DATA, {})  # the first save starts the threads
  checkpointer.wait()
  write = manifest.write
  monkeypatch.setattr(manifest, 'write', lambda *a, **k: (time.sleep(1.0), write(*a, **k)))
  begin = time.perf_counter()
  checkpointer.save(20, make_state(20), DATA, {})
  assert time.perf_counter() - begin < 0.9
  checkpointer.wait()
  assert json.loads((checkpointer._path(20) / 'manifest.json').read_text())['step'] == 20
