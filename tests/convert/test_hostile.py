"""Files that are odd, damaged or made to harm are refused in one line that names them."""

import errno
import json
import os
import struct
import tempfile
import zipfile

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from convert import workplace
from convert.core.source import find_form
from convert.core.tensors import ConvertError, write_at
from convert.formats.hf import tokenizer_files
from convert.formats.pickled import read_bin
from convert.formats.weight_pickle import PickleError, read_pickle
from tests.convert import case

EMBEDDING = 'model.embed_tokens.weight'


def tensors_of(folder):
  header, data = case.read_file(folder / 'model.safetensors')
  header.pop('__metadata__', None)
  array = lambda e: np.frombuffer(bytes(data[slice(*e['data_offsets'])]), np.float32)
  return {name: array(entry).reshape(entry['shape']) for name, entry in header.items()}


@pytest.fixture
def folder(hf, tmp_path):
  return case.copy(hf, tmp_path / 'hf')


# --- Hugging Face folders


def test_a_single_file_goes_before_an_index_that_an_earlier_save_left(folder):
  right = find_form(folder).tensors()[EMBEDDING].whole()
  shard = 'model-00001-of-00001.safetensors'
  save_file({n: x * 0 for n, x in tensors_of(folder).items()}, folder / shard)
  index = {'weight_map': dict.fromkeys(tensors_of(folder), shard)}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  np.testing.assert_array_equal(find_form(folder).tensors()[EMBEDDING].whole(), right)


@pytest.mark.parametrize(
  ('weight_map', 'said'),
  [
    ({'a': 'x.pt'}, 'names x.pt; weights are read from'),
    ({'a': '..'}, 'files outside its folder'),
    ({'a': '/x.safetensors'}, 'files outside its folder'),
    ({'a': 5}, 'is no file name'),
    ({'a': 'config.json'}, 'names config.json'),
    ([], 'weight_map is'),
    ({}, 'names no tensors'),
  ],
)
def test_an_index_of_odd_names_is_refused(weight_map, said, folder):
  (folder / 'model.safetensors').unlink()
  index = folder / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': weight_map}))
  assert said in case.cli('inspect', folder, expect=64)


