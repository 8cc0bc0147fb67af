"""Mutated benchmark files: items that can be scored, or one error that names the file."""

from __future__ import annotations

import contextlib
import copy
import csv
import gzip
import io
import json
import math
import pathlib
import random

import pyarrow as pa
import pyarrow.parquet
import pytest
from etils import epath

from openmoe.config import ConfigError
from openmoe.evaluation import results
from openmoe.evaluation.items import Item, Prediction
from tasks.bigbench import lite
from tasks.evaluation import catalogue, mt_bench
from tests.tasks import bigbench_case
from tests.tasks.benchmark_case import DATA

ODD = (
  None, True, False, 0, -1, 1.5, 10**400, -0.0, math.nan, math.inf, '', ' ', '-1', 'A', '(b)',
  '####', '[', "['a' 'b'", "['\\x']", '{"a":', '[[[[', 'é\ud83d', '\u2028', '\x00', 'x' * 5000,
  [], [None],
  ['a', ['b']], {}, {'text': []}, {'value': None}, [[]], '9' * 400, '1/0', '{"choices": 1}',
)  # fmt: skip


def odd_value(rng: random.Random, value):
  """The same value with one place of it replaced, removed, doubled or renamed."""
  if isinstance(value, dict) and value and rng.random() < 0.8:
    key = rng.choice(list(value))
    kind = rng.randrange(4)
    if kind == 0:
      value.pop(key)
    elif kind == 1:
      value[key.upper()] = value.pop(key)
    else:
      value[key] = odd_value(rng, value[key])
    return value
  if isinstance(value, list) and value and rng.random() < 0.8:
    place = rng.randrange(len(value))
    if rng.random() < 0.3:
      value.insert(place, copy.deepcopy(value[place]))
    else:
      value[place] = odd_value(rng, value[place])
    return value
  return copy.deepcopy(rng.choice(ODD))


def odd_bytes(rng: random.Random, content: bytes) -> bytes:
  """A file after what copying, editors and disks do to it."""
  found = bytearray(content)
  for _ in range(rng.choice((1, 1, 1, 3, 20))):
    place = rng.randrange(len(found)) if found else 0
    kind = rng.randrange(6)
    if kind == 0:
      del found[place:]
    elif kind == 1 and found:
      found[place] ^= 1 << rng.randrange(8)
    elif kind == 2:
      found[place:place] = rng.choice((b'\xff', b'\x00' * 9, b'"', b'\n', b'[' * 2000, b'\\ud83d'))
    elif kind == 3:
      del found[place : place + rng.randrange(40)]
    elif kind == 4:
      found[place:place] = found[max(0, place - 30) : place]
    else:
      found[:0] = rng.choice((b'\xef\xbb\xbf', b'\xff\xfe', b'<!DOCTYPE html>', b'\x1f\x8b'))
  return bytes(found)


def as_csv(rows) -> bytes:
  text = io.StringIO()
  writer = csv.DictWriter(text, list(rows[0]))
  writer.writeheader()
  cell = lambda value: value if isinstance(value, str | int) else str(value)
  writer.writerows({key: cell(value) for key, value in row.items()} for row in rows)
  return text.getvalue().encode()


def as_parquet(rows) -> bytes:
  out = io.BytesIO()
  pyarrow.parquet.write_table(pa.Table.from_pylist(rows), out)
  return out.getvalue()


def as_jsonl(rows) -> bytes:
  return ''.join(json.dumps(row) + '\n' for row in rows).encode()


WRITERS = {
  '.jsonl': as_jsonl,
  '.json': lambda rows: json.dumps({'data': rows}).encode(),
  '.csv': as_csv,
  '.parquet': as_parquet,
  '.jsonl.gz': lambda rows: gzip.compress(as_jsonl(rows), mtime=0),
  '.jsonl.zst': lambda rows: pa.compress(as_jsonl(rows), codec='zstd', asbytes=True),
}


def check_scores(task, item: Item, rng: random.Random) -> None:
  """An item that was accepted is scored as a number between guessing's lowest and the highest."""
  assert item.name and item.prompt.text() is not None
  item.prompt.text().encode()
  if item.choices:
    assert len(item.choices) == len(item.scores) and sum(item.scores) > 0
    logs = tuple(-rng.random() for _ in item.choices)
    predicted = Prediction(logs, (1,) * len(logs), (True,) * len(logs))
  else:
    predicted = Prediction(texts=(rng.choice(('', 'A', '72', '1/3', '```\nx', *item.answers)),))
  if 'after' not in item.extra:  # programs are not run here
    figures = task.measure(item, predicted)
    assert figures and all(math.isfinite(v) for v in figures.values())


@contextlib.contextmanager
def refused_by(*names: str):
  """Lets nothing out but the project's own error, which names the file."""
  said = None
  try:
    yield
  except ConfigError as error:
    said = str(error)
  assert said is None or any(name in said for name in names), said


