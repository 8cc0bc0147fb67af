"""Mutated notes, corpora, prompts, tokenizers, templates and results: refused by name, or read."""

import gzip
import json
import pathlib
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from etils import epath

from openmoe.checkpoint.paths import Unreadable
from openmoe.config import ConfigError
from openmoe.data import documents, position, stages
from openmoe.data.vocabulary import train_vocabulary
from openmoe.evaluation import points, results
from openmoe.inference import chat, console, template
from openmoe.inference.tokenizer import TextTokenizer
from openmoe.observe import metrics, notes, pictures, record
from openmoe.running import lease
from tests.fuzz import loop

ERRORS = (ConfigError, Unreadable)
ROWS = [{'text': f'Words of document {i}, größer 漢字.\n', 'id': i} for i in range(30)]
TEMPLATE = (
  '{{ bos_token }}{% for m in messages %}{% if m.role == "user" %}[{{ m.content | trim }}]'
  '{% else %}{{ m["content"] + eos_token }}{% endif %}{% endfor %}'
)


def _noted(folder: pathlib.Path, read) -> list[str]:
  """What a start is told of a run's notes, which may be repaired or kept aside."""
  told: list[str] = []
  copy = folder.with_name('copy')
  shutil.copytree(folder, copy)
  try:
    read(epath.Path(copy), told.append)
  finally:
    shutil.rmtree(copy)
  return told


def _go_on(folder, note) -> None:
  """As a start does, and the picture at its end."""
  records = notes.Records(folder, 3, note)
  records.append({'step': 4, 'kind': 'train', 'loss': 1.0})
  notes.RouterArrays(folder, 3, note)
  if metrics.read_records(folder, 'train'):
    pictures.loss_figure(folder)


def _run(place: pathlib.Path) -> pathlib.Path:
  folder = place / 'run'
  with metrics.MetricsWriter(folder, 0, 9) as writer:
    for step in range(1, 5):
      writer.write_router(step, {'expert_load': np.full((2, 4), 0.25), 'dropped': np.zeros(2)})
      writer.write(step, {'loss': 5.0 / step, 'unigram_entropy': 3.0, 'grad_norm': float('inf')})
    writer.write(4, {'loss': 1.5}, kind='validation')
  shutil.rmtree(folder / 'tensorboard')
  record.write_run_record(folder, 'a = 1\nb = "text"\n', 0)
  return folder


def _tokenizer(folder: pathlib.Path) -> None:
  found = TextTokenizer.open(str(folder), 1)
  ids = found.encode('Words of größer <|im_end|> 漢字')
  found.decode([*ids, 0, 299, 300, 10**6])
  found.fingerprint()


def _vocabulary(place: pathlib.Path) -> pathlib.Path:
  folder = place / 'tokenizer'
  folder.mkdir()
  train_vocabulary(str(folder / 'spiece.model'), [row['text'] for row in ROWS] * 5, 300)
  (folder / 'added_tokens.json').write_text('{"<|im_end|>": 300, "<|im_start|>": 301}')
  decoder = {'302': {'content': '<|tool|>', 'special': True}}
  config = {'added_tokens_decoder': decoder, 'bos_token': '<s>', 'chat_template': TEMPLATE}
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return folder


def _documents(path: pathlib.Path) -> int:
  """Bad records of a file."""
  documents.check_whole(str(path))
  bad = 0
  for number, raw in enumerate(documents.raw_records(str(path), 4096, 'text')):
    try:
      documents.parse(str(path), number, raw, 'text').decode('utf-8')
    except documents.BadRecordError:
      bad += 1
  return bad


def _corpus(place: pathlib.Path, name: str) -> pathlib.Path:
  path, lines = place / name, ''.join(json.dumps(row) + '\n' for row in ROWS)
  if name.endswith('.parquet'):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
  elif name.endswith('.csv'):
    path.write_text('id,text\n' + ''.join(f'{r["id"]},"{r["text"]}"\n' for r in ROWS), 'utf-8')
  elif name.endswith('.gz'):
    path.write_bytes(gzip.compress(lines.encode()))
  else:
    path.write_text(lines if name.endswith('.jsonl') else ROWS[0]['text'] * 99, 'utf-8')
  return path


def _position(place: pathlib.Path) -> pathlib.Path:
  header = {'signature': {'a': 1}, 'shard': 0, 'row_sizes': [1], 'open_sizes': [], 'ended': False}
  packed = position.pack({'file:position.index': np.zeros(9, np.uint8)}, header)
  head = json.dumps({'step': 3, 'stages': [['a', 100, 10], ['b', 50, 5]]}).encode()
  path = place / 'position'
  path.write_bytes(head + b'\n' + packed)
  return path


def _read_position(path: pathlib.Path) -> None:
  _, _, packed = stages._parts('a-0', path.read_bytes())
  position.read(packed, 'a-0')


def _lease(place: pathlib.Path) -> pathlib.Path:
  with lease.Lease(place, note=print):
    content = (place / lease.NAME).read_bytes()
  path = place / lease.NAME
  path.write_bytes(content)
  return path


