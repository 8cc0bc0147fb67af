"""Every way a checkpoint goes wrong is caught, and the message names the tensor or the file."""

import dataclasses
import json
import pickle
import shutil
import zipfile

import ml_dtypes
import numpy as np
import pytest

from convert.core.source import find_form
from convert.core.tensors import ConvertError
from convert.formats.pickled import read_bin
from tests.convert import case


@dataclasses.dataclass(frozen=True)
class Names:
  """Where an architecture is mutated.

  Attributes:
    ours, hf: fixtures.
    experts: a tensor of experts.
    square: of layer 2; its first 32 rows are a square matrix.
    last: the last tensor of the file.
  """

  ours: str
  hf: str
  experts: str
  square: str
  last: str


OPENMOE = Names(
  'ours',
  'hf',
  'model.layers.1.mlp.experts.wi_up',
  'model.layers.2.self_attn.q_proj.weight',
  'lm_head.weight',
)
JETMOE = Names(
  'jetmoe',
  'jetmoe_hf',
  'model.layers.1.mlp.output_linear.weight',
  'model.layers.2.self_attention.kv_proj.weight',
  'model.norm.weight',
)
EXPERTS, SQUARE = OPENMOE.experts, OPENMOE.square


def _rows(header, data):
  return {n: bytes(data[e['data_offsets'][0] : e['data_offsets'][1]]) for n, e in header.items()}


def _rewrite(folder, change):
  """Applies change to {name: (entry, bytes)} of model.safetensors and lays the file out anew."""
  path = folder / 'model.safetensors'
  header, data = case.read_file(path)
  header.pop('__metadata__', None)
  content = _rows(header, data)
  tensors = change({name: (entry, content[name]) for name, entry in header.items()})
  new, out = {}, b''
  for name, (entry, x) in tensors.items():
    new[name] = entry | {'data_offsets': [len(out), len(out) + len(x)]}
    out += x
  case.write_file(path, new, out)


def swap_experts(folder, at=OPENMOE):
  case.edit_tensor(folder, at.experts, lambda x: x[[1, 0, 2, 3]])
  return at.experts


def transpose_square(folder, at=OPENMOE):
  turn = lambda x: np.concatenate([x[:32].T, x[32:]])
  case.edit_tensor(folder, at.square, turn)
  return at.square


def drop_tensor(folder, at=OPENMOE):
  _rewrite(folder, lambda t: {n: x for n, x in t.items() if n != at.square})
  return at.square


def rename_layer(folder, at=OPENMOE):
  name = lambda n: n.replace('model.layers.2.', 'model.layers.4.')
  _rewrite(folder, lambda t: {name(n): x for n, x in t.items()})
  return f'{name(at.square)} does not belong'


def exchange_layers(folder, at=OPENMOE):
  """Layers 0 and 2 are of a kind, so no name or shape tells."""
  to = {'0': '2', '2': '0'}

  def name(n):
    parts = n.split('.')
    return '.'.join([*parts[:2], to.get(parts[2], parts[2]), *parts[3:]]) if 'layers' in n else n

  _rewrite(folder, lambda t: {n: t[name(n)] for n in t})
  return at.square


def flip_bit(folder, at=OPENMOE):
  def flip(x):
    x.view(np.uint32)[3, 5] ^= 1
    return x

  case.edit_tensor(folder, at.square, flip)
  return at.square


def double_tensor(folder, at=OPENMOE):
  """The same tensor in two shards."""
  header, data = case.read_file(folder / 'model.safetensors')
  header.pop('__metadata__', None)
  entry = header[at.square]
  begin, end = entry['data_offsets']
  extra = {at.square: entry | {'data_offsets': [0, end - begin]}}
  case.write_file(folder / 'extra.safetensors', extra, bytes(data[begin:end]))
  where = dict.fromkeys(header, 'model.safetensors') | {'other': 'extra.safetensors'}
  index = folder / 'model.safetensors.index.json'
  index.write_text(json.dumps({'metadata': {}, 'weight_map': where}))
  return f'{at.square} is there more than once'


