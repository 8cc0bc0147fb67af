"""Opening checkpoints: a run, one of its steps, a Hugging Face folder; and what is refused."""

import dataclasses
import json
import pathlib
import shutil

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import sizes
from convert.core.names import name_table
from convert.core.names import to_hf as hf_tensors
from convert.formats import hf_jetmoe
from convert.formats.hf_config import to_hf
from convert.open import load
from openmoe.checkpoint import description
from openmoe.checkpoint.checkpointer import Checkpointer
from openmoe.checkpoint.description import identity
from openmoe.config import ConfigError, ModelConfig
from openmoe.data.vocabulary import train_vocabulary
from openmoe.inference.model import LanguageModel
from openmoe.models import abstract_params
from openmoe.train_step import TrainState

SIZES = {'num_layers': 2, 'embed_dim': 16, 'mlp_dim': 16, 'num_heads': 4, 'head_dim': 4}
# What would run, were a run's config.gin parsed.
CONFIG_GIN = """
from __gin__ import dynamic_registration
from openmoe import train

train.train.data = @touch/pathlib.Path.write_text()
touch/pathlib.Path.write_text.self = '{marker}'
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
def run(tmp_path_factory, vocabulary):
  """A run as training leaves it: described, with its vocabulary beside the checkpoints."""
  directory = tmp_path_factory.mktemp('run')
  content = pathlib.Path(vocabulary).read_bytes()
  record = description.vocabulary_record('sentencepiece', vocabulary, 20, content)
  told = description.Description(dense(), vocabulary=record, row_length=24, eos_ids=(1, 7))
  description.keep_vocabulary(directory, record, content)
  about = {description.KEY: told.plain()}
  params = random_params(dense())
  writer = Checkpointer(directory, 3, identity(dense()))
  for step, scale in ((1, 0.5), (2, 1.0)):
    scaled = jax.tree.map(lambda x, s=scale: jnp.asarray(x * s), params)
    state = TrainState(step=jnp.asarray(step, jnp.int32), params=scaled, opt_state=())
    writer.save(step, state, {}, about)
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


def test_a_run_says_its_model_and_vocabulary_and_runs_nothing(run, tmp_path):
  directory, _ = run
  marker = tmp_path / 'marker'
  (directory / 'config.gin').write_text(CONFIG_GIN.format(marker=marker))
  try:
    model = load(str(directory), dtype='bfloat16')
  finally:
    (directory / 'config.gin').unlink()
  assert not marker.exists()
  assert model.eos_ids == (1, 7)
  assert model.vocabulary.decode([300]).strip() == '<extra_id_19>'
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


@pytest.fixture
def old_run(tmp_path):
  """A run of before there were descriptions: its identity tells sizes alone."""
  told = identity(dense())
  del told['architecture']
  writer = Checkpointer(tmp_path, 3, told)
  params = jax.tree.map(jnp.asarray, random_params(dense()))
  writer.save(3, TrainState(jnp.asarray(3, jnp.int32), params, ()), {}, {})
  writer.close()
  return tmp_path


def test_an_old_checkpoint_opens_when_the_user_says_what_it_is(old_run, vocabulary):
  with pytest.raises(ConfigError, match='before checkpoints described their model.*--model'):
    load(str(old_run), vocabulary=vocabulary)
  file = old_run / 'model.json'
  file.write_text(json.dumps(description.model_fields(dense())))
  assert load(str(old_run), vocabulary=vocabulary, model=str(file)).name == 'openmoe:3'
  with pytest.raises(ConfigError, match='is of another model than openmoe_tiny: .*embed_dim'):
    load(str(old_run), vocabulary=vocabulary, model='openmoe_tiny')


def test_another_vocabulary_in_the_place_of_the_described_one_is_refused(run, tmp_path):
  copy = shutil.copytree(run[0], tmp_path / 'copy')
  (kept,) = copy.glob('vocabulary_*.model')
  kept.write_bytes(kept.read_bytes() + b' ')
  with pytest.raises(ConfigError, match='is not the vocabulary that the checkpoint was made with'):
    load(str(copy))


def test_results_are_named_after_the_checkpoint_that_was_read(run, tmp_path, vocabulary):
  copy = shutil.copytree(run[0], tmp_path / 'copy')
  (manifest,) = copy.glob('checkpoint_2/manifest.json')
  manifest.unlink()
  found, first = load(str(copy)), load(f'{run[0]}/checkpoint_1')
  assert found.name == 'openmoe:1' and found.fingerprint == first.fingerprint


def test_several_ends_and_added_tokens_of_a_folder(vocabulary, tmp_path):
  config = dataclasses.replace(jetmoe(), vocab_size=322)
  folder = hf_folder(tmp_path, config, random_params(config), vocabulary)
  (tmp_path / 'generation_config.json').write_text('{"eos_token_id": [1, 9]}')
  (tmp_path / 'added_tokens.json').write_text('{"<|im_start|>": 320, "<|im_start|>x": 321}')
  model = load(folder)
  assert model.eos_ids == (1, 9)
  ids = model.vocabulary.encode('<|im_start|>xa few')
  assert ids == [321, *model.vocabulary.encode('a few')]
  assert model.vocabulary.decode(ids) == '<|im_start|>xa few'
  (tmp_path / 'added_tokens.json').write_text('{"a": "b"}')
  with pytest.raises(ConfigError, match="added_tokens.json: the added token 'a': 'b'"):
    load(folder)