@pytest.mark.parametrize(
  ('header', 'said'),
  [
    (b'[]', 'holds a list'),
    (b'null', 'holds null'),
    (b'{"a":' + b'[' * 100_000, 'nested too deeply'),
    (b'{"a": 5}', 'an object belongs there'),
    (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":["0","4"]}}', 'are no counts'),
    (b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}', 'are no counts'),
    (b'{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}', 'of type F8_E4M3'),
    (b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 'no valid text'),
    (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', '4 bytes for shape'),
    (b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}', 'is truncated'),
  ],
)
def test_a_header_that_is_no_header_of_tensors_is_refused(header, said, folder):
  (folder / 'model.safetensors').write_bytes(struct.pack('<Q', len(header)) + header + b'1234')
  text = case.cli('fsck', folder, expect=1)
  assert said in text
  assert 'model.safetensors' in text


def test_a_git_lfs_pointer_is_called_one(folder):
  for name in ('model.safetensors', 'pytorch_model.bin'):
    (folder / 'model.safetensors').unlink(missing_ok=True)
    (folder / name).write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n')
    assert 'Git LFS pointer, not the file: run `git lfs pull`' in case.cli('fsck', folder, expect=1)


def test_other_types_are_listed_and_refused_by_name(folder, tmp_path):
  weights = tensors_of(folder)
  save_file(weights | {'position_ids': np.arange(8)}, folder / 'model.safetensors')
  assert 'position_ids  8 int64' in case.cli('inspect', folder)
  text = case.cli('import', '--from', 'hf', folder, tmp_path / 'run', expect=64)
  assert 'position_ids does not belong' in text
  assert 'as int64 it is no weight: remove it' in text
  whole = weights | {EMBEDDING: weights[EMBEDDING].astype(np.int64)}
  save_file(whole, folder / 'model.safetensors')
  text = case.cli('import', '--from', 'hf', folder, tmp_path / 'run', expect=64)
  assert f'{EMBEDDING} is of int64, no type of weights: save it as float32' in text


def test_weights_in_float64_come_in_as_float32(folder, tmp_path):
  wide = {n: x.astype(np.float64) for n, x in tensors_of(folder).items()}
  save_file(wide, folder / 'model.safetensors')
  text = case.cli('import', '--from', 'hf', folder, tmp_path / 'run', expect=64)
  assert "tensors of ['float64']; choose --dtype" in text
  case.cli('import', '--from', 'hf', '--dtype', 'float32', folder, tmp_path / 'run')
  found = case.loaded(tmp_path / 'run')
  assert all((found[name] == x).all() for name, x in case.weights().items())


def test_a_tied_tensor_may_lie_under_either_name(jetmoe, jetmoe_hf, tmp_path):
  folder = case.copy(jetmoe_hf, tmp_path / 'hf')
  weights = tensors_of(folder)
  weights['lm_head.weight'] = weights.pop(EMBEDDING)
  save_file(weights, folder / 'model.safetensors', metadata={EMBEDDING: 'lm_head.weight'})
  assert 'is sound' in case.cli('fsck', folder)
  assert 'agree in every tensor' in case.cli('verify', jetmoe, folder)


@pytest.mark.parametrize(
  'fields',
  [
    {'num_hidden_layers': '2'},
    {'num_hidden_layers': None},
    {'num_hidden_layers': [2]},
    {'num_hidden_layers': 10**6},
    {'rope_theta': 'abc'},
    {'architectures': [5], 'model_type': 'z'},
    {'vocab_size': 10**12},
    {'openmoe_step': '../x'},
    {'openmoe_step': -5},
    {'openmoe_step': 1.5},
    {'moe_layer_interval': 'x'},
  ],
)
def test_a_config_of_other_types_is_refused(fields, folder, tmp_path):
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(config | fields))
  case.cli('import', '--from', 'hf', '--no_logits', folder, tmp_path / 'run', expect=64)
  assert not (tmp_path / 'run').exists()
  case.cli('fsck', folder, expect=1)


# --- files that never end


def test_pipes_and_devices_in_place_of_files_are_refused(folder, ours, tmp_path):
  (folder / 'model.safetensors').unlink()
  os.mkfifo(folder / 'pytorch_model.bin')
  assert 'a file belongs here' in case.cli('fsck', folder, expect=1)
  (folder / 'config.json').unlink()
  os.mkfifo(folder / 'config.json')
  assert 'a file belongs here' in case.cli('inspect', folder, expect=64)
  run = case.copy(ours, tmp_path / 'checkpoint_7')
  chunk = run / 'params' / 'token_embedder.embedding' / '0.0'
  chunk.unlink()
  os.mkfifo(chunk)
  assert 'a file belongs here' in case.cli('fsck', run, expect=1)


def test_a_shape_of_more_chunks_than_memory_is_looked_at_in_no_time(ours, tmp_path):
  run = case.copy(ours, tmp_path / 'checkpoint_7')
  path = run / 'params' / 'decoder.sparse.moe.experts.wo.kernel' / '.zarray'
  about = json.loads(path.read_text())
  path.write_text(json.dumps(about | {'shape': [2**31, *about['shape'][1:]]}))
  assert 'wo/kernel: chunk 2.0.0.0 is missing' in case.cli('fsck', run, expect=1)


# --- .bin


def pickled(offsets=None, weights=None):
  """data.pkl as torch writes it, and the storages, for tensors of float32."""
  number = lambda n: b'\x8a\x09' + n.to_bytes(9, 'little', signed=True)
  numbers = lambda values: b'(' + b''.join(map(number, values)) + b't'
  text = lambda s: b'X' + struct.pack('<I', len(s)) + s.encode()
  out, storages = b'\x80\x02}(', []
  for key, (name, x) in enumerate((weights or case.weights()).items()):
    strides = [n // x.itemsize for n in x.strides]
    out += text(name) + b'ctorch._utils\n_rebuild_tensor_v2\n((' + text('storage')
    out += b'ctorch\nFloatStorage\n' + text(str(key)) + text('cpu') + number(x.size) + b'tQ'
    out += number((offsets or {}).get(name, 0)) + numbers(x.shape) + numbers(strides)
    out += b'\x89)tR'
    storages.append(x.tobytes())
  return out + b'u.', storages


@pytest.fixture
def bin_folder(folder):
  """The tiny model as .bin, with a way to write it otherwise."""
  weights = tensors_of(folder)
  (folder / 'model.safetensors').unlink()
  path = folder / 'pytorch_model.bin'

  def write(offsets=None):
    pickle, storages = pickled(offsets, weights)
    with zipfile.ZipFile(path, 'w') as archive:
      for key, content in enumerate(storages):
        archive.writestr(f'archive/data/{key}', content)
      archive.writestr('archive/data.pkl', pickle)
    return path

  write()
  return folder, write


def test_a_bin_of_the_same_weights_agrees(bin_folder, ours):
  assert 'agree in every tensor' in case.cli('verify', ours, bin_folder[0])
  assert 'is sound' in case.cli('fsck', bin_folder[0])


def test_a_flipped_bit_in_a_storage_is_found_by_its_crc(bin_folder, tmp_path):
  folder, write = bin_folder
  path = write()
  content = bytearray(path.read_bytes())
  content[100] ^= 0x40
  path.write_bytes(content)
  assert 'archive/data/0 has another CRC-32' in case.cli('fsck', folder, expect=1)
  text = case.cli('import', '--from', 'hf', '--no_logits', folder, tmp_path / 'run', expect=64)
  assert 'archive/data/0 has another CRC-32' in text


def test_a_negative_offset_is_refused(bin_folder):
  folder, write = bin_folder
  write({EMBEDDING: -2})
  assert 'reaches beyond its storage' in case.cli('fsck', folder, expect=1)


def test_bytes_put_into_an_archive_are_damage(bin_folder):
  folder, write = bin_folder
  path = write()
  content = path.read_bytes()
  end = content.rfind(b'PK\x05\x06')
  path.write_bytes(content[: end + 16] + struct.pack('<I', 0xFFFFFFF0) + content[end + 20 :])
  assert 'is damaged' in case.cli('fsck', folder, expect=1)
  path.write_bytes(b'x' * 9 + content)
  read_bin(path)  # zip archives may begin late
  path.write_bytes(content[:200] + b'x' * 9 + content[200:])
  with pytest.raises(ConvertError, match='does not lie where its list says'):
    read_bin(path)


@pytest.mark.parametrize(
  ('pickle', 'said'),
  [
    # A key whose hash takes 2 ** 40 steps.
    (
      b'\x80\x02}K\x01' + b''.join(b'q%ch%c\x86' % (i, i) for i in range(40)) + b'K\x01s.',
      'a key that is a tuple',
    ),
    (b'\x80\x02)q\x00' + b'h\x00' * 3 + b'\x87Q.', 'unknown kind of reference'),
    (b'\x80\x02cos\nsystem\nX\x01\x00\x00\x00a\x85R.', 'it asks for os.system'),
    (b'\x80\x02}\x81.', 'instruction NEWOBJ'),
    (b'\x80\x02K\x01h\x05.', 'it is damaged'),
    (b'\x80\x02(K\x01K\x02', 'it is damaged'),
    (b'', 'it is damaged'),
  ],
)
def test_a_pickle_that_does_more_than_describe_tensors_is_refused(pickle, said):
  with pytest.raises(PickleError, match=said):
    read_pickle(pickle)


def test_a_memo_index_makes_no_room():
  assert read_pickle(b'\x80\x02K\x01r' + struct.pack('<I', 2**31) + b'.') == 1


# --- what goes into an export


def test_a_tokenizer_that_names_code_of_others_is_refused(tmp_path):
  path = tmp_path / 'tokenizer_config.json'
  path.write_text('{"auto_map": {"AutoTokenizer": ["evil-repo--tok.Tok", null]}}')
  with pytest.raises(ConvertError, match=r'auto_map=.*evil-repo.*remove that field'):
    tokenizer_files(tmp_path)
  path.write_text('{"tokenizer_class": "T5Tokenizer"}')
  assert tokenizer_files(tmp_path) == [path]


def test_links_out_of_the_tokenizers_folder_are_refused(tmp_path):
  (tmp_path / 'secret').write_text('secret')
  folder = tmp_path / 'tokenizer'
  folder.mkdir()
  with pytest.raises(ConvertError, match=r'has no tokenizer files: .*tokenizer\.json'):
    tokenizer_files(folder)
  (folder / 'real.json').write_text('{}')
  (folder / 'tokenizer.json').symlink_to('real.json')
  (folder / 'tokenizer_extra.json').symlink_to(tmp_path / 'secret')
  assert [p.name for p in tokenizer_files(folder)] == ['tokenizer.json']
  (folder / 'tokenizer_config.json').symlink_to(tmp_path / 'secret')
  with pytest.raises(ConvertError, match=r'tokenizer_config\.json is a link that leads out'):
    tokenizer_files(folder)
  (folder / 'tokenizer_config.json').unlink()
  (folder / 'tokenizer_config.json').mkdir()
  with pytest.raises(ConvertError, match='is no file'):
    tokenizer_files(folder)
  with pytest.raises(ConvertError, match='is no folder'):
    tokenizer_files(tmp_path / 'absent')


# --- object stores


class Store:
  """gs:// in a local folder, in the place of epath's backend."""

  def __init__(self, root):
    self._root, self._real = root, epath.backend.os_backend

  def __getattr__(self, name):
    def local(path):
      if not str(path).startswith('gs:/'):
        return path
      here = str(path).replace('gs:/', str(self._root))
      if name in ('open', 'copy'):  # an object store has no folders to make first
        os.makedirs(os.path.dirname(here), exist_ok=True)
      return here

    return lambda *args, **kwargs: getattr(self._real, name)(*map(local, args), **kwargs)


@pytest.mark.parametrize('damaged', [False, True])
def test_an_upload_is_read_back_and_its_staging_removed(damaged, ours, hf, tmp_path, monkeypatch):
  bucket, staging = tmp_path / 'bucket', tmp_path / 'staging'
  staging.mkdir()
  store = Store(tmp_path)
  real = epath.gpath._GPath._backend
  which = property(lambda self: store if self._uri_scheme else real.fget(self))
  monkeypatch.setattr(epath.gpath._GPath, '_backend', which)
  monkeypatch.setattr(epath.gpath, '_get_backend', lambda a, b: store)
  monkeypatch.setattr(tempfile, 'tempdir', str(staging))
  if damaged:
    write = lambda self, target, overwrite: epath.Path(target).write_bytes(b'half')
    monkeypatch.setattr(epath.gpath._GPath, 'copy', write)
    text = case.cli('export', '--to', 'hf', ours, 'gs://bucket/out', expect=64)
    assert 'reads back other than it was uploaded' in text
  else:
    case.cli('export', '--to', 'hf', ours, 'gs://bucket/out')
    there, here = case.contents(bucket / 'out'), case.contents(hf)
    assert there == here
  assert not list(staging.iterdir())


# --- places and disks


def test_a_place_that_cannot_be_written_is_told_in_one_line(hf, tmp_path):
  (tmp_path / 'file').touch()
  for place in (tmp_path / 'file' / 'x', '/proc/x/y'):
    text = case.cli('import', '--from', 'hf', '--no_logits', hf, place, expect=64)
    assert text.startswith('error: ')
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize('kind', ['hf', 't5x'])
def test_a_full_disk_says_how_much_is_needed(kind, ours, tmp_path, monkeypatch):
  def full(job):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(workplace, 'move', full)
  text = case.cli('export', '--to', kind, ours, tmp_path / 'out', expect=64)
  needed = sum(x.nbytes for x in case.weights().values())
  assert f'no space left on the disk of {tmp_path}' in text
  assert f'{needed:,} bytes are needed in all' in text
  assert not (tmp_path / 'out' / ('checkpoint_7' if kind == 't5x' else '')).exists()


def test_a_write_that_the_disk_cuts_short_is_gone_on_with(tmp_path, monkeypatch):
  path = tmp_path / 'x'
  path.write_bytes(bytes(10))
  real = os.pwrite
  monkeypatch.setattr(os, 'pwrite', lambda fd, data, at: real(fd, data[:3], at))
  write_at(path, 1, memoryview(b'abcdefg'))
  assert path.read_bytes() == b'\0abcdefg\0\0'


def test_a_lock_on_a_file_that_is_gone_keeps_nobody_out(tmp_path, monkeypatch):
  out = epath.Path(tmp_path / 'out')
  real, looked = workplace._same_file, []

  def gone_at_first(file, path):
    looked.append(path)
    if len(looked) == 1:
      os.unlink(path)  # as the former holder does between our open and our lock
    return real(file, path)

  monkeypatch.setattr(workplace, '_same_file', gone_at_first)
  work = workplace.Workplace(out, {})
  assert len(looked) == 2
  with pytest.raises(ConvertError, match='Another process'):
    workplace.Workplace(out, {})
  work.close()


def test_names_in_a_file_do_not_command_the_terminal(folder):
  weights = tensors_of(folder)
  save_file(weights | {'\x1b]0;x\x07\x1b[2Jname': np.zeros(1)}, folder / 'model.safetensors')
  for text in (case.cli('inspect', folder), case.cli('fsck', folder, expect=1)):
    assert '\x1b' not in text
    assert '\\x1b]0;x\\x07\\x1b[2Jname' in text