def truncate_shard(folder, at=OPENMOE):
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-100])
  return f'model.safetensors is truncated: {at.last}'


def repeat_expert(folder, at=OPENMOE):
  case.edit_tensor(folder, at.experts, lambda x: x[[0, 1, 2, 1]])
  return f'{at.experts}: experts 1 and 3 are the same'


def zero_expert(folder, at=OPENMOE):
  case.edit_tensor(folder, at.experts, lambda x: x * np.array([1, 1, 0, 1])[:, None, None])
  return f'{at.experts}: expert 2 is missing'


def not_finite(folder, at=OPENMOE):
  case.edit_tensor(folder, at.square, lambda x: np.where(np.eye(*x.shape), np.nan, x))
  return at.square


ALL = [
  swap_experts,
  transpose_square,
  drop_tensor,
  rename_layer,
  exchange_layers,
  flip_bit,
  double_tensor,
  truncate_shard,
  repeat_expert,
  zero_expert,
  not_finite,
]


@pytest.fixture(params=[OPENMOE, JETMOE], ids=['openmoe', 'jetmoe'])
def at(request):
  return request.param


@pytest.mark.parametrize('mutate', ALL)
def test_verify_names_the_tensor(mutate, at, request, tmp_path):
  folder = case.copy(request.getfixturevalue(at.hf), tmp_path / 'hf')
  named = mutate(folder, at)
  text = case.cli('verify', request.getfixturevalue(at.ours), folder, expect=1)
  assert named.split(' ')[0].split(':')[0] in text


@pytest.mark.parametrize('mutate', ALL)
def test_fsck_names_the_tensor_by_the_receipt(mutate, at, request, tmp_path):
  folder = case.copy(request.getfixturevalue(at.hf), tmp_path / 'hf', receipt=True)
  named = mutate(folder, at)
  assert named in case.cli('fsck', folder, expect=1)


@pytest.mark.parametrize('mutate', [swap_experts, transpose_square])
def test_verify_says_what_happened(mutate, at, request, tmp_path):
  folder = case.copy(request.getfixturevalue(at.hf), tmp_path / 'hf')
  mutate(folder, at)
  text = case.cli('verify', request.getfixturevalue(at.ours), folder, expect=1)
  assert ('experts moved, 0 is at 1, 1 is at 0' in text) or ('it is transposed' in text)


def test_without_a_receipt_fsck_still_finds_what_shows(hf, tmp_path):
  for mutate in (drop_tensor, rename_layer, double_tensor, truncate_shard, repeat_expert):
    folder = case.copy(hf, tmp_path / mutate.__name__)
    assert mutate(folder) in case.cli('fsck', folder, expect=1)
  assert 'is sound' in case.cli('fsck', case.copy(hf, tmp_path / 'whole'))


def test_a_cast_that_overflows_is_refused_and_found(tmp_path):
  tensors = {n: x.copy() for n, x in case.weights().items()}
  tensors['model.norm.weight'][3] = 3.4e38
  run = case.write_ours(tmp_path / 'run', tensors)
  arguments = ('export', '--to', 'hf', '--no_logits', run, tmp_path / 'hf')
  text = case.cli(*arguments, '--dtype', 'bfloat16', expect=64)
  assert 'decoder_norm/scale: 3.4e+38 overflows bfloat16' in text
  assert not (tmp_path / 'hf').exists()
  # What a converter that did not look would have written:
  forged = {n: x.astype(ml_dtypes.bfloat16) for n, x in tensors.items() if 'norm.w' not in n}
  forged |= {n: x.astype(ml_dtypes.bfloat16) for n, x in tensors.items() if n not in forged}
  assert not np.isfinite(forged['model.norm.weight'].astype(np.float32)).all()
  other = case.write_ours(tmp_path / 'forged', {n: forged[n] for n in tensors})
  assert 'decoder_norm/scale has values that are not finite' in case.cli('fsck', other, expect=1)
  assert 'overflows bfloat16' in case.cli('verify', '--no_logits', run, other, expect=1)


