"""Rows of the fault table: checkpoints and disks."""

import os
import shutil

import pytest

from openmoe.checkpoint import manifest
from openmoe.checkpoint.checkpointer import CheckpointError
from openmoe.config import ConfigError
from openmoe.observe import notes
from openmoe.observe.metrics import MetricsWriter, read_records
from openmoe.observe.timeline import NAME as TIMELINE
from openmoe.observe.timeline import Timeline
from openmoe.running import lease as lease_lib
from openmoe.running.lease import Lease
from tests.checkpoint.case import DATA, abstract, checkpoints, make_state
from tests.checkpoint.test_faults import flip_a_bit, largest_file, mix_with_the_older, truncate
from tests.faults.bench import rows
from tests.test_notes import run as write_notes

CHECKPOINT, checkpoint = rows('checkpoint')
DISK, disk = rows('disk')
OLDER = 'the newest whole one is taken; the other is named, and kept aside'


def no_space(*arguments, **named):
  raise OSError(28, 'No space left on device')


# --- checkpoints


@checkpoint('an array file is cut off', OLDER)
def _(bench):
  truncate(bench.newest())
  bench.goes_on_from(10, 'checkpoint_20 is damaged')


@checkpoint('a bit has turned', OLDER)
def _(bench):
  flip_a_bit(bench.newest())
  bench.goes_on_from(10, 'another SHA-256')


@checkpoint('a file is missing', OLDER)
def _(bench):
  largest_file(bench.newest()).unlink()
  bench.goes_on_from(10, 'is missing')


@checkpoint('files of another step lie in it', OLDER)
def _(bench):
  mix_with_the_older(bench.newest())
  bench.goes_on_from(10, 'checkpoint_20 is damaged')


@checkpoint('a directory is empty', OLDER)
def _(bench):
  newest = bench.newest()
  shutil.rmtree(newest)
  newest.mkdir()
  bench.goes_on_from(10, 'never finished')


@checkpoint('the manifest is missing', OLDER)
def _(bench):
  (bench.newest() / manifest.NAME).unlink()
  bench.goes_on_from(10, 'never finished')


@checkpoint('the manifest is no JSON', OLDER)
def _(bench):
  (bench.newest() / manifest.NAME).write_text('{"files": ')
  bench.goes_on_from(10, 'unreadable manifest.json')


@checkpoint('the manifest is of another step', OLDER)
def _(bench):
  newest = bench.newest()
  shutil.copy(bench.run / 'checkpoint_10' / manifest.NAME, newest / manifest.NAME)
  bench.goes_on_from(10, 'of step 10')


@checkpoint('the metadata are no JSON', OLDER)
def _(bench):
  (bench.newest() / 'metadata' / 'metadata').write_text('{')
  bench.goes_on_from(10, 'checkpoint_20 is damaged')


@checkpoint('a data position is cut off', OLDER)
def _(bench):
  path = next((bench.newest() / 'data').glob('shard_0*'))
  path.write_bytes(path.read_bytes()[:3])
  bench.goes_on_from(10, 'checkpoint_20 is damaged')


@checkpoint('a named pipe lies where a file belongs', OLDER)
def _(bench):
  path = largest_file(bench.newest())
  path.unlink()
  os.mkfifo(path)
  bench.goes_on_from(10, 'checkpoint_20 is damaged')


@checkpoint('the disk cannot read a file', OLDER)
def _(bench):
  bad, read = largest_file(bench.newest()), manifest.open_regular

  def fails(path):
    if str(path) == str(bad):
      raise OSError(5, 'Input/output error')
    return read(path)

  bench.patch.setattr(manifest, 'open_regular', fails)
  bench.goes_on_from(10, 'Input/output error')


