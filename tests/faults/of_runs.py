"""Rows of the fault table: data, processes and numbers."""

import dataclasses
import gzip
import os
import signal
import socket
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe.config import ConfigError, DataConfig
from openmoe.data import documents
from openmoe.data import stream as stream_module
from openmoe.data.files import DamagedFile
from openmoe.data.fingerprint import changed_files
from openmoe.data.sources import TextFiles
from openmoe.data.stream import ShardedStream
from openmoe.health import HealthConfig
from openmoe.health.watch import Watch
from openmoe.models import empty_batch
from openmoe.observe.timeline import Timeline
from openmoe.running import rollcall
from openmoe.running.cluster import Place
from openmoe.running.lease import DirectoryInUse, Lease
from openmoe.running.metadata import data_changed
from openmoe.running.observation import NonFiniteLoss, record_step
from openmoe.running.peers import Peers
from openmoe.running.rollcall import PeerLost, meet
from openmoe.running.signals import Signals
from tests.data import case
from tests.data.test_sources import read
from tests.faults.bench import rows
from tests.run_case import arguments

DATA, data = rows('data')
PROCESS, process = rows('process')
NUMERICS, numerics = rows('numerics')


# --- data


def corpus_of(bench, name: str, texts=None) -> DataConfig:
  """A registered corpus of its own, as a language model over two shards."""
  path = bench.place / f'{name}.jsonl'
  case.write_jsonl(path, texts or [f'some words of document {i}' for i in range(20)])
  unique = f'fault_{name}_{abs(hash(str(bench.place)))}'
  case.chains.add_corpus(unique, TextFiles({'train': str(path)}), case.VOCABULARY)
  return DataConfig(f'{unique}_full_lm', {'targets': 64}, 4, num_shards=2)


@data('a record is no JSON', 'skipped and counted')
def _(bench):
  path = bench.place / 'a.jsonl'
  path.write_bytes(b'{"text": "good"}\n{"text": "half\n{"text": "also"}\n')
  source = TextFiles({'train': str(path)})
  assert [text for text, _ in read(source)] == ['good', 'also']
  assert sum(source.skipped.values()) == 1


@data('a record is no UTF-8, and bad ones are to be refused', 'refused by file and line')
def _(bench):
  path = bench.place / 'a.jsonl'
  path.write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n')
  with pytest.raises(Exception, match=r'a\.jsonl:2: invalid UTF-8'):
    read(TextFiles({'train': str(path)}, bad_record='refuse'))


@data('a compressed file is cut off', 'named as damaged, exit code 65')
def _(bench):
  path = bench.place / 'a.jsonl.gz'
  lines = b''.join(b'{"text": "%s"}\n' % os.urandom(200).hex().encode() for _ in range(50))
  path.write_bytes(gzip.compress(lines)[:-2000])
  with pytest.raises(DamagedFile, match='ends too early: it was cut off') as error:
    documents.check_whole(str(path))
  assert error.value.exit_code == 65


@data('no file is there', 'refused with the pattern')
def _(bench):
  with pytest.raises(ConfigError, match='No file matches'):
    read(TextFiles({'train': str(bench.place / 'no*.jsonl')}))


@data('there are fewer documents than shards', 'refused while opening')
def _(bench):
  config = dataclasses.replace(corpus_of(bench, 'few', ['one document']), num_shards=2)
  with pytest.raises(ConfigError, match='fewer than num_shards=2'):
    ShardedStream(config, [0])


@data('a file changes between two starts', 'refused with its name unless it is allowed')
def _(bench):
  now = {'mixture': 'm', 'task_feature_lengths': {}, 'data_files': {'a.jsonl': '7:abc'}}
  before = now | {'data_files': {'a.jsonl': '9:def'}}
  run = arguments(bench.run, None)['run']
  with pytest.raises(ConfigError, match=r'a\.jsonl has changed \(9 bytes there, 7 here\)'):
    data_changed(run, now, before, 4)
  assert data_changed(dataclasses.replace(run, allow_data_change=True), now, before, 4)
  assert changed_files(now['data_files'], now['data_files']) == []


