"""Opening checkpoints: a run, one of its steps, a Hugging Face folder; and what is refused."""

import dataclasses
import json
import shutil

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
from safetensors.numpy import load_file, save_file

from convert import sizes
from convert.core.names import name_table
from convert.core.names import to_hf as hf_tensors
from convert.formats import hf_jetmoe
from convert.formats.hf_config import to_hf
from openmoe.checkpoint.checkpointer import Checkpointer
from openmoe.checkpoint.description import identity
from openmoe.config import ConfigError, ModelConfig
from openmoe.data.vocabulary import Vocabulary, train_vocabulary
from openmoe.inference.model import LanguageModel
from openmoe.train_state import TrainState, abstract_params
from scripts.load_model import load

SIZES = {'num_layers': 2, 'embed_dim': 16, 'mlp_dim': 16, 'num_heads': 4, 'head_dim': 4}
CONFIG_GIN = """
from __gin__ import dynamic_registration
from openmoe import config
from openmoe import train
from openmoe.data import sources

train.train.data = @config.DataConfig()
train.train.model = @config.ModelConfig()
config.DataConfig.batch_size = 8
config.DataConfig.mixture_or_task_name = 'load_model_test'
config.DataConfig.task_feature_lengths = {'targets': 24}
config.ModelConfig.name = 'openmoe'
config.ModelConfig.vocab_size = 320
config.ModelConfig.num_layers = 2
config.ModelConfig.embed_dim = 16
config.ModelConfig.mlp_dim = 16
config.ModelConfig.num_heads = 4
config.ModelConfig.head_dim = 4
"""


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory) -> str:
  path = str(tmp_path_factory.mktemp('vocabulary') / 'spiece.model')
  train_vocabulary(path, ['a few words of text, and some more of them\n'] * 20, 300)
  return path


def dense() -> ModelConfig:
  return ModelConfig('openmoe', 320, **SIZES, dtype='float32')


def jetmoe() -> ModelConfig:
  facts = {
    'model_type': 'jetmoe',
    'vocab_size': 320,
    'hidden_size': 16,
    'num_hidden_layers': 2,
    'num_key_value_heads': 4,
    'kv_channels': 4,
    'intermediate_size': 16,
    'num_local_experts': 4,
  }
  found = sizes.of_told(hf_jetmoe.sizes(facts), 'the test')
  return dataclasses.replace(found, name='jetmoe', dtype='float32')


def random_params(config: ModelConfig):
  rng = np.random.default_rng(0)
  draw = lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32)
  return jax.tree.map(draw, abstract_params(config)[0])


def compare(model, config: ModelConfig, params) -> None:
  """Scores through the loaded model equal those of the parameters themselves."""
  ids = model.vocabulary.encode('a few words')
  assert model.vocabulary.decode(ids) == 'a few words'
  direct = LanguageModel(
    config, jax.tree.map(jnp.asarray, params), model.vocabulary, start_id=model.start_id
  )
  request = [(ids[:2], ids[2:])]
  want, got = direct.score(request)[0], model.score(request)[0]
  assert got.token_log_probs == pytest.approx(want.token_log_probs, abs=2e-5)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  directory = tmp_path_factory.mktemp('run')
  params = random_params(dense())
  writer = Checkpointer(directory, 3, identity(dense()))
  for step, scale in ((1, 0.5), (2, 1.0)):
    scaled = jax.tree.map(lambda x, s=scale: jnp.asarray(x * s), params)
    state = TrainState(step=jnp.asarray(step, jnp.int32), params=scaled, opt_state=())
    writer.save(step, state, {}, {})
  writer.wait()
  writer.close()
  return directory, params


def test_a_run_and_one_of_its_steps(run, vocabulary):
  directory, params = run
  model = load(str(directory), vocabulary=vocabulary)
  assert model.name == 'openmoe:2' and model.max_length == 2048
  assert model.mesh is not None and model.mesh.size == 8
  compare(model, dense(), params)
  half = load(f'{directory}/checkpoint_1', vocabulary=vocabulary, max_length=32)
  assert half.name == 'openmoe:1' and half.max_length == 32
  assert half.fingerprint != model.fingerprint
  assert load(str(directory), vocabulary=vocabulary).fingerprint == model.fingerprint


def test_a_run_says_its_model_and_vocabulary(run, vocabulary):
  directory, _ = run
  feature = seqio.Feature(Vocabulary(vocabulary, extra_ids=20))
  source = seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=('train',))
  parts = {'source': source, 'preprocessors': [], 'output_features': {'targets': feature}}
  seqio.TaskRegistry.add('load_model_test', **parts)
  (directory / 'config.gin').write_text(CONFIG_GIN)
  try:
    model = load(str(directory), dtype='bfloat16')
  finally:
    seqio.TaskRegistry.remove('load_model_test')
    (directory / 'config.gin').unlink()
  assert model.config.dtype == 'bfloat16' and model.vocabulary.eos_id == 1
  kernels = flax.traverse_util.flatten_dict(model.params, sep='/')
  assert kernels['layer_0/mlp/wo/kernel'].dtype == jnp.bfloat16
  assert kernels['layer_0/pre_mlp_norm/scale'].dtype == jnp.float32
  assert kernels['logits_dense/kernel'].dtype == jnp.float32


def hf_folder(folder, config, params, vocabulary) -> str:
  tensors = hf_tensors(name_table(config), flax.traverse_util.flatten_dict(params, sep='/'))
  facts = to_hf(config, 'float32', 7, {}) | {'bos_token_id': 0, 'eos_token_id': 1}
  save_file(tensors, folder / 'model.safetensors')
  (folder / 'config.json').write_text(json.dumps(facts))
  shutil.copyfile(vocabulary, folder / 'spiece.model')
  return str(folder)


@pytest.mark.parametrize('config', [dense(), jetmoe()], ids=lambda c: c.name)
def test_a_hugging_face_folder(config, vocabulary, tmp_path):
  params = random_params(config)
  model = load(hf_folder(tmp_path, config, params, vocabulary), num_model_partitions=4)
  assert (model.start_id, int(model.vocabulary.eos_id)) == (0, 1)
  assert model.mesh.shape['model'] == 4
  compare(model, config, params)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'checkpoint': '/nowhere'}, '/nowhere does not exist. Give a run directory'),
    ({'dtype': 'float17'}, "dtype='float17' is not one of"),
    ({'max_length': 1}, 'max_length=1 leaves no room'),
    ({'vocabulary': None}, 'has no config.gin that names a vocabulary'),
    ({'vocabulary': '/nowhere'}, '/nowhere has no tokenizer'),
    ({'checkpoint': None}, 'is no run directory'),
    ({'num_model_partitions': 8}, 'num_heads=4 does not divide'),
  ],
)
def test_what_cannot_be_opened_is_refused_by_name(change, message, run, vocabulary, tmp_path):
  arguments = {'checkpoint': str(run[0]), 'vocabulary': vocabulary} | change
  arguments['checkpoint'] = arguments['checkpoint'] or str(tmp_path)
  with pytest.raises(ConfigError, match=message):
    load(**arguments)


def test_a_missing_tensor_is_named(vocabulary, tmp_path):
  config = dense()
  folder = hf_folder(tmp_path, config, random_params(config), vocabulary)
  tensors = load_file(tmp_path / 'model.safetensors')
  del tensors['model.norm.weight']
  save_file(tensors, tmp_path / 'model.safetensors')
  with pytest.raises(ConfigError, match=r'model\.norm\.weight is missing'):
    load(folder)
