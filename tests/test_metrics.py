"""What a run writes down: each step once across resumes, readable after a kill, one array file."""

import io
import json

import jax
import numpy as np
import pytest

from openmoe.observe import metrics, notes
from openmoe.observe.metrics import MetricsWriter, dead_experts, read_records, read_router


class Terminal(io.StringIO):
  """A stream that says it is a terminal."""

  def isatty(self):
    return True


def load(step, layers=2, experts=4):
  share = np.random.default_rng(step).dirichlet(np.ones(experts), layers)
  return {'expert_load': share, 'dropped_fraction': np.full(layers, min(0.5, step / 1000))}


def write_steps(writer, first, last):
  for step in range(first, last + 1):
    writer.write_router(step, load(step))
    writer.write(step, {'loss': 10.0 / step, 'learning_rate': np.float32(0.01)})


@pytest.fixture
def out():
  return io.StringIO()


def test_a_resumed_run_has_every_step_once(tmp_path, out):
  with MetricsWriter(tmp_path, 0, 100, stream=out) as writer:
    write_steps(writer, 1, 27)
    writer.write(25, {'loss': 9.0}, kind='validation')
  # Killed at 27; the last checkpoint is of step 20.
  with MetricsWriter(tmp_path, 20, 100, stream=out) as writer:
    write_steps(writer, 21, 30)
    writer.write(25, {'loss': 8.0}, kind='validation')
  train = read_records(tmp_path, 'train')
  assert [r['step'] for r in train] == list(range(1, 31))
  assert [r['loss'] for r in train] == [10.0 / s for s in range(1, 31)]
  assert [(r['step'], r['loss']) for r in read_records(tmp_path, 'validation')] == [(25, 8.0)]
  router = read_router(tmp_path)
  assert router['steps'].tolist() == list(range(1, 31))
  np.testing.assert_allclose(router['expert_load'][-1], load(30)['expert_load'], rtol=1e-6)
  assert router['dropped_fraction'].shape == (30, 2)


def test_starting_anew_in_a_used_directory_drops_the_old_records(tmp_path, out):
  with MetricsWriter(tmp_path, 0, 100, stream=out) as writer:
    write_steps(writer, 1, 5)
  with MetricsWriter(tmp_path, 0, 100, stream=out) as writer:
    write_steps(writer, 1, 2)
  assert [r['step'] for r in read_records(tmp_path)] == [1, 2]
  assert read_router(tmp_path)['steps'].tolist() == [1, 2]


@pytest.mark.parametrize('cut', [1, 10, 40])
def test_a_half_written_last_line_is_repaired(tmp_path, out, cut):
  with MetricsWriter(tmp_path, 0, 100, stream=out) as writer:
    write_steps(writer, 1, 3)
  path = tmp_path / notes.RECORDS
  path.write_bytes(path.read_bytes()[:-cut])
  assert [r['step'] for r in read_records(tmp_path)] == ([1, 2, 3] if cut == 1 else [1, 2])
  with MetricsWriter(tmp_path, 2, 100, stream=out) as writer:
    write_steps(writer, 3, 4)
  lines = path.read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines] == [1, 2, 3, 4]


def test_a_step_is_not_written_twice(tmp_path, out):
  with MetricsWriter(tmp_path, 0, 100, stream=out) as writer:
    writer.write(5, {'loss': 1.0}, kind='validation')
  with MetricsWriter(tmp_path, 5, 100, stream=out) as writer:
    writer.write(5, {'loss': 2.0}, kind='validation')
  assert [r['loss'] for r in read_records(tmp_path)] == [1.0]


def test_values_that_are_not_finite_survive_as_strict_json(tmp_path, out):
  values = {'loss': float('nan'), 'grad_norm': float('inf'), 'z': float('-inf')}
  with MetricsWriter(tmp_path, 0, 100, stream=out) as writer:
    writer.write(1, values)

  def refuse(name):
    raise AssertionError(f'{name} is not strict JSON')

  json.loads((tmp_path / notes.RECORDS).read_text(), parse_constant=refuse)
  (record,) = read_records(tmp_path)
  np.testing.assert_equal({k: record[k] for k in values}, values)


