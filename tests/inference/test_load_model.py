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
from convert.run import Options, convert, find_form
from openmoe.checkpoint import description
from openmoe.checkpoint.checkpointer import Checkpointer
from openmoe.checkpoint.description import identity
from openmoe.config import ConfigError, ModelConfig
from openmoe.data.vocabulary import train_vocabulary
from openmoe.evaluation.items import EvaluationTask, Item, Prompt
from openmoe.evaluation.run import EvaluationConfig, evaluate_task, placed
from openmoe.inference.model import LanguageModel
from openmoe.models import abstract_params
from openmoe.train_step import TrainState
from tests.convert import case as convert_case
from tests.evaluation_case import Silent

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
  facts = to_hf(description.Description(config), 'float32', 7) | {
    'bos_token_id': 0,
    'eos_token_id': 1,
  }
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


def test_another_vocabulary_than_the_described_one_is_refused(run, vocabulary, tmp_path):
  other = tmp_path / 'other.model'
  other.write_bytes(pathlib.Path(vocabulary).read_bytes() + b' ')
  with pytest.raises(ConfigError, match='other.model is not the vocabulary that the checkpoint'):
    load(str(run[0]), vocabulary=str(other))
  given = load(str(run[0]), vocabulary=vocabulary).vocabulary
  assert given.decode([300]).strip() == '<extra_id_19>'
  assert given.fingerprint() == load(str(run[0])).vocabulary.fingerprint()


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
  settings = EvaluationConfig(str(copy), 'eval/{checkpoint}_fixed', ('tiny',))
  assert placed(settings, found.step).out_dir == 'eval/checkpoint_1_fixed'
  assert placed(settings, None).out_dir == 'eval/results_fixed'


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


@pytest.mark.parametrize('kind', ['ours', 'hf'])
def test_every_field_reaches_generation_and_evaluation(kind, vocabulary, tmp_path):
  """Epsilons, routing, capacity and all else are the checkpoint's, never defaults."""
  config = dataclasses.replace(convert_case.unusual(), vocab_size=320)
  # Large enough that the logits are not all alike.
  params = jax.tree.map(lambda x: jnp.asarray(3 * x), random_params(config))
  content = pathlib.Path(vocabulary).read_bytes()
  record = description.vocabulary_record('sentencepiece', vocabulary, 0, content)
  told = description.Description(config, vocabulary=record, start_id=2, eos_ids=(9,))
  description.keep_vocabulary(tmp_path / 'run', record, content)
  writer = Checkpointer(tmp_path / 'run', 1, identity(config))
  state = TrainState(jnp.asarray(5, jnp.int32), params, ())
  writer.save(5, state, {}, {description.KEY: told.plain()})
  writer.close()
  place = tmp_path / 'run'
  if kind == 'hf':
    place = convert(find_form(place), 'hf', tmp_path / 'hf', None, Options(logits=False)).path
    shutil.copyfile(vocabulary, place / 'spiece.model')
  model = load(str(place), capacity=True)
  assert dataclasses.replace(model.config, name=config.name) == config  # dispatch and padding too
  assert (model.start_id, model.eos_ids) == (2, (9,))
  options = {'start_id': 2, 'eos_ids': (9,), 'capacity': True}
  direct = LanguageModel(config, params, model.vocabulary, **options)
  ids = model.vocabulary.encode('a few words of text')
  if kind == 'ours':
    (got,), (want,) = (m.generate([ids], 6)[0] for m in (model, direct))
    assert got.tokens == want.tokens
    assert got.log_probs == pytest.approx(want.log_probs, abs=1e-4)
  defaults = dataclasses.replace(convert_case.CONFIG, vocab_size=320)
  plain = LanguageModel(defaults, params, model.vocabulary, **options)
  item = Item('one', Prompt('a few'), choices=(' words', ' text'), scores=(1.0, 0.0))
  measure = lambda item, prediction: {'first': prediction.log_probs[0]}
  task = EvaluationTask('tiny', 'tiny', lambda: [item], 'first', measure)
  settings = EvaluationConfig(str(place), str(tmp_path / 'out'), ('tiny',), resamples=2)
  result = evaluate_task(model, task, settings, Silent())
  assert result['model']['fingerprint'] == model.fingerprint
  parts = lambda choice: (model.vocabulary.encode('a few'), model.vocabulary.encode(choice))
  asked = [parts(choice) for choice in item.choices]
  found = result['items'][0]['log_probs']
  assert found == pytest.approx([s.log_prob for s in direct.score(asked)], abs=1e-4)
  assert abs(found[0] - plain.score(asked)[0].log_prob) > 1e-2


def test_an_imported_folder_keeps_its_tokens_its_template_and_its_context(vocabulary, tmp_path):
  """What opens as a folder opens alike as the run that was made of it, and as a folder again."""
  config = dataclasses.replace(jetmoe(), vocab_size=322)
  folder = tmp_path / 'folder'
  folder.mkdir()
  hf_folder(folder, config, random_params(config), vocabulary)
  facts = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(facts | {'max_position_embeddings': 5000}))
  (folder / 'generation_config.json').write_text('{"eos_token_id": [1, 9]}')
  (folder / 'added_tokens.json').write_text('{"<|im_end|>": 321}')
  (folder / 'tokenizer_config.json').write_text('{"eos_token": "<|im_end|>"}')
  (folder / 'chat_template.jinja').write_text('{{ messages[0].content }}<|im_end|>')
  made = convert(find_form(folder), 'ours', tmp_path / 'run', None, Options(logits=False))
  again = convert(find_form(made.path), 'hf', tmp_path / 'again', None, Options(logits=False))
  for name in ('spiece.model', 'added_tokens.json'):
    shutil.copyfile(folder / name, again.path / name)
  for place in (folder, tmp_path / 'run', again.path):
    model = load(str(place))
    assert model.eos_ids == (1, 9) and model.max_length == 5000, place
    words = model.vocabulary.encode('a few words')
    assert model.encode_chat([{'role': 'user', 'content': 'a few words'}]) == [*words, 321], place
