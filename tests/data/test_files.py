"""Opening other people's files: what is read, and what is said of what cannot be."""

from __future__ import annotations

import gzip
import os

import pyarrow
import pytest

from openmoe.config import ConfigError
from openmoe.data import files

TEXT = '{"a": "é"}\r\n\n{"a": "x\u2028y"}\n'


def zstd(content: bytes) -> bytes:
  return pyarrow.compress(content, codec='zstd', asbytes=True)


@pytest.mark.parametrize(
  ('name', 'pack'), [('x.jsonl', bytes), ('x.jsonl.gz', gzip.compress), ('x.jsonl.zst', zstd)]
)
def test_lines_are_alike_however_they_are_packed(tmp_path, name, pack):
  path = tmp_path / name
  for mark in (b'', b'\xef\xbb\xbf'):
    path.write_bytes(pack(mark + TEXT.encode()))
    found = list(files.lines(path))
    assert found == [(1, '{"a": "é"}'.encode()), (2, b''), (3, '{"a": "x\u2028y"}'.encode())]
    values = [value for _, value in files.json_lines(path)]
    assert values == [{'a': 'é'}, {'a': 'x\u2028y'}]
    assert files.read_text(path) == TEXT


def test_two_streams_in_one_file_are_one(tmp_path):
  for name, pack in (('a.gz', gzip.compress), ('a.zst', zstd)):
    (tmp_path / name).write_bytes(pack(b'one\n') + pack(b'two\n'))
    assert [line for _, line in files.lines(tmp_path / name)] == [b'one', b'two']


@pytest.mark.parametrize(
  ('name', 'content', 'said'),
  [
    (
      'a.gz',
      gzip.compress(b'[1]\n' + os.urandom(9000).hex().encode())[:-1000],
      'a.gz ends too early: it was cut off',
    ),
    ('a.gz', b'plain text', 'a.gz cannot be read .*gzip'),
    (
      'a.zst',
      zstd(b'[1]\n' + os.urandom(9000).hex().encode())[:-1000],
      'a.zst (cannot be read|ends too early)',
    ),
    ('a.zst', b'plain text', 'a.zst cannot be read'),
    ('a.json', b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', 'Git LFS pointer'),
    ('a.json', b'\xff\xfe{\x00', 'a.json is UTF-16'),
    ('a.json', b'{"a": "\xe9"}', 'a.json is not UTF-8 .byte 8 is 0xe9'),
    ('a.json', b'{"a": ', 'a.json is no JSON .*: Expecting value at line 1 column 7. Copy'),
    ('a.json', b'[' * 200_000, 'a.json is no JSON .*: nested too deeply'),
    ('a.json', b'[' + b'9' * 5000 + b']', 'a.json is no JSON .*: a number that is too long'),
    ('a.json', b'\x00' * 100, 'a.json is no JSON'),
  ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, said):
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(files.DamagedFile, match=said):
    files.read_json(path)
  with pytest.raises(files.DamagedFile, match=said.replace('a.json', 'a.json(:1)?')):
    list(files.json_lines(path))


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  for name in ('pipe', '.'):
    with pytest.raises(ConfigError, match='is a pipe, a device or a directory'):
      files.read_bytes(tmp_path / name)
  with pytest.raises(ConfigError, match='does not exist'):
    files.read_bytes(tmp_path / 'none')
  with pytest.raises(ConfigError, match='cannot be opened'):
    files.read_bytes('a\x00b')


def test_nothing_larger_than_allowed_is_held(tmp_path):
  path = tmp_path / 'bomb.gz'
  path.write_bytes(gzip.compress(b'x' * 1_000_000))
  with pytest.raises(files.DamagedFile, match='more than 1,000 bytes'):
    files.read_bytes(path, most=1000)
  with pytest.raises(files.DamagedFile, match='bomb.gz:1: a line of more than 1,000 bytes'):
    list(files.lines(path, longest=1000))


def test_halves_of_surrogate_pairs_are_replaced():
  broken = files.parse_json(r'"a\ud83d b \ud83d\ude00 \ude00"', 'x')
  assert files.without_surrogates(broken) == 'a\ufffd b 😀 \ufffd'
  assert files.without_surrogates('é') == 'é'
