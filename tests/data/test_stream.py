"""The global stream: the same for any hosts and any restart, and refusals that say why."""

from __future__ import annotations

import dataclasses
import io
import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest
import seqio

from openmoe.config import ConfigError, DataConfig
from openmoe.data import stream as stream_module
from openmoe.data.shard import shard_name
from openmoe.data.stream import (
  ShardedStream,
  evaluation_batches,
  padding_batch,
)
from tests.data import case

SHARDS = 2
ROWS = 4
LENGTHS = {'inputs': 64, 'targets': 64}
FIELDS = ('inputs', 'targets', 'loss_weights', 'segment_ids', 'positions')


@pytest.fixture(scope='module')
def config(tmp_path_factory) -> DataConfig:
  folder = tmp_path_factory.mktemp('corpora')
  for name in ('stream_a', 'stream_b'):
    case.make_corpus(folder, name)
  seqio.MixtureRegistry.add('stream_mix', [('stream_a_ul2', 0.7), ('stream_b_ul2', 0.3)])
  return DataConfig('stream_mix', LENGTHS, ROWS, num_shards=SHARDS, seed=3)


def take(stream, count: int) -> list[np.ndarray]:
  """Batches as one array each, [fields, rows, length]."""
  return [
    np.stack([np.asarray(getattr(batch, f)) for f in FIELDS])
    for batch in itertools.islice(stream, count)
  ]


@pytest.fixture(scope='module')
def whole(config):
  """12 batches of one host, and its saved position after 5."""
  with ShardedStream(config, range(SHARDS)) as stream:
    batches = take(stream, 5)
    entries = stream.state()
    return batches + take(stream, 7), entries


def test_a_batch_is_well_formed(config, whole):
  batches, _ = whole
  for inputs, targets, weights, segments, _ in batches:
    assert inputs.shape == (ROWS, 128)
    filled = segments > 0
    assert filled.mean() > 0.9
    assert not targets[~filled].any() and not weights[~filled].any()
    starts = np.diff(np.pad(segments, ((0, 0), (1, 0))), axis=1) > 0
    assert not inputs[starts].any()
  assert len({batch.tobytes() for batch in batches}) == len(batches)


def test_hosts_see_their_rows_of_the_same_batch(config, whole):
  batches, _ = whole
  parts = []
  for host in range(2):
    with ShardedStream(config, [host]) as stream:
      parts.append(take(stream, 3))
  for step in range(3):
    both = np.concatenate([parts[0][step], parts[1][step]], axis=1)
    np.testing.assert_array_equal(both, batches[step])


def test_restored_on_other_hosts_it_continues_exactly(config, whole):
  batches, entries = whole
  assert sorted(entries) == [shard_name(i, SHARDS) for i in range(SHARDS)]
  parts, saved = [], {}
  for host in range(2):
    with ShardedStream(config, [host]) as stream:
      stream.restore(entries)
      parts.append(take(stream, 3))
      saved |= stream.state()
  for step in range(3):
    both = np.concatenate([parts[0][step], parts[1][step]], axis=1)
    np.testing.assert_array_equal(both, batches[5 + step])
  with ShardedStream(config, range(SHARDS)) as stream:
    stream.restore(saved)
    np.testing.assert_array_equal(take(stream, 1)[0], batches[8])


def test_another_seed_gives_other_batches(config, whole):
  with ShardedStream(dataclasses.replace(config, seed=4), range(SHARDS)) as stream:
    assert (take(stream, 1)[0] != whole[0][0]).any()


def test_a_position_of_another_stream_is_refused(config, whole):
  other = dataclasses.replace(config, seed=4)
  with (
    ShardedStream(other, [0]) as stream,
    pytest.raises(ConfigError, match='seed: saved 3, now 4'),
  ):
    stream.restore(whole[1])
  with ShardedStream(config, [0]) as stream, pytest.raises(ConfigError, match='no shard_00000'):
    stream.restore({})


def test_the_batch_size_may_change_at_a_restart(config, whole):
  """Shards give rows; how many make a batch is not part of a position."""
  batches, entries = whole
  with ShardedStream(dataclasses.replace(config, batch_size=2 * ROWS), range(SHARDS)) as stream:
    stream.restore(entries)
    found = take(stream, 1)[0]
  each = ROWS // SHARDS
  for shard in range(SHARDS):
    expected = [b[:, shard * each : (shard + 1) * each] for b in batches[5:7]]
    rows = found[:, 2 * shard * each : 2 * (shard + 1) * each]
    np.testing.assert_array_equal(rows, np.concatenate(expected, axis=1))