def test_router_files_span_fixed_steps(tmp_path, out, monkeypatch):
  monkeypatch.setattr(notes, 'ROUTER_SPAN', 10)
  with MetricsWriter(tmp_path, 0, 100, stream=out, sparse_layers=(3, 7)) as writer:
    write_steps(writer, 1, 25)
  names = sorted(p.name for p in (tmp_path / 'router').iterdir())
  assert names == ['000000000.npz', '000000010.npz', '000000020.npz']
  with MetricsWriter(tmp_path, 15, 100, stream=out, sparse_layers=(3, 7)) as writer:
    assert sorted(p.name for p in (tmp_path / 'router').iterdir()) == names[:2]
    write_steps(writer, 16, 17)
  router = read_router(tmp_path)
  assert router['steps'].tolist() == list(range(1, 18))
  assert router['layers'][0].tolist() == [3, 7]


def test_router_arrays_of_other_names_are_refused(tmp_path, out):
  with MetricsWriter(tmp_path, 0, 100, stream=out) as writer:
    writer.write_router(1, load(1))
    with pytest.raises(ValueError, match='another MODEL_DIR'):
      writer.write_router(2, load(2) | {'router_confidence': np.ones(2)})


def test_nothing_in_a_run_directory_is_executed(tmp_path):
  (tmp_path / 'router').mkdir()
  np.savez(tmp_path / 'router' / '000000000.npz', steps=np.array([{'a': 1}], dtype=object))
  with pytest.raises(ValueError, match='allow_pickle'):
    read_router(tmp_path)


def test_throughput_leaves_pauses_out(tmp_path, out, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: now[0])
  with MetricsWriter(
    tmp_path, 0, 40, tokens_before=lambda s: 1000 * s, flops_before=lambda s: 1e6 * s, stream=out
  ) as writer:
    now[0] += 5
    writer.write(10, {'loss': 1.0})
    with writer.paused():
      now[0] += 60
    now[0] += 5
    writer.write(20, {'loss': 1.0})
  first, second = read_records(tmp_path)
  for record in (first, second):
    assert record['steps_per_second'] == pytest.approx(2.0)
    assert record['tokens_per_second'] == pytest.approx(2000)
    assert record['model_flops_per_second'] == pytest.approx(2e6)
    assert 'mfu' not in record  # of a CPU no peak is known
  assert second['tokens_seen'] == 20000
  assert out.getvalue().splitlines()[-1].endswith('ETA     10s')


def test_mfu_counts_all_devices(tmp_path, out, monkeypatch):
  monkeypatch.setattr(metrics, 'peak_flops', lambda kind: 1e6)
  now = [0.0]
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: now[0])
  with MetricsWriter(tmp_path, 0, 40, flops_before=lambda s: 4e6 * s, stream=out) as writer:
    now[0] = 1.0
    writer.write(1, {'loss': 1.0})
  assert read_records(tmp_path)[0]['mfu'] == pytest.approx(4 / jax.device_count())
  assert 'MFU 50.0%' in out.getvalue()


