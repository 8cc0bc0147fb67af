"""Conversions there and back are bit-exact, and the files are what their formats say."""

import json
import shutil

import ml_dtypes
import msgpack
import numpy as np
import pytest
import safetensors
import tensorstore

from convert.core.names import name_table
from convert.core.tensors import ConvertError, Stored
from convert.run import Options, convert, find_form
from openmoe.checkpoint.checkpointer import Checkpointer
from openmoe.checkpoint.description import identity
from openmoe.models import abstract_params
from tests.convert import case


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    assert found[name].dtype == x.dtype, name
    assert found[name].tobytes() == x.tobytes(), name


@pytest.mark.parametrize('kind', ['hf', 't5x'])
def test_float32_round_trip_is_bit_exact(kind, ours, tmp_path, request):
  there = request.getfixturevalue(kind)
  back = convert(
    find_form(there), 'ours', tmp_path / 'back', case.model_file(tmp_path / 'm.json'), Options()
  )
  assert_same(case.loaded(there), case.weights())
  assert_same(case.loaded(back.path), case.weights())


def test_bfloat16_round_trip_through_hugging_face_is_bit_exact(tmp_path):
  rounded = {n: x.astype(ml_dtypes.bfloat16) for n, x in case.weights().items()}
  run = case.write_ours(tmp_path / 'run', rounded)
  hf = case.run_convert(run, 'hf', tmp_path / 'hf')
  assert_same(case.loaded(hf), rounded)
  assert_same(case.loaded(case.run_convert(hf, 'ours', tmp_path / 'back')), rounded)


def test_export_in_bfloat16_rounds_to_nearest_even(ours, tmp_path):
  hf = case.run_convert(ours, 'hf', tmp_path / 'hf', dtype='bfloat16')
  assert_same(case.loaded(hf), {n: x.astype(ml_dtypes.bfloat16) for n, x in case.weights().items()})


def test_safetensors_reads_what_we_write_in_shards(ours, tmp_path):
  hf = case.run_convert(ours, 'hf', tmp_path / 'hf', max_shard=60_000)
  index = json.loads((hf / 'model.safetensors.index.json').read_text())
  files = set(index['weight_map'].values())
  assert len(files) > 3
  expected = {r.hf: r for r in name_table(case.CONFIG)}
  for name in files:
    with safetensors.safe_open(hf / name, 'numpy') as file:
      for key in file.keys():  # noqa: SIM118 (not a mapping)
        x = case.weights()[key]
        np.testing.assert_array_equal(file.get_tensor(key), x.T if expected[key].transposed else x)
        assert index['weight_map'].pop(key) == name
  assert not index['weight_map']
  assert index['metadata']['total_size'] == sum(x.nbytes for x in case.weights().values())


@pytest.mark.parametrize('codec', ['gzip', 'zstd'])
def test_t5x_layout_is_read_by_plain_msgpack_and_tensorstore(codec, ours, tmp_path):
  made = case.run_convert(ours, 't5x', tmp_path / 'out', codec=codec)
  hook = lambda code, data: msgpack.unpackb(data)
  content = msgpack.unpackb((made / 'checkpoint').read_bytes(), ext_hook=hook)
  assert content['version'] == 3
  assert content['optimizer']['state']['step'][2] == np.int32(case.STEP).tobytes()
  for row in name_table(case.CONFIG):
    node = content['optimizer']['target']
    for key in row.t5x.split('/'):
      node = node[key]
    assert node['kvstore']['path'] == f'target.{row.t5x}'.replace('/', '.')
    spec = {
      'driver': 'zarr',
      'kvstore': {'driver': 'file', 'path': str(made / node['kvstore']['path'])},
    }
    array = tensorstore.open(spec).result()
    assert array.spec().to_json()['metadata']['compressor']['id'] == codec
    np.testing.assert_array_equal(array.read().result(), case.weights()[row.hf])
  assert_same(case.loaded(made), case.weights())


def test_our_checkpointer_restores_an_import(hf, tmp_path):
  made = case.run_convert(hf, 'ours', tmp_path / 'run')
  checkpointer = Checkpointer(
    tmp_path / 'run', keep=1, identity=identity(case.CONFIG), read_only=True
  )
  assert made.name == f'checkpoint_{case.STEP}'
  assert checkpointer.latest_step() == case.STEP
  params = checkpointer.restore_params(case.STEP, abstract_params(case.CONFIG)[0])
  for row in name_table(case.CONFIG):
    node = params
    for key in row.ours.split('/'):
      node = node[key]
    np.testing.assert_array_equal(row.to_t5x(np.asarray(node)), case.weights()[row.hf])