@data('a saved position is cut off', 'refused by name')
def _(bench):
  config = corpus_of(bench, 'cut')
  with ShardedStream(config, [0, 1]) as stream:
    next(stream)
    entries = stream.state()
  name = min(entries)
  with ShardedStream(config, [0]) as stream, pytest.raises(ConfigError, match='is damaged'):
    stream.restore(entries | {name: entries[name][:100]})


@data('a saved position is of another seed', 'refused with both values')
def _(bench):
  config = corpus_of(bench, 'seed')
  with ShardedStream(config, [0, 1]) as stream:
    entries = stream.state()
  other = dataclasses.replace(config, seed=7)
  with ShardedStream(other, [0]) as stream, pytest.raises(ConfigError, match='saved 0, now 7'):
    stream.restore(entries)


@data('a read hangs for ever', 'left behind, with a position from which nothing is lost', slow=True)
def _(bench):
  config = corpus_of(bench, 'hang')
  go_on, next_row = threading.Event(), stream_module.Shard.next_row
  with ShardedStream(config, [0, 1]) as stream:
    whole = [np.asarray(next(stream).targets) for _ in range(3)]
  bench.patch.setattr(stream_module, '_PATIENCE', 0.1)
  bench.patch.setattr(stream_module, 'abandoned', [])
  stream, given = ShardedStream(config, [0, 1]), 0
  next(stream)
  given = 1
  with bench.patch.context() as patch:
    patch.setattr(stream_module.Shard, 'next_row', lambda self: go_on.wait(60) and next_row(self))
    while stream.ready(0.3) and given < 2:
      next(stream)
      given += 1
    entries = stream.state(seconds=0.1)
    stream.close()
  with ShardedStream(config, [0, 1]) as again:
    again.restore(entries)
    np.testing.assert_array_equal(np.asarray(next(again).targets), whole[given])
  go_on.set()


# --- processes


