"""Notes beside a run never stop it: damaged ones are kept aside, full disks and pipes are borne."""

import io
import json

import numpy as np
import pytest

from openmoe.observe import notes
from openmoe.observe.display import Sheltered, make_display
from openmoe.observe.metrics import MetricsWriter, read_records, read_router
from openmoe.observe.record import write_run_record

LOAD = {'expert_load': np.full((2, 4), 0.25), 'dropped_fraction': np.zeros(2)}


def run(folder, first, last):
  """Writes some steps as a run that begins at `first`; what was shown."""
  out = io.StringIO()
  with MetricsWriter(folder, first - 1, 100, stream=out) as writer:
    for step in range(first, last + 1):
      writer.write_router(step, LOAD)
      writer.write(step, {'loss': 1.0})
  return out.getvalue()


DAMAGES = [b'\xff\xfe{"step":', b'\x00\x01\n', b'{"step": "x"}\n', b'[' * 9000]


@pytest.mark.parametrize('damage', DAMAGES, ids=('bytes', 'controls', 'type', 'depth'))
def test_damaged_records_are_kept_aside(tmp_path, damage):
  run(tmp_path, 1, 3)
  path = tmp_path / notes.RECORDS
  first, second, _ = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(first + damage + second + damage)
  before = path.read_bytes()
  shown = run(tmp_path, 2, 4)
  assert 'metrics.jsonl is damaged' in shown
  assert (tmp_path / 'metrics.jsonl.damaged').read_bytes() == before
  assert [r['step'] for r in read_records(tmp_path)] == [1, 2, 3, 4]
  for line in path.read_text().splitlines():
    json.loads(line)


def test_a_folder_in_place_of_records_is_kept_aside(tmp_path):
  (tmp_path / notes.RECORDS).mkdir()
  assert 'metrics.jsonl is damaged' in run(tmp_path, 1, 2)
  assert [r['step'] for r in read_records(tmp_path)] == [1, 2]


@pytest.mark.parametrize('content', [b'', b'PK\x03\x04 not a zip', b'\x93NUMPY'])
def test_damaged_router_arrays_are_kept_aside(tmp_path, content):
  run(tmp_path, 1, 2)
  path = tmp_path / 'router' / '000000000.npz'
  path.write_bytes(content)
  shown = run(tmp_path, 3, 4)
  assert '000000000.npz is damaged' in shown
  assert path.with_name('000000000.npz.damaged').read_bytes() == content
  assert read_router(tmp_path)['steps'].tolist() == [3, 4]


def test_damaged_starts_and_configurations_are_kept_aside(tmp_path):
  (tmp_path / 'run.json').write_bytes(b'')
  (tmp_path / 'config.gin').write_bytes(b'\xff\xfe\0')
  said = []
  write_run_record(tmp_path, 'a = 1\n', 7, note=said.append)
  assert len(said) == 1
  assert 'run.json is damaged' in said[0]
  assert (tmp_path / 'config_until_7.gin').read_bytes() == b'\xff\xfe\0'
  assert json.loads((tmp_path / 'run.json').read_text())[0]['start_step'] == 7


def test_a_full_disk_is_told_once_and_nothing_is_lost(tmp_path, monkeypatch):
  out = io.StringIO()

  def full(*arguments, **named):
    raise OSError(28, 'No space left on device')

  with MetricsWriter(tmp_path, 0, 100, stream=out) as writer:
    writer.write(1, {'loss': 1.0})
    with monkeypatch.context() as patch:
      patch.setattr(notes.Records, '_append', full)
      patch.setattr(notes, 'write_whole', full)
      for step in (2, 3):
        writer.write_router(step, LOAD)
        writer.write(step, {'loss': 1.0})
      writer.flush()
    writer.write_router(4, LOAD)
    writer.write(4, {'loss': 1.0})
  shown = out.getvalue()
  assert shown.count('metrics.jsonl cannot be written') == 1
  assert shown.count('router cannot be written') == 1
  assert shown.count('metrics.jsonl can be written again') == 1
  assert [r['step'] for r in read_records(tmp_path)] == [1, 2, 3, 4]
  assert read_router(tmp_path)['steps'].tolist() == [2, 3, 4]


def test_a_short_write_leaves_no_half_line(tmp_path, monkeypatch):
  records = notes.Records(tmp_path, 0, print)
  records.append({'step': 1, 'kind': 'train'})
  whole = (tmp_path / notes.RECORDS).read_bytes()

  class Full(io.FileIO):
    def write(self, content):
      if len(content) < 5:
        raise OSError(28, 'No space left on device')
      return super().write(content[:-4])

  monkeypatch.setattr(notes, 'open', lambda path, mode, **_: Full(path, mode), raising=False)
  with pytest.raises(OSError, match='No space'):
    records.append({'step': 2, 'kind': 'train'})
  assert (tmp_path / notes.RECORDS).read_bytes() == whole
  monkeypatch.undo()
  records.append({'step': 3, 'kind': 'train'})
  assert [r['step'] for r in read_records(tmp_path)] == [1, 2, 3]


# --- what people see


class Gone(io.StringIO):
  def write(self, text):
    raise BrokenPipeError(32, 'Broken pipe')

  def isatty(self):
    return True


@pytest.mark.parametrize('stream', [Gone(), None])
def test_a_display_outlives_its_reader(stream):
  display = make_display(Sheltered(stream))
  display.note('one')
  display.note('two')
  display.close()


def test_what_an_encoding_lacks_is_replaced():
  raw = io.BytesIO()
  stream = Sheltered(io.TextIOWrapper(raw, encoding='ascii', write_through=True))
  stream.write('loss ▁▂█ and é\n')
  assert raw.getvalue() == b'loss ??? and ?\n'