def benchmark(tmp_path: pathlib.Path, rng: random.Random, ending: str) -> None:
  """One mutated file of one benchmark: read and scored, or refused by name."""
  name = rng.choice(list(catalogue.BENCHMARKS))
  mode = rng.choice(('reference', 'fixed'))
  folder = tmp_path / name
  folder.mkdir(exist_ok=True)
  splits = {key.split('/')[1]: rows for key, rows in DATA.items() if key.startswith(f'{name}/')}
  broken = rng.choice(list(splits))
  for path in folder.iterdir():
    path.unlink()
  with refused_by(name):
    for split, rows in splits.items():
      rows = copy.deepcopy(rows)
      is_odd = split == broken
      structured = is_odd and ending in ('.jsonl', '.json') and rng.random() < 0.7
      if structured:
        rows[rng.randrange(len(rows))] = odd_value(rng, rows[0])
      content = WRITERS[ending](rows)
      content = odd_bytes(rng, content) if is_odd and not structured else content
      (folder / f'{split}{ending}').write_bytes(content)
    made = catalogue.make_tasks(
      [name], prompt_mode=mode, shots=rng.choice((None, 0)), bigbench_dir='', data_dir=str(tmp_path)
    )
    for task in made:
      for item in task.items()[:3]:
        check_scores(task, item, rng)


def bigbench(tmp_path: pathlib.Path, rng: random.Random) -> None:
  make = rng.choice((bigbench_case.multiple_choice, bigbench_case.generative))
  task = make(5, stop_string='\n', output_regex='.+', task_prefix='P')
  structured = rng.random() < 0.6
  task = odd_value(rng, task) if structured else task
  path = bigbench_case.write(tmp_path, 'operators', 'x')
  content = json.dumps(task).encode()
  path.write_bytes(content if structured else odd_bytes(rng, content))
  with refused_by('operators', 'examples'):
    for made in lite.evaluation_tasks(tmp_path, 'operators', rng.choice((0, 2))):
      for item in made.items():
        check_scores(made, item, rng)


def questions(tmp_path: pathlib.Path, rng: random.Random) -> None:
  rows = [{'question_id': i, 'category': 'math', 'turns': ['a?', 'b?']} for i in range(3)]
  if rng.random() < 0.6:
    content = as_jsonl([odd_value(rng, rows[0]), *rows[1:]])
  else:
    content = odd_bytes(rng, as_jsonl(rows))
  path = tmp_path / 'question.jsonl'
  path.write_bytes(content)
  for read in (mt_bench.read_questions, mt_bench.read_answers):
    with refused_by('question.jsonl'):
      read(path)


RESULT = {
  'task': 't', 'group': 'g', 'metric': 'acc', 'low': 0.0, 'high': 1.0, 'in_average': True,
  'shots': 0, 'tokenizer': 'x', 'bos': 'y', 'settings': {'seed': 0}, 'metrics': {'acc': {}},
  'model': {'name': 'm', 'fingerprint': 'f', 'dropped_fraction': 0.0},
  'items': [{'name': str(i), 'measures': {'acc': 1.0}, 'log_probs': [-1.0]} for i in range(3)],
}  # fmt: skip


def result_file(tmp_path: pathlib.Path, rng: random.Random) -> None:
  content = {'format': results.FORMAT, **copy.deepcopy(RESULT)}
  structured = rng.random() < 0.7
  text = json.dumps(odd_value(rng, content) if structured else content).encode()
  path = tmp_path / 'r.json'
  path.write_bytes(text if structured else odd_bytes(rng, text))
  with refused_by('r.json'):
    found = results.load(path)
    results.compare(found, found)
    results.save_summary(epath.Path(tmp_path), results.summarise([found], 10, 0), {})


FAMILIES = {
  **{ending: lambda path, rng, ending=ending: benchmark(path, rng, ending) for ending in WRITERS},
  'bigbench': bigbench,
  'questions': questions,
  'results': result_file,
}


@pytest.mark.parametrize('family', FAMILIES)
def test_mutated_files_are_scored_or_refused(tmp_path, family):
  for seed in range(200):
    FAMILIES[family](tmp_path, random.Random(f'{family} {seed}'))


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_many_mutated_files_are_scored_or_refused(tmp_path, family):
  for seed in range(200, 3000):
    FAMILIES[family](tmp_path, random.Random(f'{family} {seed}'))


def test_files_that_are_whole_are_scored(tmp_path):
  """The same walk without damage, so that the tests above are not green by refusing all."""
  rng = random.Random(0)
  for name in catalogue.BENCHMARKS:
    (tmp_path / name).mkdir()
    for key, rows in DATA.items():
      if key.startswith(f'{name}/'):
        (tmp_path / f'{key}.parquet').write_bytes(as_parquet(rows))
    (task,) = catalogue.make_tasks(
      [name], prompt_mode='fixed', shots=None, bigbench_dir='', data_dir=str(tmp_path)
    )
    for item in task.items():
      check_scores(task, item, rng)