def test_a_finite_pass_ends_and_is_the_same_every_time(config):
  once = dataclasses.replace(config, split='validation', shuffle=False, num_shards=2)
  first, second = (take(evaluation_batches(once, 50), 50) for _ in range(2))
  assert 1 < len(first) < 50
  np.testing.assert_array_equal(first, second)
  alone = [len(take(evaluation_batches(once, 50, [shard]), 50)) for shard in range(2)]
  assert max(alone) == len(first)  # hosts agree on the longest, and the others pad
  assert not padding_batch(once, 1).loss_weights.any()
  assert padding_batch(once, 1).targets.shape == (once.batch_size // 2, once.row_length)


def damaged(position: bytes, **changes) -> bytes:
  """The entry of a shard with other arrays in it; None removes one."""
  with np.load(io.BytesIO(position)) as loaded:
    arrays = dict(loaded) | changes
  out = io.BytesIO()
  np.savez_compressed(out, **{k: v for k, v in arrays.items() if v is not None})
  return out.getvalue()


def test_a_position_that_somebody_sent_writes_nothing_and_says_what_is_wrong(
  config, whole, tmp_path
):
  entries = whole[1]
  name = min(entries)
  target = tmp_path / 'written'
  content = np.frombuffer(b'x', np.uint8)
  wrong = {
    'holds a file named': {f'file:{target}': content},
    "named '../../out'": {'file:../../out': content},
    'damaged: no row_sizes': {'header': np.array('{"signature": {}, "shard": 0}')},
    'is damaged': {'header': None},
    'does not fit this data pipeline': {'file:position.index': content},
  }
  with ShardedStream(config, [0]) as stream:
    for message, changes in wrong.items():
      with pytest.raises(ConfigError, match=message):
        stream.restore({name: damaged(entries[name], **changes)})
    with pytest.raises(ConfigError, match='is damaged'):
      stream.restore({name: entries[name][:200]})
  assert not target.exists()


@pytest.mark.parametrize('saved_before', [False, True])
def test_a_read_that_does_not_end_is_left_behind_with_an_exact_position(
  config, whole, monkeypatch, saved_before
):
  stuck, go_on, read = threading.Event(), threading.Event(), stream_module.Shard.next_row

  def hang(self):
    stuck.set()
    go_on.wait(60)
    return read(self)

  monkeypatch.setattr(stream_module, '_PATIENCE', 0.1)
  monkeypatch.setattr(stream_module, 'abandoned', [])
  stream = ShardedStream(config, range(SHARDS))
  given = len(take(stream, 2))
  if saved_before:
    stream.state()
  monkeypatch.setattr(stream_module.Shard, 'next_row', hang)
  while stream.ready(0.2) or not stuck.is_set():
    if stream.ready(0.0):
      given += len(take(stream, 1))
  entries = stream.state(seconds=0.1)
  stream.close()
  assert stream_module.abandoned == [config.mixture_or_task_name]
  monkeypatch.setattr(stream_module.Shard, 'next_row', read)
  with ShardedStream(config, range(SHARDS)) as again:
    again.restore(entries)
    np.testing.assert_array_equal(take(again, 2), whole[0][given : given + 2])
  go_on.set()


def test_an_error_of_the_reading_thread_reaches_the_consumer(config, tmp_path):
  case.write_jsonl(tmp_path / 'bad.jsonl', ['fine words here'] * 9)
  with open(tmp_path / 'bad.jsonl', 'a') as f:
    f.write('{"text": "half a rec\n')
  source = case.TextFiles({'train': str(tmp_path / 'bad.jsonl')}, bad_record='refuse')
  case.chains.add_corpus('stream_refuse', source, case.VOCABULARY)
  refusing = DataConfig('stream_refuse_full_lm', {'targets': 64}, 2, num_shards=1)
  with (
    ShardedStream(refusing, [0]) as stream,
    pytest.raises(ConfigError, match=r'bad.jsonl:10: inv'),
  ):
    take(stream, 10)


def test_more_shards_than_documents_are_refused_while_opening(tmp_path):
  case.write_jsonl(tmp_path / 'few.jsonl', ['some words of a document'] * 3)
  source = case.TextFiles({'train': str(tmp_path / 'few.jsonl')})
  case.chains.add_corpus('stream_few', source, case.VOCABULARY)
  few = DataConfig('stream_few_full_lm', {'targets': 64}, 4, num_shards=4)
  with pytest.raises(ConfigError, match='3 documents, fewer than num_shards=4.*lower num_shards'):
    ShardedStream(few, [0])


def test_unknown_names_are_refused_with_the_nearest(config):
  with pytest.raises(ConfigError, match='Nearest: stream_mix'):
    ShardedStream(dataclasses.replace(config, mixture_or_task_name='stream_mux'), [0])
  with pytest.raises(ConfigError, match="no split 'test'"):
    ShardedStream(dataclasses.replace(config, split='test'), [0])


def test_closing_stops_the_thread(config):
  stream = ShardedStream(config, [0])
  next(stream)
  stream.close()
  stream.close()
  assert not [t for t in threading.enumerate() if t.name == 'data-stream']
  with pytest.raises(RuntimeError, match='closed'):
    next(stream)


def test_a_process_that_closes_nothing_still_ends(tmp_path):
  """TensorFlow's threads parse records in Python: they must stop before the interpreter does."""
  case.write_corpus(tmp_path, 'left_open')
  code = f"""
import pathlib
from openmoe.config import DataConfig
from openmoe.data.stream import ShardedStream
from tests.data import case
case.add_corpus(pathlib.Path({str(tmp_path)!r}), 'left_open')
config = DataConfig('left_open_full_lm', {{'targets': 64}}, 4, num_shards=2)
stream = ShardedStream(config, range(2))
print(next(stream).targets.shape)
"""
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, timeout=120, check=True
  )
  assert done.stdout == '(4, 64)\n'
