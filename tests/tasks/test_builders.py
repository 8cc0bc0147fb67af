"""Every builder builds from small raw files in its publisher's layout, and mixtures train on it."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest
import seqio
import tensorflow_datasets as tfds

from openmoe.config import ConfigError, DataConfig
from openmoe.data.stream import ShardedStream
from openmoe.data.vocabulary import train_vocabulary
from tasks import pretraining, records, sft
from tasks.builders import corpora, instructions
from tests.data import case


def jsonl(objects) -> bytes:
  return b''.join(json.dumps(o).encode() + b'\n' for o in objects)


def texts(name: str, count: int, extra=None):
  return [{'text': f'{name} {case.words(50, i)}', **(extra or {})} for i in range(count)]


def write(path, content: bytes) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.name.endswith('.zst'):
    with pa.output_stream(str(path), compression='zstd') as f:
      f.write(content)
  else:
    path.write_bytes(gzip.compress(content) if path.name.endswith('.gz') else content)


@pytest.fixture(scope='module')
def raw(tmp_path_factory):
  """Raw folders of everything, as published."""
  root = tmp_path_factory.mktemp('raw')
  red = root / 'redpajama'
  meta = {'meta': {'url': 'http://a', 'n': 1}}
  write(red / 'arxiv/arxiv_b.jsonl', jsonl(texts('arxiv b', 3, meta)))
  write(red / 'arxiv/arxiv_a.jsonl', jsonl(texts('arxiv a', 3, meta)))
  write(red / 'book/book.jsonl', jsonl(texts('book', 4, meta)))
  # More than the 2000 that are held out.
  write(red / 'c4/c4-train.00000-of-01024.jsonl', jsonl(texts('c4', 40, meta) * 51))
  for dump in ('2019-30', '2020-05'):
    name = f'common_crawl/{dump}/en_head_0000.json.gz.dedup.classifier.jsonl.zst'
    write(red / name, jsonl(texts(f'cc {dump}', 3, {'source': 'cc', 'pred': 0.5})))
  write(red / 'github/filtered_0a.sampled.jsonl', jsonl(texts('github', 4, meta)))
  write(red / 'stackexchange/stackexchange.jsonl', jsonl(texts('stackexchange', 4, meta)))
  write(red / 'wikipedia/wiki.jsonl', jsonl(texts('wiki', 4, meta)))
  for language in ('python', 'c'):
    path = root / 'the_stack_dedup/data' / language / 'train-00000.parquet'
    path.parent.mkdir(parents=True)
    rows = [{'content': t['text'], 'lang': language, 'size': i} for i, t in
            enumerate(texts(language, 5))]  # fmt: skip
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
  turns = [{'role': r, 'content': c} for r, c in
           (('user', 'q1'), ('assistant', 'a1'), ('user', 'q2'), ('assistant', 'a2'))]  # fmt: skip
  chat = [
    {'model': 'gpt-4-0314', 'toxic': False, 'conversation': turns},
    {'model': 'gpt-3.5-turbo', 'toxic': False, 'conversation': turns},
    {'model': 'gpt-4', 'toxic': True, 'conversation': turns},
    {'model': 'gpt-4', 'toxic': False, 'conversation': turns[:1]},
  ]
  write(root / 'wildchat/train.jsonl', jsonl(chat * 200))
  orca = [{'id': '1', 'system_prompt': 's', 'question': f'q{i}', 'response': 'r'} for i in range(5)]
  (root / 'orca').mkdir()
  pyarrow.parquet.write_table(pa.Table.from_pylist(orca), root / 'orca/1M-GPT4.parquet')
  return root


def run_script(raw, data_dir, *extra) -> subprocess.CompletedProcess:
  command = [sys.executable, '-m', 'scripts.build_datasets', f'--raw_dir={raw}']
  return subprocess.run(
    [*command, f'--data_dir={data_dir}', *extra], capture_output=True, text=True, check=False
  )


@pytest.fixture(scope='module')
def data_dir(raw, tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  done = run_script(raw, folder)
  assert done.returncode == 0, done.stderr
  assert done.stdout.count('built:') == 10
  return folder


def examples(name: str, data_dir) -> list[dict]:
  return list(tfds.as_numpy(tfds.load(name, data_dir=data_dir, split='train', shuffle_files=False)))


def test_every_data_set_is_built_and_a_second_call_leaves_them(raw, data_dir):
  sizes = {
    'redpajama_arxiv': 6, 'redpajama_book': 4, 'redpajama_c4': 2040, 'redpajama_common_crawl': 6,
    'redpajama_github': 4, 'redpajama_stackexchange': 4, 'redpajama_wikipedia': 4,
    'the_stack_dedup': 10, 'orca': 5, 'wildchat_gpt4_sft': 200,
  }  # fmt: skip
  assert set(sizes) == set(corpora.BUILDERS) | set(instructions.BUILDERS)
  for name, size in sizes.items():
    assert len(examples(name, data_dir)) == size, name
  assert run_script(raw, data_dir).stdout.count('already there') == 10


def test_text_and_metadata_arrive(data_dir):
  arxiv = examples('redpajama_arxiv', data_dir)[0]
  assert json.loads(arxiv['meta']) == {'url': 'http://a', 'n': 1}
  crawl = examples('redpajama_common_crawl', data_dir)[0]
  assert json.loads(crawl['meta']) == {'source': 'cc', 'pred': 0.5}
  stack = examples('the_stack_dedup', data_dir)
  assert {json.loads(e['meta'])['lang'] for e in stack} == {'python', 'c'}
  assert b'size' in stack[0]['meta'] and b'content' not in stack[0]['meta']
  chat = examples('wildchat_gpt4_sft', data_dir)[0]
  assert chat['input'] == b'<s>[INST] q1 [/INST] a1 </s><s>[INST] q2 [/INST]'
  assert chat['output'] == b' a2 </s>'


def test_languages_are_selectable(raw, tmp_path):
  done = run_script(raw, tmp_path, '--only=the_stack_dedup', '--languages=c')
  assert done.returncode == 0, done.stderr
  found = examples('the_stack_dedup', tmp_path)
  assert len(found) == 5 and all(b'"c"' in e['meta'] for e in found)
  other = run_script(raw, tmp_path / 'b', '--only=the_stack_dedup', '--languages=cobol')
  assert other.returncode == 65 and 'cobol' in other.stderr


def test_published_mixtures_train_on_them(data_dir, tmp_path, monkeypatch):
  train_vocabulary(str(tmp_path / 'v.model'), [case.words(2000, 1), '[NLU] [NLG] [S2S]'], 320)
  monkeypatch.setenv('OPENMOE_VOCABULARY', str(tmp_path / 'v.model'))
  monkeypatch.setattr(pretraining.VOCABULARY, '_model', None)
  mixture = pretraining.Without('mix_ul2_v2', ('wikipedia',)).register()
  seqio.set_tfds_data_dir_override(str(data_dir))
  try:
    config = DataConfig(mixture, {'inputs': 64, 'targets': 64}, 4, num_shards=2)
    with ShardedStream(config, [1]) as stream:
      batch = next(stream)
      sources = {e.source for row in stream.last_rows for e in row}
      ids = {e.documents for row in stream.last_rows for e in row}
    assert (batch.segment_ids > 0).mean() > 0.9
    assert sources <= set(pretraining.CORPORA) and -1 not in {i for pair in ids for i in pair}
    chat = DataConfig('wildchat_gpt4_sft', {'inputs': 128, 'targets': 64}, 2, num_shards=2)
    with ShardedStream(chat, [0]) as stream:
      batch = next(stream)
    assert 0 < batch.loss_weights.sum() < (batch.segment_ids > 0).sum()
  finally:
    seqio.set_tfds_data_dir_override(None)
    pretraining.VOCABULARY._model = None


def test_orca_prompt():
  import tensorflow as tf

  row = {'system_prompt': 'Be kind.', 'question': 'Why?', 'response': 'So.'}
  found = next(sft.orca_prompt(tf.data.Dataset.from_tensors(row)).as_numpy_iterator())
  assert found == {'inputs': b'Be kind.USER: Why?ASSISTANT: ', 'targets': b'So.'}


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'{"text": "half a rec\n', r'x.jsonl:2 is no JSON .*Unterminated'),
    (b'{"text": "\xff"}\n', r'x.jsonl:2 is not UTF-8'),
    (b'[1]\n', r'x.jsonl:2: a list, not a JSON object'),
  ],
)
def test_bad_lines_are_refused_by_file_and_line(tmp_path, content, message):
  (tmp_path / 'x.jsonl').write_bytes(b'{"text": "good"}\n' + content)
  with pytest.raises(ConfigError, match=message):
    list(records.jsonl_records(str(tmp_path)))


def test_the_same_data_twice_or_nothing_is_refused(tmp_path):
  with pytest.raises(ConfigError, match='holds no file'):
    records.find_files(str(tmp_path), ['.jsonl'])
  write(tmp_path / 'a.jsonl', b'{}')
  write(tmp_path / 'a.jsonl.zst', b'{}')
  with pytest.raises(ConfigError, match='the same data twice'):
    records.find_files(str(tmp_path), records.JSONL_SUFFIXES)


def test_a_wrong_checksum_stops_the_build(tmp_path):
  book = tmp_path / 'raw/redpajama/book'
  write(book / 'book.jsonl', jsonl(texts('book', 2)))
  (book / 'sha256.txt').write_text(f'{"0" * 64}  book.jsonl\n{"1" * 64}  not_here.jsonl\n')
  done = run_script(tmp_path / 'raw', tmp_path / 'data', '--only=redpajama_book')
  assert done.returncode == 65 and 'book.jsonl differs from its checksum' in done.stderr
  digest = hashlib.sha256((book / 'book.jsonl').read_bytes()).hexdigest()
  (book / 'sha256.txt').write_text(f'{digest}  book.jsonl\n')
  done = run_script(tmp_path / 'raw', tmp_path / 'data', '--only=redpajama_book')
  assert done.returncode == 0 and '1 checksums verified' in done.stdout
