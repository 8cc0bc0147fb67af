"""Files of others are read without surprises; files of ours are written whole or not at all."""

import json
import os

import pytest
from etils import epath

from openmoe.checkpoint import manifest, paths, safe_json
from openmoe.checkpoint.paths import Unreadable
from openmoe.observe.text import visible


def test_a_step_is_read_from_a_checkpoints_name_and_from_no_other():
  assert paths.step_of('runs/a/checkpoint_40/') == 40
  assert paths.step_of(paths.checkpoint_name(0)) == 0
  for name in ('checkpoint_', 'checkpoint_4.partial', 'damaged_checkpoint_4', 'checkpoint_٣', 'x'):
    assert paths.step_of(name) is None
  assert paths.step_of('checkpoint_' + '9' * 5000) is None


def test_pipes_devices_and_directories_are_refused_at_once(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  for path in (tmp_path / 'pipe', '/dev/zero', tmp_path):
    with pytest.raises(Unreadable, match='a file belongs here'):
      paths.read_small(path, 10)


def test_a_small_file_is_read_whole_and_a_larger_one_refused(tmp_path):
  path = tmp_path / 'x'
  path.write_bytes(b'0123456789')
  assert paths.read_small(path, 10) == b'0123456789'
  with pytest.raises(Unreadable, match='larger than 9 bytes'):
    paths.read_small(path, 9)


def test_a_write_that_fails_leaves_the_former_content_and_nothing_else(tmp_path, monkeypatch):
  path = tmp_path / 'x'
  paths.write_whole(path, b'before')

  def full(*unused):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(OSError, match='No space left'):
    paths.write_whole(path, b'after', sync=True)
  assert path.read_bytes() == b'before'
  assert os.listdir(tmp_path) == ['x']


@pytest.mark.parametrize(
  ('content', 'said'),
  [
    (b'[]', 'holds a list; an object belongs there'),
    (b'null', 'holds null; an object'),
    (b'{"a":' * 100_000, 'nested'),
    (b'{"a":' * 100 + b'1' + b'}' * 100, 'nested deeper than 64 levels'),
    (b'{"a": [' + b'[],' * (3 << 20) + b'[]]}', 'lists and objects'),
    (b'\xff{}', 'is no JSON'),
    (b'{', 'is no JSON: .* at line 1 column 2; get it again'),
    (b' \n', 'is empty'),
    (b'<!DOCTYPE html>', 'is a web page'),
    ('{}'.encode('utf-16'), 'no JSON in UTF-8'),
    (b'{"a": ' + b'9' * 5000 + b'}', 'is no JSON'),
    (b'{"\\ud800": 1}', 'no valid text'),
    (b'{"a": ["x\\ud800"]}', 'no valid text'),
  ],
)
def test_json_that_would_hurt_later_is_refused(content, said):
  with pytest.raises(Unreadable, match=said):
    safe_json.parse(content, 'file')


def test_a_mark_of_byte_order_is_no_part_of_a_text():
  assert safe_json.parse(b'\xef\xbb\xbf{"a": 1}', 'file') == {'a': 1}


def test_a_pointer_in_the_place_of_a_file_is_told(tmp_path):
  path = tmp_path / 'config.json'
  path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n')
  for read in (safe_json.read, lambda p: paths.read_small(p, 1 << 20)):
    with pytest.raises(Unreadable, match=r'config\.json is a Git LFS pointer.*git lfs pull'):
      read(path)


def test_doubled_names_are_found_in_one_pass():
  content = b'{' + b','.join(b'"k%d":0,"k%d":0' % (i, i) for i in range(60_000)) + b'}'
  assert safe_json.parse(content, 'file')['k5'] == 0
  with pytest.raises(Unreadable, match=r"'k0', 'k1'.* more than once"):
    safe_json.parse(content, 'file', once=True)


@pytest.mark.parametrize(
  ('value', 'kind'), [('2', int), (None, int), (True, int), (-1, int), (2.5, int), ([], dict)]
)
def test_a_field_of_another_type_is_named(value, kind):
  with pytest.raises(Unreadable, match='file: size is .* belongs there'):
    safe_json.field({'size': value}, 'size', kind, 'file')


def test_a_field_may_have_a_default_and_is_missed_without():
  assert safe_json.field({}, 'a', int, 'file', 3) == 3
  assert safe_json.field({'a': 2}, 'a', float, 'file') == 2
  with pytest.raises(Unreadable, match='file lacks a'):
    safe_json.field({}, 'a', int, 'file')


@pytest.mark.parametrize(
  ('files', 'said'),
  [
    ({'../x': {'size': 1, 'sha256': None}}, 'outside the checkpoint'),
    ({'/dev/zero': {'size': 0, 'sha256': '0'}}, 'outside the checkpoint'),
    ({'x': 5}, 'its entry x is 5'),
    ({'x': {}}, 'its entry x lacks size'),
    ({'x': {'size': 1, 'sha256': 2}}, 'sha256 is 2'),
    ([], 'files is'),
    ({'pipe': {'size': 0, 'sha256': '0'}}, 'pipe cannot be read'),
    ({'absent': {'size': 0, 'sha256': '0'}}, 'absent is missing'),
  ],
)
def test_hostile_manifests_are_problems_and_nothing_worse(files, said, tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  text = json.dumps({'version': 1, 'step': 3, 'files': files})
  (tmp_path / manifest.NAME).write_text(text)
  assert said in manifest.find_problem(epath.Path(tmp_path), 3)


def test_what_a_terminal_would_obey_is_written_out():
  assert visible('a\x1b]0;x\x07\r\u202eb') == 'a\\x1b]0;x\\x07\\r\\u202eb'
  assert visible('naïve 你好\n\tplain') == 'naïve 你好\n\tplain'
  assert visible('a\nb', keep='') == 'a\\nb'
  assert visible('\ud800') == '\\ud800'
