"""A tiny run on a corpus of its own, which the tests of training share."""

import atexit
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy as np

from openmoe.config import (
  DataConfig,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  TrainConfig,
)
from openmoe.data.vocabulary import train_vocabulary
from openmoe.observe.metrics import read_records
from openmoe.observe.notes import TIMED
from tasks import demo_corpus
from tasks.text_files import UserFiles

ROOT = pathlib.Path(__file__).parent.parent
LENGTHS = {'targets': 32}


@functools.cache
def corpus() -> pathlib.Path:
  """A folder with a corpus of the user's own and its vocabulary; the same in all tests."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix='openmoe-corpus-'))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  rng = np.random.default_rng(0)
  words = np.array(['red', 'blue', 'one', 'two', 'cat', 'dog', 'runs', 'sits', 'the', 'a'])
  lines = [' '.join(rng.choice(words, 60)) for _ in range(400)]
  (folder / 'text.jsonl').write_text('\n'.join(json.dumps({'text': line}) for line in lines))
  train_vocabulary(str(folder / 'vocabulary.model'), lines, 300)
  return folder


def source_of(folder) -> UserFiles:
  """What registers the corpus that corpus() has written."""
  folder = pathlib.Path(folder)
  return UserFiles(
    str(folder / 'text.jsonl'),
    'run_test',
    str(folder / 'vocabulary.model'),
    demo_corpus.EXTRA_IDS,
    held_out_every=10,
  )


def arguments(model_dir, source, **changes):
  moe = MoEConfig(4, group_size=32)
  model = ModelConfig(
    'run_test',
    vocab_size=512,
    num_layers=2,
    embed_dim=16,
    mlp_dim=16,
    num_heads=2,
    head_dim=8,
    num_sparse_layers=1,
    moe=moe,
    dtype='float32',
  )
  data = {'mixture_or_task_name': 'run_test_full_lm', 'task_feature_lengths': LENGTHS}
  run = {'total_steps': 12, 'eval_period': 6, 'eval_steps': 2, 'checkpoint_period': 4}
  run |= {'log_period': 1, 'router_period': 2, 'keep_checkpoints': 2}
  rate = changes.pop('learning_rate', 0.1)
  return {
    'run': TrainConfig(str(model_dir), **(run | changes)),
    'model': model,
    'optimizer': OptimizerConfig(schedule='constant', learning_rate=rate),
    'data': DataConfig(**data, batch_size=8, num_shards=2),
    'eval_data': DataConfig(
      **data, batch_size=8, split='validation', shuffle=False, num_shards=1, num_epochs=1
    ),
    'mesh': MeshConfig(num_expert_partitions=4),
    'sources': [source],
  }


def curve(model_dir) -> list[tuple[int, float, float]]:
  return [(r['step'], r['loss'], r['grad_norm']) for r in read_records(model_dir, 'train')]


def timeless(model_dir) -> list[dict]:
  """All records of a run without what the clock decides, which a repetition has alike."""
  plain = lambda v: repr(v) if v != v else v  # nan equals nothing, itself included
  return [{k: plain(v) for k, v in r.items() if k not in TIMED} for r in read_records(model_dir)]


def child(code: str, *arguments: object, **options) -> subprocess.Popen:
  """A Python process of its own that runs `code`; standard output and error together."""
  return subprocess.Popen(
    [sys.executable, '-c', code, *map(str, arguments)],
    cwd=ROOT,
    env=os.environ | options.pop('env', {}),
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    **options,
  )
