"""A user's own files: every document once, whoever reads it, and nothing bad unsaid."""

from __future__ import annotations

import gzip
import json

import pytest
import seqio

from openmoe.config import ConfigError
from openmoe.data.sources import TextFiles
from tests.data import case


def read(source, split='train', shards=1, shard=0, shuffle=False, seed=0):
  info = seqio.ShardInfo(index=shard, num_shards=shards)
  dataset = source.get_dataset(split, shuffle=shuffle, seed=seed, shard_info=info)
  return [(d['text'].decode(), int(d['document_id'])) for d in dataset.as_numpy_iterator()]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('texts')
  case.write_jsonl(folder / 'a.jsonl', [f'a {i}' for i in range(25)])
  with gzip.open(folder / 'b.jsonl.gz', 'wt') as f:
    f.writelines(json.dumps({'text': f'b {i}'}) + '\n' for i in range(11))
  (folder / 'c.txt').write_text('one text\nof two lines\n')
  with gzip.open(folder / 'd.txt.gz', 'wt') as f:
    f.write('zipped text\n')
  return folder


def everything(folder) -> set[str]:
  texts = {f'a {i}' for i in range(25)} | {f'b {i}' for i in range(11)}
  return texts | {'one text\nof two lines\n', 'zipped text\n'}


@pytest.mark.parametrize('shards', [1, 3])
def test_shards_partition_the_documents(folder, shards):
  source = TextFiles({'train': str(folder / '*')})
  parts = [read(source, shards=shards, shard=i, shuffle=True, seed=i) for i in range(shards)]
  texts = [text for part in parts for text, _ in part]
  assert len(texts) == len(set(texts)) == 38
  assert set(texts) == everything(folder)
  assert min(map(len, parts)) >= 38 // shards - 4


def test_held_out_documents_are_apart(folder):
  source = TextFiles({'train': str(folder / '*')}, held_out_every=5)
  assert source.splits == ('train', 'validation')
  train = [t for i in range(2) for t, _ in read(source, 'train', 2, i)]
  held_out = [t for i in range(2) for t, _ in read(source, 'validation', 2, i)]
  assert not set(train) & set(held_out)
  assert set(train) | set(held_out) == everything(folder)
  assert 6 <= len(held_out) <= 9


def test_shuffling_depends_on_the_seed_alone(folder):
  source = TextFiles({'train': str(folder / '*')})
  assert read(source, shuffle=True, seed=1) == read(source, shuffle=True, seed=1)
  assert read(source, shuffle=True, seed=1) != read(source, shuffle=True, seed=2)


def test_a_document_knows_its_file_and_record(folder):
  source = TextFiles({'train': str(folder / '*')})
  for text, number in read(source):
    path = source.describe('train', number)
    if text[0] in 'ab':
      assert path.endswith(f'{text[0]}.jsonl{".gz" if text[0] == "b" else ""}:{int(text[2:]) + 1}')
  assert source.describe('train', 99 << 32) == f'document {99 << 32}'


def test_long_texts_are_cut_at_line_ends_and_nothing_is_lost(tmp_path):
  text = ''.join(f'line {i} é\n' for i in range(300)) + 'x' * 150 + 'é' * 100
  (tmp_path / 'long.txt').write_text(text, encoding='utf-8')
  source = TextFiles({'train': str(tmp_path / 'long.txt')}, piece_bytes=100)
  pieces = [t for t, _ in read(source)]
  assert ''.join(pieces) == text
  assert all(len(p.encode()) <= 100 for p in pieces)
  assert all(p.endswith('\n') for p in pieces[:-4])


BAD = {
  'invalid UTF-8': b'{"text": "\xff\xfe"}\n',
  'invalid JSON': b'{"text": "half a rec\n',
  "no text in field 'text'": b'{"txt": "other"}\n',
  'empty': b'{"text": "  "}\n',
}


def test_bad_records_are_skipped_and_counted(tmp_path):
  path = tmp_path / 'bad.jsonl'
  path.write_bytes(b'{"text": "good"}\n' + b''.join(BAD.values()) + b'{"text": "also good"}\n\n')
  source = TextFiles({'train': str(path)})
  assert [t for t, _ in read(source)] == ['good', 'also good']
  counts = {reason.split(' (')[0]: n for (_, reason), n in source.skipped.items()}
  # The empty line at the end is half a record too.
  assert counts.pop('invalid JSON') + counts.pop('invalid JSON ', 0) >= 1
  assert counts == {'invalid UTF-8': 1, "no text in field 'text'": 1, 'empty': 1}


@pytest.mark.parametrize('reason', BAD)
def test_bad_records_are_refused_by_file_and_line(tmp_path, reason):
  path = tmp_path / 'bad.jsonl'
  path.write_bytes(b'{"text": "good"}\n' + BAD[reason])
  source = TextFiles({'train': str(path)}, bad_record='refuse')
  with pytest.raises(Exception, match=f'bad.jsonl:2: {reason}'):
    read(source)


def test_hostile_sizes(tmp_path):
  """Empty files, no text at all, and a document of ten million characters."""
  (tmp_path / 'empty.jsonl').write_bytes(b'')
  (tmp_path / 'empty.txt').write_bytes(b'')
  case.write_jsonl(tmp_path / 'huge.jsonl', ['ab ' * 3_333_334])
  source = TextFiles({'train': str(tmp_path / '*')})
  assert [len(t) for t, _ in read(source)] == [10_000_002]


def test_missing_and_unknown_files_are_refused(tmp_path):
  with pytest.raises(ConfigError, match='No file matches.*nothing.*check the path'):
    read(TextFiles({'train': str(tmp_path / 'nothing*.jsonl')}))
  (tmp_path / 'x.docx').write_text('a')
  with pytest.raises(ConfigError, match=r'x.docx must end in one of'):
    read(TextFiles({'train': str(tmp_path / '*')}))
  with pytest.raises(ConfigError, match="Did you mean 'skip'"):
    TextFiles({'train': 'x'}, bad_record='skp')
