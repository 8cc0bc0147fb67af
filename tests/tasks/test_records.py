"""Files of records: every kind, the pieces of a split, and what is said of damage."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from openmoe.config import ConfigError
from openmoe.data.files import DamagedFile
from tasks import records
from tasks.evaluation import splits

ROWS = [{'goal': f'é{i}', 'label': i} for i in range(3)]
LINES = ''.join(json.dumps(row) + '\n' for row in ROWS).encode()


def test_json_in_its_shapes(tmp_path):
  path = tmp_path / 'a.json'
  for content in (json.dumps(ROWS), json.dumps({'Data': ROWS}, indent=1), LINES.decode()):
    path.write_text('\ufeff' + content, encoding='utf-8')
    assert records.read(path) == ROWS
  path.write_text(json.dumps(ROWS[0]))
  assert records.read(path) == ROWS[:1]


def test_records_say_where_they_are(tmp_path):
  (tmp_path / 'a.jsonl').write_bytes(b'\n' + LINES.replace(b'\n', b'\r\n'))
  assert [r.where for r in records.read(tmp_path / 'a.jsonl')][1] == f'{tmp_path}/a.jsonl:3'
  (tmp_path / 'a.csv').write_text('goal,label\n"a\nb",1\n\nc,2\n')
  assert [r.where for r in records.read(tmp_path / 'a.csv')] == [
    f'{tmp_path}/a.csv:3',
    f'{tmp_path}/a.csv:5',
  ]


@pytest.mark.parametrize(
  ('name', 'content', 'said'),
  [
    ('a.csv', b'goal,label\nx\n', 'a.csv:2: 1 cells in place of 2'),
    ('a.csv', b'goal,label\nx,1,2\n', 'a.csv:2: 3 cells in place of 2'),
    ('a.csv', b'goal,goal\nx,1\n', 'are not distinct'),
    ('a.csv', b'goal,label\n"x,1\n', 'a.csv:2 is no CSV .*cut off'),
    ('a.csv', b'goal,label\n' + b'x' * 200_000 + b',1\n', 'is no CSV .*field larger'),
    ('a.csv', 'goal,label\nx,1\n'.encode('utf-16'), 'a.csv is UTF-16'),
    ('a.csv', b'goal,label\n', 'has no records'),
    ('a.csv', b'goal,label\n\xe9,1\n', 'a.csv is not UTF-8 .byte 12 is 0xe9'),
    ('a.json', b'3', 'a.json is a int, not a list'),
    ('a.json', b'[1]', 'a.json record 1: a int, not a JSON object'),
    ('a.json', b'{"a": 1}\n{"a": ', 'a.json:2 is no JSON'),
    ('a.jsonl', LINES[:-9], 'a.jsonl:3 is no JSON'),
    ('a.jsonl', b'"question"\n', 'a.jsonl:1: a str, not a JSON object'),
    ('a.jsonl', b'{"a": ' + b'1' * 5000 + b'}', 'a.jsonl:1 .*too long'),
    ('a.jsonl', b'{"a": ' + b'[' * 100_000, 'a.jsonl:1 .*nested too deeply'),
    ('a.jsonl.gz', gzip.compress(LINES, mtime=0)[:-12], 'a.jsonl.gz ends too early'),
    ('a.parquet', b'PAR1', 'a.parquet cannot be read'),
    ('a.parquet', b'version https://git-lfs.github.com/spec/v1\n', 'Git LFS pointer'),
  ],
)
def test_damage_is_named(tmp_path, name, content, said):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(DamagedFile, match=said):
    records.read(tmp_path / name)


def test_halves_of_surrogate_pairs_are_replaced_wherever_they_stand(tmp_path):
  (tmp_path / 'a.jsonl').write_text(r'{"a\ud83d": ["b\ud83d", {"c": "\ud83d\ude00"}]}')
  assert records.read(tmp_path / 'a.jsonl') == [{'a\ufffd': ['b\ufffd', {'c': '😀'}]}]


def test_a_split_may_lie_in_pieces(tmp_path):
  folder = tmp_path / 'piqa'
  folder.mkdir()
  for i in (1, 0):
    table = pa.Table.from_pylist(ROWS[i : i + 1])
    pyarrow.parquet.write_table(table, folder / f'test-0000{i}-of-00002.parquet')
  assert splits.read(str(tmp_path), 'piqa', 'test') == ROWS[:2]
  (folder / 'test-00000-of-00002.parquet').unlink()
  with pytest.raises(ConfigError, match='which are not all of one set; copy the others too'):
    splits.read(str(tmp_path), 'piqa', 'test')


def test_a_split_that_is_there_twice_is_refused(tmp_path):
  folder = tmp_path / 'piqa'
  folder.mkdir()
  (folder / 'test.jsonl').write_bytes(LINES)
  (folder / 'test.csv').write_text('goal,label\nx,1\n')
  with pytest.raises(ConfigError, match=r'the test split twice: test.jsonl, test.csv'):
    splits.read(str(tmp_path), 'piqa', 'test')
