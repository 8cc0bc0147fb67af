"""What a checkpoint must survive: damaged files, kills, full and read-only disks."""

import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap

import absl.logging
import pytest

from openmoe.checkpoint import manifest
from openmoe.checkpoint.checkpointer import CheckpointError
from tests.checkpoint.case import (
  DATA,
  abstract,
  assert_equal,
  checkpoints,
  make_state,
)

ROOT = pathlib.Path(__file__).parents[2]


def largest_file(directory):
  """The file with most of the parameters."""
  files = (path for path in (directory / 'params').rglob('*') if path.is_file())
  return max(files, key=lambda path: path.stat().st_size)


def truncate(directory):
  os.truncate(largest_file(directory), largest_file(directory).stat().st_size // 2)


def flip_a_bit(directory):
  path = largest_file(directory)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def lose_a_file(directory):
  largest_file(directory).unlink()


def empty_the_manifest(directory):
  (directory / manifest.NAME).write_text('')


def never_finish(directory):
  (directory / manifest.NAME).unlink()


def lose_everything(directory):
  shutil.rmtree(directory)
  directory.mkdir()


def mix_with_the_older(directory):
  shutil.rmtree(directory / 'params')
  shutil.copytree(directory.parent / 'checkpoint_10' / 'params', directory / 'params')


DAMAGES = [
  truncate,
  flip_a_bit,
  lose_a_file,
  empty_the_manifest,
  never_finish,
  lose_everything,
  mix_with_the_older,
]


@pytest.mark.parametrize('damage', DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_newest_is_passed_over(open_dir, tmp_path, notes, damage):
  writer = open_dir()
  for step in (10, 20):
    writer.save(step, make_state(step, seed=step), DATA, {})
  writer.wait()
  damage(tmp_path / 'run/checkpoint_20')
  checkpointer = open_dir()
  assert checkpointer.latest_step() == 10
  assert len(notes) == 1
  assert 'checkpoint_20 ' in notes[0]
  assert 'Using checkpoint_10' in notes[0]
  restored, _, _ = checkpointer.restore(10, abstract(make_state()))
  assert_equal(restored, make_state(10, seed=10))
  with pytest.raises(CheckpointError, match='checkpoint_20'):
    checkpointer.restore(20, abstract(make_state()))
  # The run comes to step 20 again and saves it; the damaged one is kept aside.
  checkpointer.save(20, make_state(20, seed=21), DATA, {})
  checkpointer.wait()
  names = ['checkpoint_10', 'checkpoint_20', 'damaged_checkpoint_20']
  assert checkpoints(tmp_path / 'run') == names
  fresh = open_dir()
  assert fresh.latest_step() == 20
  assert_equal(fresh.restore(20, abstract(make_state()))[0], make_state(20, seed=21))


def test_a_disk_that_cannot_be_read_is_damage(open_dir, tmp_path, notes, monkeypatch):
  writer = open_dir()
  for step in (10, 20):
    writer.save(step, make_state(step), DATA, {})
  writer.wait()
  bad, read = largest_file(tmp_path / 'run/checkpoint_20'), manifest.open_regular

  def fails(path):
    if str(path) == str(bad):
      raise OSError(5, 'Input/output error')
    return read(path)

  monkeypatch.setattr(manifest, 'open_regular', fails)
  assert open_dir().latest_step() == 10
  assert 'checkpoint_20 is damaged' in notes[0]
  assert 'cannot be read' in notes[0]
  assert 'Input/output error' in notes[0]


def test_a_read_only_reader_leaves_damage_and_running_saves_alone(open_dir, tmp_path):
  writer = open_dir()
  for step in (10, 20):
    writer.save(step, make_state(step), DATA, {})
  writer.wait()
  truncate(tmp_path / 'run/checkpoint_20')
  running = tmp_path / 'run/checkpoint_30.orbax-checkpoint-tmp'
  running.mkdir()
  assert open_dir(read_only=True).latest_step() == 10
  assert running.exists()
  assert (tmp_path / 'run/checkpoint_20').exists()


def test_no_whole_checkpoint_does_not_start_anew_in_silence(open_dir, tmp_path):
  writer = open_dir()
  writer.save(10, make_state(10), DATA, {})
  writer.wait()
  truncate(tmp_path / 'run/checkpoint_10')
  with pytest.raises(CheckpointError, match=r'No checkpoint .* is whole: checkpoint_10 '):
    open_dir().latest_step()


# --- kills and disks


def test_a_kill_during_a_save_leaves_the_older_one(open_dir, tmp_path):
  run = tmp_path / 'run'
  code = textwrap.dedent(f"""
    import sys, time
    sys.path.insert(0, {str(ROOT)!r})
    from tests.checkpoint import case as t
    from openmoe.checkpoint import manifest
    from openmoe.checkpoint.checkpointer import Checkpointer
    c = Checkpointer({str(run)!r}, 3, t.IDENTITY)
    c.save(10, t.make_state(10, scale=64), t.DATA, {{}})
    c.wait()
    # The last moment before the new name: everything is written, nothing is renamed.
    manifest.write = lambda *a, **k: (print('writing', flush=True), time.sleep(60))
    c.save(20, t.make_state(20, scale=64), t.DATA, {{}})
    c.wait()
  """)
  env = {**os.environ, 'PYTHONPATH': str(ROOT)}
  process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, env=env)
  assert process.stdout.readline() == b'writing\n'
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stdout.close()
  assert checkpoints(run) == ['checkpoint_10', 'checkpoint_20.orbax-checkpoint-tmp']
  checkpointer = open_dir()
  assert checkpointer.latest_step() == 10
  state = make_state(20, scale=64)
  checkpointer.save(20, state, DATA, {})
  checkpointer.wait()
  assert checkpoints(run) == ['checkpoint_10', 'checkpoint_20']
  assert_equal(open_dir().restore(20, abstract(state))[0], state)


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 4 MB, which the two tests below fill or make read-only; needs root."""
  place = tmp_path / 'disk'
  place.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', place]
  try:
    if subprocess.run(mount, capture_output=True, check=False).returncode:
      pytest.skip('mounting a small file system is not permitted here')
  except FileNotFoundError:
    pytest.skip('there is no mount command here')
  yield place
  subprocess.run(['mount', '-o', 'remount,rw', place], check=True)
  subprocess.run(['umount', place], check=True)


def check_that_the_run_goes_on(checkpointer, place, notes, reason):
  """After a failed save of step 20: it is told, step 10 stays, and nothing is half there."""
  with pytest.raises(CheckpointError, match='checkpoint_20 could not be written') as error:
    checkpointer.wait()
  assert reason in str(error.value)
  assert 'newest whole one is checkpoint_10' in str(error.value)
  assert notes[-1].startswith('checkpoint_20 could not be written')
  checkpointer.wait()  # told once
  assert checkpointer.latest_step() == 10
  assert checkpoints(place) == ['checkpoint_10']


def test_a_full_disk_fails_that_save_only(open_dir, small_disk, notes):
  checkpointer = open_dir(small_disk)
  checkpointer.save(10, make_state(10), DATA, {})
  checkpointer.wait()
  ballast = small_disk / 'ballast'
  filled = subprocess.run(['dd', 'if=/dev/zero', f'of={ballast}'], capture_output=True, check=False)
  assert b'No space left' in filled.stderr
  checkpointer.save(20, make_state(20, scale=64), DATA, {})
  check_that_the_run_goes_on(checkpointer, small_disk, notes, 'No space left')
  ballast.unlink()
  checkpointer.save(20, make_state(20), DATA, {})
  checkpointer.wait()
  assert checkpointer.latest_step() == 20


def test_a_disk_that_fills_while_arrays_are_written(open_dir, small_disk, notes):
  checkpointer = open_dir(small_disk)
  checkpointer.save(10, make_state(10), DATA, {})
  checkpointer.wait()
  noise = make_state(20, scale=4096)  # 8 MB that do not compress: too large for the disk
  checkpointer.save(20, noise, DATA, {})
  check_that_the_run_goes_on(checkpointer, small_disk, notes, 'No space left')


def test_a_read_only_directory_fails_that_save_only(open_dir, small_disk, notes):
  checkpointer = open_dir(small_disk)
  checkpointer.save(10, make_state(10), DATA, {})
  checkpointer.wait()
  subprocess.run(['mount', '-o', 'remount,ro', small_disk], check=True)
  checkpointer.save(20, make_state(20), DATA, {})
  check_that_the_run_goes_on(checkpointer, small_disk, notes, 'Read-only file system')


def test_an_error_while_committing_fails_that_save_only(open_dir, tmp_path, notes, monkeypatch):
  checkpointer = open_dir()
  checkpointer.save(10, make_state(10), DATA, {})
  checkpointer.wait()

  def no_space(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(manifest, 'write', no_space)
    checkpointer.save(20, make_state(20), DATA, {})
    check_that_the_run_goes_on(checkpointer, tmp_path / 'run', notes, 'No space left')
  checkpointer.save(30, make_state(30), DATA, {})
  checkpointer.wait()
  assert checkpoints(tmp_path / 'run') == ['checkpoint_10', 'checkpoint_30']


def test_a_failure_that_is_followed_by_a_success_is_not_raised(open_dir, notes, monkeypatch):
  checkpointer = open_dir()
  with monkeypatch.context() as patch:
    patch.setattr(manifest, 'write', lambda *a, **k: (_ for _ in ()).throw(OSError(5, 'I/O error')))
    checkpointer.save(10, make_state(10), DATA, {})
    checkpointer.save(20, make_state(20), DATA, {})
    assert len(notes) == 1
    with pytest.raises(CheckpointError, match='checkpoint_20'):
      checkpointer.wait()
  checkpointer.save(30, make_state(30), DATA, {})
  checkpointer.wait()
  assert checkpointer.latest_step() == 30


def test_what_orbax_raises_is_told_once(open_dir, caplog):
  open_dir()
  told = absl.logging.get_absl_logger()
  with caplog.at_level(logging.ERROR, told.name):
    for where in ('/lib/orbax/checkpoint/manager.py', '/lib/other/manager.py'):
      error = (OSError, OSError('disk full'), None)
      told.handle(told.makeRecord('absl', logging.ERROR, where, 1, 'save failed', (), error))
  assert [record.pathname for record in caplog.records] == ['/lib/other/manager.py']
  caplog.clear()
  for where in ('/lib/orbax/checkpoint/path.py', '/lib/other/path.py'):
    try:
      exec(compile('raise OSError("disk full")', where, 'exec'))
    except OSError:
      logging.getLogger('asyncio').exception(where)  # as of a future that nobody waits for
  assert [record.message for record in caplog.records] == ['/lib/other/path.py']