@pytest.mark.parametrize('kind', ['ours', 't5x'])
def test_a_flipped_bit_of_a_chunk_is_found(kind, ours, t5x, hf, model, tmp_path):
  source = {'ours': ours, 't5x': t5x}[kind]
  folder = shutil.copytree(source, tmp_path / source.name)
  name = {'ours': 'params/decoder.sparse.moe.experts.wo.kernel'}.get(
    kind, 'target.decoder.layers_1.mlp.expert.wo.kernel'
  )
  chunk = max((p for p in (folder / name).iterdir()), key=lambda p: p.stat().st_size)
  content = bytearray(chunk.read_bytes())
  content[len(content) // 2] ^= 4
  chunk.write_bytes(content)
  text = case.cli('fsck', folder, '--model', model, expect=1)
  assert 'wo.kernel' in text or 'wo/kernel' in text
  text = case.cli('verify', hf, folder, '--no_logits', '--model', model, expect=1)
  assert 'wo' in text


def test_a_truncated_chunk_and_mixed_steps_are_found(ours, model, tmp_path):
  folder = shutil.copytree(ours, tmp_path / 'checkpoint_7')
  chunk = folder / 'params' / 'decoder.sparse.moe.experts.wo.kernel' / '1.0.0.0'
  chunk.write_bytes(chunk.read_bytes()[:-40])
  text = case.cli('fsck', folder, expect=1)
  assert 'decoder/sparse/moe/experts/wo/kernel[1]' in text
  moved = shutil.copytree(ours, tmp_path / 'checkpoint_8')
  assert 'mixed steps: the directory says 8' in case.cli('fsck', moved, expect=1)


# --- .bin files


class Payload:
  """Touches a file when unpickled the ordinary way."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (open, (str(self.path), 'w'))


def write_bin(path, value):
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('archive/data.pkl', pickle.dumps(value, protocol=2))
    archive.writestr('archive/version', '3\n')


@pytest.mark.parametrize('deep', [False, True])
def test_a_pickle_payload_in_a_bin_is_refused_and_nothing_runs(deep, hf, ours, tmp_path):
  folder = case.copy(hf, tmp_path / 'hf')
  (folder / 'model.safetensors').unlink()
  mark = tmp_path / 'executed'
  payload = {SQUARE: Payload(mark)} if not deep else {'a': [1, {'b': Payload(mark)}]}
  write_bin(folder / 'pytorch_model.bin', payload)
  for arguments in (('fsck', folder), ('verify', ours, folder)):
    text = case.cli(*arguments, expect=1)
    assert 'pytorch_model.bin is not a plain weight file: it asks for io.open' in text
    assert 'Nothing was run' in text
  assert not mark.exists()
  pickle.loads(pickle.dumps(payload))  # the payload does work where it is allowed to
  assert mark.exists()


def test_bin_files_that_are_no_weights_are_refused(tmp_path):
  path = tmp_path / 'x.bin'
  path.write_bytes(b'not a zip')
  with pytest.raises(ConvertError, match='truncated, or of the format before torch 1.6'):
    read_bin(path)
  write_bin(path, ['a list'])
  with pytest.raises(ConvertError, match='holds a list'):
    read_bin(path)
  write_bin(path, {'a': 3})
  with pytest.raises(ConvertError, match='a in .* is a int, not a tensor'):
    read_bin(path)


def test_paths_in_a_checkpoint_do_not_lead_out_of_it(hf, tmp_path):
  folder = case.copy(hf, tmp_path / 'hf')
  where = {'lm_head.weight': '../secret.safetensors'}
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': where}))
  with pytest.raises(ConvertError, match='names files outside'):
    find_form(folder)