def two(bench, facts=({}, {}), dirs=None, count=2, present=(0, 1), timeout=5.0):
  """What each of two processes, here threads, gets of the roll call."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{probe.getsockname()[1]}'
  found = {}

  def call(index):
    where = str((dirs or {}).get(index, bench.run))
    try:
      found[index] = meet(Place(address, count, index), facts[index], where, timeout)
    except (ConfigError, PeerLost) as error:
      found[index] = error

  threads = [threading.Thread(target=call, args=(index,)) for index in present]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  return [found[index] for index in present]


def differ(bench, name: str):
  for error in two(bench, facts=({name: 'a'}, {name: 'b'})):
    assert isinstance(error, ConfigError), error
    assert f'{name} is a in process 0' in str(error)
    assert 'and b in process 1' in str(error)


REFUSED = 'refused in all before the first step, with name, values and hosts'
for _name in (
  *('run.seed', 'run.total_steps', 'run.checkpoint_period', 'data.batch_size'),
  *('optimizer.learning_rate', 'code of openmoe/losses.py', 'data file a.jsonl'),
):
  process(f'one has another {_name}', REFUSED)(lambda bench, name=_name: differ(bench, name))


@process('one never starts', 'named within the time-out by the first, all end with 69')
def _(bench):
  (error,) = two(bench, present=(0,), timeout=0.5)
  assert 'Of 2 processes, 1 did not call in' in str(error)
  assert error.exit_code == 69


@process('the first never starts', 'named within the time-out by the others, which end with 69')
def _(bench):
  (error,) = two(bench, present=(1,), timeout=0.5)
  assert 'Process 0 of 2 did not answer' in str(error)
  assert error.exit_code == 69


@process('the run directory is not shared', 'told as such, with the process that does not see it')
def _(bench):
  bench.patch.setattr(rollcall, '_SEEN_WITHIN', 0.3)
  for error in two(bench, dirs={1: bench.place / 'other'}):
    assert 'Process 1' in str(error)
    assert 'MODEL_DIR is not shared' in str(error)


def watched(bench, goes: str, words: str):
  """Process 0 watches over process 1, which goes away in some way."""
  peers, others = two(bench)
  said, ended = [], threading.Event()

  def end(text):
    said.append(text)
    ended.set()

  with Peers(peers, 0, 2, timeout=0.6, end=end):
    if goes == 'killed':
      others[0].line.close()
    elif goes == 'failed':
      others[0].line.send({'failed': 'no data'})
    assert ended.wait(30)
  others[0].line.close()
  peers[0].line.close()
  assert 'Process 1 of 2' in said[0]
  assert words in said[0]


@process('one is killed', 'named at once, all end with 69')
def _(bench):
  watched(bench, 'killed', 'has gone without a word')


@process('one is stopped', 'named after the time-out, all end with 69')
def _(bench):
  watched(bench, 'stopped', 'has not answered for')


@process('one ends with an error', 'named with its words, all end with 69')
def _(bench):
  bench.patch.setattr('openmoe.running.peers._GRACE', 0.1)
  watched(bench, 'failed', 'ended: no data')


@process('two runs on one directory', 'the second is refused and told who trains there')
def _(bench):
  with Lease(bench.run, beat=0.1), pytest.raises(DirectoryInUse, match=f'process {os.getpid()}'):
    Lease(bench.run).__enter__()


@process('an owner that was stopped comes back', 'it ends, the successor goes on')
def _(bench):
  lease = Lease(bench.run, beat=0.05)
  with lease:
    successor = dataclasses.replace(lease._mine, key='other', pid=7)
    (bench.run / 'lease.json').write_bytes(lease._encoded(successor))
    lease._thread.join(10)
    with pytest.raises(DirectoryInUse, match='taken over by process 7'):
      lease.check()


def signalled(number) -> tuple[bool, bool]:
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  with Signals(mesh) as signals:
    os.kill(os.getpid(), number)
    return signals.stop_after_step(), signals.save


@process('SIGTERM comes', 'the step ends, all is saved, exit code 75')
def _(bench):
  assert signalled(signal.SIGTERM) == (True, False)


@process('SLURM announces the end of the job', 'saved at once, training goes on')
def _(bench):
  assert signalled(signal.SIGUSR1) == (False, True)


# --- numbers


def step_with(bench, **scalars):
  """Writes down a step whose scalars are given, and what was told of it."""
  run = arguments(bench.run, None, total_steps=9)['run']
  bench.run.mkdir(exist_ok=True)
  metrics = {'scalars': {'loss': 1.0, 'grad_norm': 1.0} | scalars, 'router': None}
  batch = jax.tree.map(np.asarray, empty_batch(2, 8))
  written = []
  writer = types.SimpleNamespace(
    write=lambda step, values: written.append(step) or {'step': step, 'kind': 'train'}
  )
  newest = types.SimpleNamespace(newest=lambda: 4)
  watch = Watch(HealthConfig(), Timeline(bench.run, print))
  at = types.SimpleNamespace(run=run, writer=writer, checkpointer=newest, watch=watch)
  record_step(at, 6, metrics, batch)
  return written


DIVERGED = 'the run ends with 65; step, batch and last good checkpoint are named'


def diverges(bench, **scalars):
  with pytest.raises(NonFiniteLoss, match=r'Step 6: .*last good checkpoint: checkpoint_4') as error:
    step_with(bench, **scalars)
  assert error.value.exit_code == 65
  (kept,) = bench.run.glob('nonfinite_step_6_*.npz')
  assert np.load(kept)['targets'].shape == (2, 8)


@numerics('the loss is NaN', DIVERGED)
def _(bench):
  diverges(bench, loss=jnp.nan)


@numerics('the loss is infinite', DIVERGED)
def _(bench):
  diverges(bench, loss=jnp.inf)


@numerics('the gradient is NaN and the loss is not', DIVERGED)
def _(bench):
  diverges(bench, grad_norm=jnp.nan)


@numerics('the gradient is infinite', DIVERGED)
def _(bench):
  diverges(bench, grad_norm=-jnp.inf)


@numerics('all numbers are finite', 'the step is written down')
def _(bench):
  assert step_with(bench) == [6]
