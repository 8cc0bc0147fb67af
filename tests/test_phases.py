"""JetMoE's recipe at its smallest: two phases with their own data, and starts from checkpoints."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import seqio

from openmoe.checkpoint.checkpointer import Checkpointer
from openmoe.checkpoint.description import identity
from openmoe.config import (
  ConfigError,
  DataConfig,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  TrainConfig,
)
from openmoe.data.sources import TextFiles
from openmoe.models import build_model
from openmoe.optimizer import learning_rate
from openmoe.running.origin import initial_state
from openmoe.train import train
from openmoe.train_step import TrainState, init_state
from tasks import chains

MODEL = ModelConfig(
  'tiny', 384, 1, 16, 16, 1, 8, 1,
  MoEConfig(2, top_k=1, group_size=32, dispatch='dropless', router_order='top_k_softmax',
            router_loss='sum', ignore_padding=True),
  dtype='float32', architecture='jetmoe', init_std=0.05,
)  # fmt: skip
ADAMW = OptimizerConfig(
  name='adamw', learning_rate=1e-2, warmup_steps=4, clip_global_norm=1.0, schedule='linear_warmup'
)
WSD = dataclasses.replace(ADAMW, schedule='wsd', decay_steps=4, final_fraction=0.1)


def test_wsd_is_the_first_phase_and_then_a_decay():
  """Phase 1's warm-up and constant rate, then exponential from the first step of phase 2."""
  first, second = learning_rate(ADAMW, 16), learning_rate(WSD, 20)
  steps = jnp.arange(16)
  np.testing.assert_array_equal(jax.vmap(first)(steps), jax.vmap(second)(steps))
  decay = np.asarray([second(step) for step in range(16, 21)])
  np.testing.assert_allclose(decay, 1e-2 * 0.1 ** (np.arange(5) / 4), rtol=1e-6)


def saved_state(directory) -> TrainState:
  optimizer = optax.adam(1e-3)
  state = init_state(build_model(MODEL), optimizer, seed=3).replace(step=jnp.int32(7))
  checkpointer = Checkpointer(directory, 1, identity(MODEL))
  checkpointer.save(7, state, {}, {})
  checkpointer.wait()
  checkpointer.close()
  return state


def test_a_start_takes_all_or_only_parameters(tmp_path):
  state = saved_state(tmp_path)
  run = TrainConfig('new', 10, initial_checkpoint=f'{tmp_path}/checkpoint_7')
  abstract = jax.eval_shape(lambda: state)
  fresh = lambda: init_state(build_model(MODEL), optax.adam(1e-3), seed=4)
  whole, _ = initial_state(run, identity(MODEL), abstract, fresh)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(a, b)
  run = dataclasses.replace(run, initial_state='params')
  part, _ = initial_state(run, identity(MODEL), abstract, fresh)
  assert int(part.step) == 0
  for a, b in zip(jax.tree.leaves(part.params), jax.tree.leaves(state.params), strict=True):
    np.testing.assert_array_equal(a, b)
  other = {**identity(MODEL), 'embed_dim': 99}
  with pytest.raises(ConfigError, match='embed_dim'):
    initial_state(run, other, abstract, fresh)
  with pytest.raises(ConfigError, match='must end in checkpoint_STEP'):
    initial_state(
      dataclasses.replace(run, initial_checkpoint=str(tmp_path)), identity(MODEL), abstract, fresh
    )


def corpus(directory, name: str, sentence: str) -> str:
  """Registers a corpus of one repeated sentence; the name of its language-model task."""
  path = directory / f'{name}.jsonl'
  path.write_text('\n'.join(json.dumps({'text': sentence * 3}) for _ in range(64)))
  source = TextFiles({'train': str(path)})
  vocabulary = seqio.ByteVocabulary(extra_ids=100)
  chains.add_corpus(name, source, vocabulary, objectives=('full_lm',))
  return f'{name}_full_lm'


@pytest.mark.slow
def test_two_phases(tmp_path):
  """Phase 2 goes on at phase 1's step, with other data, and its loss on them falls."""
  one = corpus(tmp_path, 'phase_one', 'the cat sat on the mat. ')
  two = corpus(tmp_path, 'phase_two', 'abc abd abe. ')
  data = lambda task: DataConfig(task, {'targets': 32}, 8, num_shards=1)
  mesh = MeshConfig(num_expert_partitions=2)
  runs = [
    TrainConfig(str(tmp_path / name), steps, log_period=1, eval_period=0, checkpoint_period=100)
    for name, steps in (('1', 16), ('2', 20))
  ]
  train(runs[0], MODEL, ADAMW, data(one), mesh=mesh)
  second = dataclasses.replace(runs[1], initial_checkpoint=f'{tmp_path}/1/checkpoint_16')
  result = train(second, MODEL, WSD, data(two), mesh=mesh)
  assert (result.step, result.complete) == (20, True)
  lines = (tmp_path / '2' / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  steps = [row for row in rows if 'learning_rate' in row]
  assert [row['step'] for row in steps] == [17, 18, 19, 20]
  rates = [row['learning_rate'] for row in steps]
  np.testing.assert_allclose(rates, 1e-2 * 0.1 ** (np.arange(4) / 4), rtol=1e-5)
  assert steps[-1]['loss'] < steps[0]['loss']