def test_a_model_that_the_weights_do_not_belong_to_is_refused(t5x, tmp_path):
  with pytest.raises(ConvertError, match='vocab_size is 64 there and 256384'):
    convert(find_form(t5x), 'ours', tmp_path / 'out', 'openmoe_8b', Options())
  with pytest.raises(ConvertError, match=r"Nearest: \['openmoe_base'"):
    convert(find_form(t5x), 'ours', tmp_path / 'out', 'openmoe_bas', Options())
  told = shutil.copytree(t5x, tmp_path / t5x.name)
  (told / 'conversion_receipt.json').unlink()  # without it t5x's own files tell too little
  with pytest.raises(ConvertError, match='does not tell num_heads'):
    convert(find_form(told), 'ours', tmp_path / 'out', None, Options())
  assert not (tmp_path / 'out').exists()


def test_what_would_overwrite_is_refused_and_the_same_again_is_complete(ours, hf, tmp_path):
  again = convert(find_form(ours), 'hf', hf, None, Options())
  assert (again.nbytes, again.receipt['target']['kind']) == (0, 'hf')
  with pytest.raises(ConvertError, match='exists already'):
    convert(find_form(ours), 'hf', hf, None, Options(dtype='bfloat16'))


def test_receipt_has_every_tensor_once_with_its_digests(ours, hf, t5x):
  receipt = json.loads((hf / 'conversion_receipt.json').read_text())
  lines = {line['target']: line for line in receipt['tensors']}
  form, source = find_form(hf), find_form(ours)
  assert lines.keys() == case.weights().keys()
  assert len({line['source'] for line in lines.values()}) == len(lines)
  for row in name_table(case.CONFIG):
    line = lines[row.hf]
    assert line['operation'] == ('transpose' if row.transposed else 'copy')
    assert line['sha256_before'] == source.parameter(row).sha256()
    assert line['sha256_after'] == form.parameter(row).sha256()
  assert receipt['source']['fingerprint'] == source.fingerprint()
  assert receipt['target_fingerprint'] == form.fingerprint()
  assert receipt['logits']['max_logit_difference'] < 1e-5
  assert receipt['logits']['same_first_expert'] == 1.0


def test_inspect_reads_no_tensor(t5x, monkeypatch):
  whole = Stored.whole  # of a scalar such as the step
  refuse = lambda self: pytest.fail('it was read') if self.shape else whole(self)
  monkeypatch.setattr(Stored, 'whole', refuse)
  found = json.loads(case.cli('inspect', t5x, '--json'))
  assert found['step'] == case.STEP
  assert found['sizes']['num_experts'] == 4
  wo = found['tensors']['target/decoder/layers_1/mlp/expert/wo/kernel']
  assert wo == {'shape': [4, 48, 32], 'dtype': 'float32'}
  assert found['bytes'] == sum(x.nbytes for x in case.weights().values()) + 4


def test_command_line_round_trip_with_a_verified_result(ours, model, tmp_path):
  case.cli('export', '--to', 'hf', '--model', model, ours, tmp_path / 'hf')
  case.cli('import', '--from', 'hf', '--model', model, tmp_path / 'hf', tmp_path / 'run')
  assert 'agree in every tensor' in case.cli('verify', ours, tmp_path / 'run')
  assert 'is sound' in case.cli('fsck', tmp_path / 'run')
  text = case.cli('export', '--to', 't5x', '--optimizer', ours, tmp_path / 'x', expect=64)
  assert 'has no Adafactor state' in text


def test_diff_names_the_experts_and_routers_that_moved(ours, tmp_path):
  changed = {n: x.copy() for n, x in case.weights().items()}
  changed['model.layers.1.mlp.experts.wo'][2] *= 1.5
  changed['model.layers.3.mlp.gate_weight'] *= 1.1
  other = case.write_ours(tmp_path / 'run', changed)
  found = json.loads(case.cli('diff', ours, other, '--json'))
  assert found['modules']['attention'] == 0
  assert found['modules']['router'] > 0
  assert found['router_drift']['1'] == 0
  np.testing.assert_allclose(found['router_drift']['3'], 0.1, rtol=1e-5)
  assert np.argmax(found['experts']['1']) == 2
  assert np.count_nonzero(found['experts']['1']) == 1
