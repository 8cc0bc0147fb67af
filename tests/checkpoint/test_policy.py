"""Which checkpoints are kept, when a run saves beside its period, and how failures are told."""

import http.server
import math
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest

from openmoe.checkpoint import manifest
from openmoe.checkpoint.checkpointer import Checkpointer, CheckpointError
from openmoe.checkpoint.policy import Keep
from openmoe.config import ConfigError
from openmoe.running import notice
from openmoe.running.notice import Notice
from openmoe.running.signals import Signals
from tests.checkpoint.case import DATA, IDENTITY, abstract, checkpoints, make_state

LOSSES = {10: 3.0, 20: 1.0, 30: 2.0, 50: 2.5}


@pytest.mark.parametrize(
  ('keep', 'left'),
  [
    (Keep(1), [60]),
    (Keep(2), [50, 60]),
    (Keep(1, every=20), [20, 40, 60]),
    (Keep(1, best=1), [20, 60]),
    (Keep(1, best=2), [20, 30, 60]),
    (Keep(1, every=30, best=1), [20, 30, 60]),
  ],
)
def test_what_is_kept(tmp_path, keep, left):
  """The best count also over a restart, which reads what the checkpoints say of themselves."""
  for steps in ((10, 20, 30), (40, 50, 60)):
    with Checkpointer(tmp_path, keep, IDENTITY) as checkpointer:
      checkpointer.latest_step()
      for step in steps:
        validation = {'validation': {'loss': LOSSES[step]}} if step in LOSSES else {}
        checkpointer.save(step, make_state(step), DATA, validation)
      checkpointer.wait()
  assert checkpoints(tmp_path) == sorted(f'checkpoint_{step}' for step in left)


def test_a_loss_that_is_no_number_is_none_of_the_best():
  losses = {10: float('nan'), 20: 5.0, 30: float('inf')}
  assert Keep(1, best=2).wanted([10, 20, 30, 40], losses, set()) == {20, 40}


def test_of_other_figures_the_highest_are_the_best():
  metadata = {'validation': {'loss': 1.0, 'boolq/acc': 0.7}}
  assert Keep(1, by='boolq/acc').loss_of(metadata) == -0.7
  assert Keep(1).loss_of(metadata) == 1.0
  assert math.isnan(Keep(1, by='mmlu/acc').loss_of(metadata))


@pytest.mark.parametrize('wrong', [{'newest': 0}, {'newest': 1, 'every': 0}])
def test_wrong_numbers_are_refused(wrong):
  with pytest.raises(ConfigError, match='must be at least 1'):
    Keep(**wrong)


def test_failures_are_told_louder_and_how_far_back_the_newest_is(open_dir, notes, monkeypatch):
  checkpointer = open_dir()
  checkpointer.save(10, make_state(10), DATA, {})
  checkpointer.wait()

  def no_space(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(manifest, 'write', no_space)
    for step in (20, 30, 40):
      checkpointer.save(step, make_state(step), DATA, {})
    with pytest.raises(CheckpointError):
      checkpointer.wait()
  assert [note.split()[0] for note in notes] == ['checkpoint_20', 'WARNING:', 'ALARM!:']
  assert '3 saves in a row have failed, for 0 minutes. checkpoint_40' in notes[2]
  assert [f'checkpoint_10, {n} steps back' in notes[i] for i, n in enumerate((10, 20, 30))]
  checkpointer.save(50, make_state(50), DATA, {})
  checkpointer.wait()
  with monkeypatch.context() as patch:
    patch.setattr(manifest, 'write', no_space)
    checkpointer.save(60, make_state(60), DATA, {})
    with pytest.raises(CheckpointError):
      checkpointer.wait()
  assert notes[3].startswith('checkpoint_60 could not')
  assert 'checkpoint_50, 10 steps back' in notes[3]


def test_a_read_that_fails_after_the_check_is_damage(open_dir, tmp_path):
  writer = open_dir()
  writer.save(10, make_state(10), DATA, {})
  writer.wait()
  checkpointer = open_dir()
  assert checkpointer.latest_step() == 10
  files = [p for p in (tmp_path / 'run/checkpoint_10/params').rglob('*') if p.is_file()]
  for path in files:
    os.truncate(path, path.stat().st_size // 2)
  with pytest.raises(CheckpointError, match='checkpoint_10 is damaged'):
    checkpointer.restore(10, abstract(make_state()))


# --- saves beside the period


@pytest.fixture
def mesh():
  return jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))


def test_a_signal_asks_for_a_save_and_the_run_goes_on(mesh):
  said = []
  with Signals(mesh, note=said.append) as signals:
    assert (signals.stop_after_step(), signals.save) == (False, False)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert (signals.stop_after_step(), signals.save) == (False, True)
    assert (signals.stop_after_step(), signals.save) == (False, False)
    os.kill(os.getpid(), signal.SIGTERM)
    assert (signals.stop_after_step(), signals.save) == (True, False)
  assert said == ['SIGUSR1 asks for a save: saving after this step; training goes on.']


def test_minutes_ask_for_a_save(mesh, monkeypatch):
  now = [0.0]
  monkeypatch.setattr('openmoe.running.signals.time.monotonic', lambda: now[0])
  granted = []
  with Signals(mesh, minutes=0.5) as signals:
    for _ in range(10):
      now[0] += 12.0
      assert not signals.stop_after_step()
      granted.append(signals.save)
  assert np.flatnonzero(granted).tolist() == [2, 5, 8]


class Metadata(http.server.BaseHTTPRequestHandler):
  """A metadata server of which the machine is preempted as soon as `said` says so."""

  said = 'FALSE'

  def do_GET(self):
    known = {'preempted': Metadata.said, 'maintenance-event': 'NONE'}
    name = self.path.rsplit('/', 1)[1]
    assert self.headers['Metadata-Flavor'] == 'Google'
    self.send_response(200)
    self.end_headers()
    self.wfile.write(known[name].encode())

  def log_message(self, *arguments):
    """Keeps quiet."""


def test_the_metadata_server_is_listened_to(mesh, monkeypatch):
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Metadata)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  monkeypatch.setenv('GCE_METADATA_HOST', f'127.0.0.1:{server.server_port}')
  monkeypatch.setattr(Metadata, 'said', 'FALSE')
  heard = []
  with Notice(heard.append, period=0.02):
    time.sleep(0.2)
    assert not heard
    monkeypatch.setattr(Metadata, 'said', 'TRUE')
    deadline = time.monotonic() + 20
    while not heard and time.monotonic() < deadline:
      time.sleep(0.02)
    time.sleep(0.1)
  server.shutdown()
  server.server_close()
  assert heard == ['the metadata server announces preempted TRUE']


def test_elsewhere_nobody_is_asked(monkeypatch, tmp_path):
  monkeypatch.delenv('GCE_METADATA_HOST', raising=False)
  monkeypatch.setattr(notice, '_PRODUCT', tmp_path / 'product_name')
  assert notice.metadata_server() is None
  (tmp_path / 'product_name').write_text('Google Compute Engine\n')
  assert notice.metadata_server() == 'metadata.google.internal'