def test_the_display_shows_dead_experts(tmp_path, out):
  arrays = {
    'expert_load': np.array([[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]),
    'dropped_fraction': np.array([0.1, 0.3]),
  }
  with MetricsWriter(tmp_path, 0, 100, stream=out) as writer:
    writer.write_router(1, arrays)
    writer.write(1, {'loss': 1.0})
  assert 'dead   2/8' in out.getvalue()


def test_every_record_says_how_many_tokens_were_seen(tmp_path):
  """The last line of the file may be of a save that ended late."""
  tokens = {'tokens_before': lambda step: 10 * step, 'stream': io.StringIO()}
  with MetricsWriter(tmp_path, 0, 100, **tokens) as writer:
    for kind in ('train', 'validation', 'checkpoint'):
      writer.write(3, {'loss': 1.0}, kind)
  assert [(r['kind'], r['tokens_seen']) for r in read_records(tmp_path)] == [
    ('train', 30.0),
    ('validation', 30.0),
    ('checkpoint', 30.0),
  ]


def test_what_is_written_is_returned(tmp_path, out):
  with MetricsWriter(tmp_path, 0, 100, tokens_before=lambda s: 10 * s, stream=out) as writer:
    record = writer.write(1, {'loss': 1.0})
    assert writer.write(1, {'loss': 2.0}) == {'step': 1, 'kind': 'train', 'loss': 2.0}
  assert [record] == read_records(tmp_path)
  assert record['tokens_seen'] == 10.0


def test_an_expert_is_dead_below_a_hundredth_of_its_share():
  just_over, just_under = 0.0101 / 4, 0.0099 / 4
  share = np.array([just_over, just_under, 0.5, 0.5 - just_over - just_under])
  assert dead_experts(share).tolist() == [False, True, False, False]


def test_events_are_written(tmp_path, out):
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  with MetricsWriter(tmp_path, 0, 100, stream=out) as writer:
    write_steps(writer, 1, 3)
    writer.write(3, {'loss': 4.0}, kind='validation')
  events = EventAccumulator(str(tmp_path / 'tensorboard/train'))
  events.Reload()
  assert 'loss' in events.Tags()['tensors']
  assert [e.step for e in events.Tensors('loss')] == [1, 2, 3]
  assert any((tmp_path / 'tensorboard/validation').iterdir())


def test_other_processes_write_nothing(tmp_path, out, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  with MetricsWriter(tmp_path / 'run', 0, 100, stream=out) as writer:
    write_steps(writer, 1, 2)
    writer.note('hello')
    writer.flush()
    with writer.paused():
      pass
  assert not (tmp_path / 'run').exists()
  assert out.getvalue() == ''


def test_lines_when_piped(tmp_path, out):
  with MetricsWriter(tmp_path, 0, 10000, tokens_before=lambda s: 10 * s, stream=out) as writer:
    writer.note('started')
    writer.write(1, {'loss': 11.25})
    write_steps(writer, 9999, 9999)
    writer.write(9999, {'loss': 2.5, 'unigram_entropy': 6.0}, kind='validation')
  lines = out.getvalue().splitlines()
  assert lines[0] == 'started'
  assert lines[1].startswith('step     1/10000  loss  11.2500  lr ')
  assert lines[2].startswith('step  9999/10000  loss   0.0010  lr 1.00e-02')
  assert len(lines[1]) == len(lines[2])
  assert lines[3] == 'validation at step 9999:  loss 2.5000  unigram_entropy 6.0000'


def test_a_live_display_on_a_terminal(tmp_path, monkeypatch):
  monkeypatch.setenv('TERM', 'xterm-256color')
  monkeypatch.setenv('COLUMNS', '100')
  terminal = Terminal()
  with MetricsWriter(tmp_path, 0, 100, stream=terminal, sparse_layers=(3, 7)) as writer:
    write_steps(writer, 1, 5)
    writer.note('a note')
    writer.write(5, {'loss': 4.0}, kind='validation')
  shown = terminal.getvalue()
  assert '\x1b[' in shown
  for text in ('step 5/100', 'layer 3', 'layer 7', 'dead experts', 'a note', '4.0000 at 5'):
    assert text in shown
  assert shown.endswith('\x1b[?25h')  # the cursor is given back


def test_a_dumb_terminal_gets_lines(tmp_path, monkeypatch):
  monkeypatch.setenv('TERM', 'dumb')
  terminal = Terminal()
  with MetricsWriter(tmp_path, 0, 100, stream=terminal) as writer:
    write_steps(writer, 1, 2)
  assert '\x1b' not in terminal.getvalue()