@checkpoint('files are cut off after they were checked', 'told as damage, not as a traceback')
def _(bench):
  bench.save(10)
  checkpointer = bench.open()
  assert checkpointer.latest_step() == 10
  for path in (bench.run / 'checkpoint_10' / 'params').rglob('*'):
    if path.is_file():
      os.truncate(path, path.stat().st_size // 2)
  with pytest.raises(CheckpointError, match='checkpoint_10 is damaged'):
    checkpointer.restore(10, abstract(make_state()))


@checkpoint('a kill has left half a save', 'removed at the next start, the older one is whole')
def _(bench):
  bench.save(10)
  half = bench.run / 'checkpoint_20.orbax-checkpoint-tmp'
  shutil.copytree(bench.run / 'checkpoint_10', half)
  (half / manifest.NAME).unlink()
  assert bench.open().latest_step() == 10
  assert checkpoints(bench.run) == ['checkpoint_10']


@checkpoint('none is whole', 'exit code 65, and no new beginning in silence')
def _(bench):
  truncate(bench.newest())
  truncate(bench.run / 'checkpoint_10')
  with pytest.raises(CheckpointError, match=r'No checkpoint .* is whole') as error:
    bench.open().latest_step()
  assert error.value.exit_code == 65


@checkpoint('it is of another model', 'refused with the field, exit code 64')
def _(bench):
  bench.save(10)
  other = {'name': 'openmoe_test', 'embed_dim': 32, 'moe': {'num_experts': 8, 'top_k': 2}}
  with pytest.raises(ConfigError, match='embed_dim') as error:
    bench.open(identity=other).restore(10, abstract(make_state()))
  assert error.value.exit_code == 64


# --- disks


def fails_only_that_save(bench, checkpointer, step=20):
  """After a failed save: it is told once, the older one stays, nothing is half there."""
  checkpointer.save(step, make_state(step), DATA, {})
  with pytest.raises(CheckpointError, match=f'checkpoint_{step} could not be written') as error:
    checkpointer.wait()
  assert error.value.exit_code == 64
  assert 'newest whole one is checkpoint_10, 10 steps back' in bench.notes[-1]
  assert checkpoints(bench.run) == ['checkpoint_10']


@disk('it is full while a checkpoint is committed', 'that save fails, is told, the next succeeds')
def _(bench):
  checkpointer = bench.save(10)
  with bench.patch.context() as patch:
    patch.setattr(manifest, 'write', no_space)
    fails_only_that_save(bench, checkpointer)
  checkpointer.save(30, make_state(30), DATA, {})
  checkpointer.wait()
  assert checkpoints(bench.run) == ['checkpoint_10', 'checkpoint_30']


@disk('it is full while digests are written', 'that save fails, is told, the next succeeds')
def _(bench):
  checkpointer = bench.save(10)
  with bench.patch.context() as patch:
    patch.setattr(manifest, 'describe_own', no_space)
    fails_only_that_save(bench, checkpointer)
  checkpointer.save(30, make_state(30), DATA, {})
  checkpointer.wait()


@disk('it stays full', 'each failure is louder and says how far back the newest whole one is')
def _(bench):
  checkpointer = bench.save(10)
  with bench.patch.context() as patch:
    patch.setattr(manifest, 'write', no_space)
    for step in (20, 30, 40):
      checkpointer.save(step, make_state(step), DATA, {})
    with pytest.raises(CheckpointError):
      checkpointer.wait()
  told = bench.notes[-3:]
  assert [text.split()[0] for text in told] == ['checkpoint_20', 'WARNING:', 'ALARM!:']
  assert 'checkpoint_10, 30 steps back' in told[2]


@disk('metrics cannot be written', 'told once, training goes on, and nothing is lost afterwards')
def _(bench):
  append = notes.Records._append
  with MetricsWriter(bench.run, 0, 9) as writer:
    with bench.patch.context() as patch:
      patch.setattr(notes.Records, '_append', no_space)
      writer.write(1, {'loss': 1.0})
      writer.write(2, {'loss': 1.0})
    assert notes.Records._append is append
    writer.write(3, {'loss': 1.0})
  assert [record['step'] for record in read_records(bench.run)] == [1, 2, 3]


@disk('the timeline cannot be written', 'told once, training goes on')
def _(bench):
  with bench.patch.context() as patch:
    patch.setattr(notes.Records, '_append', no_space)
    timeline = Timeline(bench.run, bench.notes.append)
    timeline.enter('step', 1)
    timeline.enter('save', 2)
  timeline.__exit__()
  assert len(bench.notes) == 1
  assert TIMELINE in bench.notes[0]
  assert 'training goes on' in bench.notes[0]


@disk('the lease is counted on a full disk', 'counting needs no room')
def _(bench):
  with Lease(bench.run, beat=0.05) as lease:
    bench.patch.setattr(lease_lib, 'write_whole', no_space)
    lease._write(lease._mine)
    lease.check()


@disk('a kill has cut the last line of metrics', 'that line goes, the run repeats the step')
def _(bench):
  write_notes(bench.run, 1, 3)
  with (bench.run / notes.RECORDS).open('ab') as file:
    file.write(b'{"step": 4, "ki')
  shown = write_notes(bench.run, 4, 5)
  assert 'damaged' not in shown
  assert [record['step'] for record in read_records(bench.run)] == [1, 2, 3, 4, 5]


@disk('metrics hold other bytes', 'kept aside, what can be read goes on')
def _(bench):
  write_notes(bench.run, 1, 3)
  with (bench.run / notes.RECORDS).open('ab') as file:
    file.write(b'\xff\x00\n')
  assert 'metrics.jsonl is damaged' in write_notes(bench.run, 4, 4)
  assert (bench.run / 'metrics.jsonl.damaged').exists()
  assert [record['step'] for record in read_records(bench.run)] == [1, 2, 3, 4]


@disk('router arrays hold other bytes', 'kept aside, the run goes on without them')
def _(bench):
  write_notes(bench.run, 1, 2)
  path = bench.run / 'router' / '000000000.npz'
  path.write_bytes(b'PK')
  assert '000000000.npz is damaged' in write_notes(bench.run, 3, 3)
  assert path.with_name('000000000.npz.damaged').exists()
