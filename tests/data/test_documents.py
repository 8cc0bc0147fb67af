"""Files as people have them: other kinds, other editors, cut off in copying, with odd records."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pathlib
import random

import pyarrow
import pyarrow.parquet
import pytest
import tensorflow as tf

from openmoe.config import ConfigError
from openmoe.data import documents
from openmoe.data.sources import TextFiles
from tests.data.test_sources import read

TEXTS = ['first', 'second, with "quotes"\nand a line', 'thïrd 漢字', '']


def write(folder, name: str) -> str:
  """TEXTS in a file of the kind and packing that the name says."""
  path = folder / name
  kind = documents.kind_of(name)
  if kind == '.parquet':
    pyarrow.parquet.write_table(pyarrow.table({'id': range(4), 'text': TEXTS}), path, 2)
    return str(path)
  if kind == '.csv':
    quoted = ('"{}"'.format(text.replace('"', '""')) for text in TEXTS)
    content = 'id,text\n' + ''.join(f'{i},{cell}\n' for i, cell in enumerate(quoted))
  else:
    content = ''.join(json.dumps({'text': text}) + '\n' for text in TEXTS)
  raw = content.encode()
  if name.endswith('.gz'):
    raw = gzip.compress(raw, mtime=0)
  elif name.endswith('.zst'):
    raw = pyarrow.compress(raw, codec='zstd', asbytes=True)
  path.write_bytes(raw)
  return str(path)


@pytest.mark.parametrize(
  'name',
  ['a.csv', 'a.csv.gz', 'a.csv.zst', 'a.parquet', 'a.jsonl', 'a.jsonl.gz', 'a.jsonl.zst'],
)
def test_every_kind_gives_the_same_documents(tmp_path, name):
  source = TextFiles({'train': write(tmp_path, name)})
  assert read(source) == list(zip(TEXTS[:3], range(3), strict=True))
  assert sum(source.skipped.values()) == 1  # the empty one


@pytest.mark.parametrize('name', ['a.csv', 'a.parquet'])
def test_a_column_of_another_name_is_told(tmp_path, name):
  source = TextFiles({'train': write(tmp_path, name)}, text_field='texts')
  with pytest.raises(ConfigError, match=r"no column 'texts', only 'id', 'text'.*mean 'text'"):
    source.check_shards('train', 1)
  other = TextFiles({'train': write(tmp_path, 'a.parquet')}, text_field='id')
  with pytest.raises(ConfigError, match="'id' holds int64, not text"):
    other.check_shards('train', 1)


@pytest.mark.parametrize('ending', ['\n', '\r\n'])
def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path, ending):
  lines = [json.dumps({'text': t}) for t in ('first', 'second')]
  (tmp_path / 'a.jsonl').write_bytes(b'\xef\xbb\xbf' + ending.join([*lines, '']).encode())
  (tmp_path / 'b.txt').write_bytes(b'\xef\xbb\xbfthird')
  (tmp_path / 'c.csv').write_bytes(b'\xef\xbb\xbf' + ending.join(['text', 'fourth', '']).encode())
  texts = [text for text, _ in read(TextFiles({'train': str(tmp_path / '*')}))]
  assert texts == ['first', 'second', 'third', 'fourth']


@pytest.mark.parametrize('name', ['a.jsonl.gz', 'a.jsonl.zst', 'a.csv.gz', 'a.parquet'])
def test_a_file_that_was_cut_off_stops_by_its_name(tmp_path, name):
  path = write(tmp_path, name)
  content = pathlib.Path(path).read_bytes()
  pathlib.Path(path).write_bytes(content[: len(content) // 2])
  with pytest.raises(
    tf.errors.OpError, match=f'{name} (ends too early|cannot be read|is no whole)'
  ):
    read(TextFiles({'train': path}))


REFUSED = {
  'is UTF-16': '{"text": "x"}'.encode('utf-16'),
  'is a Git LFS pointer': b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n',
}


@pytest.mark.parametrize('message', REFUSED)
def test_what_is_no_text_file_is_told(tmp_path, message):
  (tmp_path / 'a.jsonl').write_bytes(REFUSED[message])
  with pytest.raises(tf.errors.OpError, match=f'a.jsonl {message}'):
    read(TextFiles({'train': str(tmp_path / 'a.jsonl')}))


def test_pipes_and_folders_are_refused_before_they_are_opened(tmp_path):
  os.mkfifo(tmp_path / 'a.jsonl')
  with pytest.raises(ConfigError, match='a.jsonl is a pipe, a device or a directory'):
    TextFiles({'train': str(tmp_path / '*')}).list_shards('train')


ODD = {
  'a number that is too long': '{"text": "x", "id": ' + '9' * 5000 + '}',
  'nested too deeply': '{"text": "x", "m": ' + '[' * 100_000 + ']' * 100_000 + '}',
  'invalid UTF-8': '{"text": "half a pair \\ud83d"}',
  "no text in field 'text' (there are: 'txt')": '{"txt": "x"}',
  "no text in field 'text'": '[1]',
}


def test_odd_records_are_skipped_and_counted(tmp_path):
  good = json.dumps({'text': 'good'})
  (tmp_path / 'a.jsonl').write_text('\n'.join([good, *ODD.values(), good, '']))
  source = TextFiles({'train': str(tmp_path / 'a.jsonl')})
  assert [text for text, _ in read(source)] == ['good', 'good']
  reasons = {reason: n for (_, reason), n in source.skipped.items()}
  for reason in ODD:
    assert sum(n for told, n in reasons.items() if reason in told) >= 1, (reason, reasons)
  assert sum(reasons.values()) == len(ODD)


def test_more_shards_than_documents_are_refused_before_anything_is_read(tmp_path):
  (tmp_path / 'a.jsonl').write_text('\n'.join(json.dumps({'text': str(i)}) for i in range(7)))
  source = TextFiles({'train': str(tmp_path / 'a.jsonl')})
  source.check_shards('train', 7)
  with pytest.raises(ConfigError, match='has 7 documents, fewer than num_shards=8'):
    source.check_shards('train', 8)


def test_the_only_document_is_held_out(tmp_path):
  (tmp_path / 'book.txt').write_text('a short book')
  source = TextFiles({'train': str(tmp_path / 'book.txt')}, held_out_every=50)
  source.check_shards('validation', 1)
  with pytest.raises(ConfigError, match=r'only document is held out.*set held_out_every=0'):
    source.check_shards('train', 1)
  TextFiles({'train': str(tmp_path / 'book.txt')}, held_out_every=0).check_shards('train', 1)


@pytest.mark.parametrize(('every', 'shards'), [(50, 50), (50, 100), (10, 20), (50, 8), (7, 21)])
def test_files_of_one_document_reach_every_shard(every, shards):
  source = TextFiles({'train': '*.txt'}, held_out_every=every)
  files = range(4 * shards)
  trained = [source._shard_of_file(i, shards) for i in files if i % every]
  assert set(trained) == set(range(shards))
  assert sorted(source._shard_of_file(i, shards) for i in files) == sorted([*range(shards)] * 4)


def mutated(content: bytes, draw: random.Random) -> bytes:
  """The bytes with a few of them changed, cut, or put twice."""
  raw = bytearray(content)
  for _ in range(draw.randint(1, 4)):
    at = draw.randrange(len(raw) or 1)
    match draw.randrange(4):
      case 0:
        raw[at : at + 1] = bytes([draw.randrange(256)])
      case 1:
        del raw[at : at + draw.randrange(40)]
      case 2:
        raw[at:at] = draw.choice([b'\0', b'"', b'[' * 2000, b'\xff\xfe', b'\n', b'9' * 5000])
      case _:
        raw[at:at] = raw[max(0, at - 30) : at]
  return bytes(raw)


def outcome(path: str) -> str | None:
  """None when every record gave text or a reason; else what the error says of the file."""
  try:
    documents.check_whole(path)
    for record, raw in enumerate(documents.raw_records(path, 32768, 'text')):
      with contextlib.suppress(documents.BadRecordError):
        assert documents.parse(path, record, raw, 'text').decode().strip()
  except ConfigError as error:
    return str(error)
  return None


def fuzz(folder, rounds: int) -> None:
  draw = random.Random(0)
  names = ['a.csv', 'a.parquet', 'a.jsonl', 'a.jsonl.gz', 'a.jsonl.zst', 'a.csv.gz']
  whole = {name: pathlib.Path(write(folder, name)).read_bytes() for name in names}
  for number in range(rounds):
    name = names[number % len(names)]
    path = folder / f'{number}{name}'
    path.write_bytes(mutated(whole[name], draw))
    told = outcome(str(path))
    assert told is None or str(path) in told
    path.unlink()


def test_mutated_files_give_texts_or_an_error_that_names_them(tmp_path):
  fuzz(tmp_path, 1200)


@pytest.mark.slow
def test_many_mutated_files(tmp_path):
  fuzz(tmp_path, 60_000)
