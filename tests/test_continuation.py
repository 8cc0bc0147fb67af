"""What may change while a run goes on, and what is refused: the model, its tokens and its data."""

import dataclasses
import json

import pytest

from openmoe import train as train_lib
from openmoe.checkpoint import description
from openmoe.config import ConfigError, OptimizerConfig
from openmoe.data.fingerprint import _fingerprint, changed_files
from openmoe.observe.metrics import read_records
from openmoe.observe.record import write_run_record
from openmoe.programme import as_programme
from openmoe.running.metadata import _FREE, RunMetadata, data_changed
from tests.run_case import arguments, corpus, source_of


@pytest.fixture(scope='module')
def given():
  """Arguments of a run whose source is registered."""
  found = arguments('nowhere', source_of(corpus()))
  found['sources'][0].register()
  return found


def metadata_of(given, **changes) -> RunMetadata:
  given = given | changes
  programme = as_programme(given['data'], given['run'].total_steps)
  return RunMetadata(given['run'], given['model'], OptimizerConfig(), programme)


def with_model(given, moe=None, **changes):
  model = dataclasses.replace(given['model'], **changes)
  return dataclasses.replace(model, moe=dataclasses.replace(model.moe, **(moe or {})))


REFUSED = [
  ({'rope_theta': 500.0}, {}, 'rope_theta is 10000.0 there and 500.0 here'),
  ({'norm_epsilon': 1e-5}, {}, 'norm_epsilon is 1e-06 there and 1e-05 here'),
  ({}, {'top_k': 1}, r'moe\.top_k is 2 there and 1 here'),
  ({}, {'router_order': 'top_k_softmax'}, r'moe\.router_order'),
  ({}, {'capacity_factor': 3.0}, r'moe\.capacity_factor'),
  ({}, {'balance_loss': 'loss_free'}, r"moe\.balance_loss is 'st_moe' there and 'loss_free'"),
  ({}, {'dispatch': 'dropless'}, r"moe\.dispatch is 'scatter' there and 'dropless' here"),
]


@pytest.mark.parametrize(('model', 'moe', 'message'), REFUSED)
def test_another_function_of_the_same_weights_is_refused(given, model, moe, message):
  now = metadata_of(given, model=with_model(given, moe, **model))
  saved = metadata_of(given)._whole
  with pytest.raises(ConfigError, match=f'checkpoint_4 is of another model: .*{message}'):
    now.check_model(saved, 4)


def test_what_only_training_sees_may_change_and_is_told(given):
  model = with_model(given, {'load_balance_weight': 0.5, 'dispatch': 'mask'}, dropout_rate=0.1)
  now, saved = metadata_of(given, model=model), metadata_of(given)._whole
  assert now.check_model(saved, 4) == [
    'dropout_rate is 0.0 there and 0.1 here',
    "moe.dispatch is 'scatter' there and 'mask' here",
    'moe.load_balance_weight is 0.01 there and 0.5 here',
  ]
  assert metadata_of(given).check_model(saved, 4) == []


def test_what_may_change_are_fields_of_a_model(given):
  assert set(description._flatten(description.model_fields(given['model']))) >= _FREE


def test_another_vocabulary_is_refused(given):
  now, saved = metadata_of(given), metadata_of(given)._whole
  other = dataclasses.replace(saved.vocabulary, digest='0' * 64)
  with pytest.raises(ConfigError, match=r'another vocabulary: sentencepiece 0000000000000000 with'):
    now.check_model(dataclasses.replace(saved, vocabulary=other), 4)
  more = dataclasses.replace(saved.vocabulary, extra_ids=7)
  with pytest.raises(ConfigError, match='7 extra ids there'):
    now.check_model(dataclasses.replace(saved, vocabulary=more), 4)


def test_changed_files_are_named_and_need_consent(given):
  now = metadata_of(given)(4)
  (path,) = now['data_files']
  size = now['data_files'][path].partition(':')[0]
  assert int(size) == (corpus() / 'text.jsonl').stat().st_size
  assert not data_changed(given['run'], now, json.loads(json.dumps(now)), 4)
  before = now | {'data_files': {path: '7:abc', '/gone.jsonl': '1:a'}}
  with pytest.raises(ConfigError, match=rf'/gone.jsonl is gone; .*7 bytes there, {size} here'):
    data_changed(given['run'], now, before, 4)
  agreed = dataclasses.replace(given['run'], allow_data_change=True)
  assert data_changed(agreed, now, before, 4)
  older = {k: v for k, v in now.items() if k != 'data_files'}
  assert not data_changed(given['run'], now, older, 4)


def test_a_file_is_known_by_its_beginning_and_end(tmp_path, given):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'a' * 200_000)
  first = _fingerprint(str(path))
  for place in (0, 199_999):
    content = bytearray(b'a' * 200_000)
    content[place] = ord('b')
    path.write_bytes(content)
    assert changed_files({'x': first}, {'x': _fingerprint(str(path))})


def test_tokens_are_counted_on_with_another_batch_size(tmp_path, given):
  first = arguments(tmp_path, source_of(corpus()), total_steps=2, eval_period=0)
  train_lib.train(**first)
  second = arguments(tmp_path, source_of(corpus()), total_steps=4, eval_period=0)
  second['data'] = dataclasses.replace(second['data'], batch_size=16)
  train_lib.train(**second)
  tokens = [r['tokens_seen'] for r in read_records(tmp_path, 'train')]
  assert tokens == [256, 512, 512 + 512, 512 + 1024]
  facts = json.loads((tmp_path / 'checkpoint_4' / 'metadata' / 'metadata').read_text())
  assert facts['metadata']['tokens_seen'] == 1536
  assert facts['metadata'][description.KEY]['tokens_seen'] == 1536


def test_settings_that_differ_are_told(tmp_path):
  said = []
  write_run_record(tmp_path, 'A = 1\nSEED = 0\n', note=said.append)
  write_run_record(tmp_path, 'A = 1\nSEED = 5\n', 3, note=said.append)
  assert said == ['Configured otherwise than the start before (config_until_3.gin): SEED = 5.']