def _result(place: pathlib.Path) -> pathlib.Path:
  item = {'name': 'a', 'measures': {'em': 1.0}, 'log_probs': [-1.0, -2.0], 'texts': ['x']}
  head = {'task': 't', 'group': 't', 'model': {'name': 'm', 'fingerprint': 'f' * 64}}
  head |= {'metric': 'em', 'low': 0.0, 'high': 1.0, 'in_average': True, 'shots': 0, 'count': 1}
  head |= {'tokenizer': 'd', 'bos': 'id 0', 'settings': {}}
  head |= {'metrics': {'em': {'value': 1.0, 'low95': 1.0, 'high95': 1.0}}}
  head['model']['dropped_fraction'] = 0.0
  results.save(epath.Path(place / 't.json'), head, [item])
  results.load(place / 't.json')
  return place / 't.json'


def _summary(place: pathlib.Path) -> pathlib.Path:
  row = results.Row('t', 'em', 1.0, 0.9, 1.1, 100.0, (90.0, 110.0), 1, 0, 0.0)
  results.save_summary(epath.Path(place), [row], {'model': {'name': 'm'}})
  (place / 'summary.csv').unlink()
  points.read_summary(str(place))
  return place / 'summary.json'


def _prompts(place: pathlib.Path) -> pathlib.Path:
  path = place / 'prompts.txt'
  path.write_text('\ufeffone\ntwo 漢字\r\n\nthree\n', 'utf-8')
  assert console.read_prompts(path) == ['one', 'two 漢字', 'three']
  return path


def _of_run(name: str, read=_go_on):
  return _read_by(
    lambda place: _run(place) / name, lambda p: _noted(p.parents[name.count('/')], read)
  )


def _of_tokenizer(name: str):
  return _read_by(lambda place: _vocabulary(place) / name, lambda path: _tokenizer(path.parent))


def _of_corpus(name: str):
  return _read_by(lambda place: _corpus(place, name), _documents)


def _read_by(make, use):
  """place -> (file, what reads it)."""

  def made(place):
    path = make(place)
    return path, lambda: use(path)

  return made


def _start(folder, note) -> None:
  record.write_run_record(folder, 'a = 1\n', 3, note)


def _template(place):
  folder = place / 'template'
  folder.mkdir()
  path = folder / 'chat_template.jinja'
  path.write_text(TEMPLATE)
  messages = [{'role': 'user', 'content': 'Hé'}, {'role': 'assistant', 'content': 'x'}]
  worker = template.Renderer('', 'fuzz')  # one process for all

  def use():
    found = chat.record_of(folder)
    if found:
      worker._source = found.template_text
      worker.render({'messages': messages, 'bos_token': '', 'eos_token': ''})

  use()
  return path, use


# How the file and its reader are made, mutations in the default run, share that must be noticed.
TARGETS = {
  'metrics': (_of_run('metrics.jsonl'), 15, 0.1),
  'starts': (_of_run('run.json', _start), 8, 0.1),
  'config_gin': (_of_run('config.gin', _start), 4, 0),
  'router': (_of_run('router/000000000.npz'), 15, 0.25),
  'lease': (_read_by(_lease, lambda p: lease.Lease(p.parent, note=print)._read()), 40, 0),
  'position': (_read_by(_position, _read_position), 100, 0.25),
  'jsonl': (_of_corpus('a.jsonl'), 60, 0.1),
  'jsonl_gz': (_of_corpus('a.jsonl.gz'), 60, 0.25),
  'csv': (_of_corpus('a.csv'), 60, 0.02),
  'parquet': (_of_corpus('a.parquet'), 60, 0.1),
  'txt': (_of_corpus('a.txt'), 40, 0.1),
  'prompts': (_read_by(_prompts, console.read_prompts), 60, 0.1),
  'sentencepiece': (_of_tokenizer('spiece.model'), 60, 0.05),
  'added_tokens': (_of_tokenizer('added_tokens.json'), 60, 0.1),
  'tokenizer_config': (_of_tokenizer('tokenizer_config.json'), 40, 0.1),
  'template': (_template, 40, 0.1),
  'result': (_read_by(_result, results.load), 80, 0.25),
  'summary': (_read_by(_summary, lambda path: points.read_summary(path.parent)), 80, 0.25),
}


def fuzz(target: str, times: int, place: pathlib.Path) -> None:
  make, _, least = TARGETS[target]
  path, use = make(place)
  loop.fuzz(path, use, times, target, place, errors=ERRORS, least=least)


@pytest.mark.parametrize('target', TARGETS)
def test_mutations_of_a_text_are_refused_or_read(target, tmp_path):
  fuzz(target, TARGETS[target][1], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('target', TARGETS)
def test_many_mutations_of_a_text_are_refused_or_read(target, tmp_path):
  fuzz(target, loop.LONGER * TARGETS[target][1], tmp_path)
