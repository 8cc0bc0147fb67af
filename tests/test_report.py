"""The pictures of a run and the record of how it was started."""

import io
import json
import subprocess

import numpy as np
import pytest
from matplotlib.image import imread

from openmoe.observe import record as run_record
from openmoe.observe.metrics import MetricsWriter, read_router
from openmoe.observe.pictures import experts_figure, plot_run, smooth


def write_run(model_dir, steps, experts=8, layers=2, tokens=64):
  rng = np.random.default_rng(0)
  with MetricsWriter(
    model_dir,
    0,
    steps,
    tokens_before=lambda s: tokens * s,
    sparse_layers=(1, 3)[:layers],
    stream=io.StringIO(),
  ) as writer:
    for step in range(1, steps + 1):
      if layers:
        share = rng.dirichlet(np.full(experts, 5.0), layers)
        share[0, 2] = 0.0
        writer.write_router(step, {'expert_load': share, 'dropped_fraction': np.full(layers, 0.2)})
      writer.write(step, {'loss': 8.0 / step, 'learning_rate': 0.01})
      if step % 2 == 0:
        writer.write(step, {'loss': 9.0 / step, 'unigram_entropy': 5.0}, kind='validation')


@pytest.mark.parametrize('steps', [1, 2, 50])
def test_draws_loss_and_experts(tmp_path, steps):
  write_run(tmp_path, steps)
  paths = plot_run(tmp_path)
  assert [p.rsplit('/', 1)[1] for p in paths] == ['loss.png', 'experts.png']
  for path in paths:
    picture = imread(path)
    assert min(picture.shape[:2]) > 600
    assert picture[..., :3].std() > 0.02  # not blank


def test_a_dense_run_has_no_experts(tmp_path):
  write_run(tmp_path, 3, layers=0)
  assert [p.rsplit('/', 1)[1] for p in plot_run(tmp_path)] == ['loss.png']


def test_an_empty_run_draws_nothing(tmp_path):
  assert plot_run(tmp_path) == []


def test_a_diverged_run_can_be_drawn(tmp_path):
  with MetricsWriter(tmp_path, 0, 9, stream=io.StringIO()) as writer:
    writer.write(1, {'loss': 3.0, 'learning_rate': 0.01})
    writer.write(2, {'loss': float('nan'), 'learning_rate': 0.01})
  assert len(plot_run(tmp_path)) == 1


def test_one_panel_a_layer_with_the_dead_in_black(tmp_path):
  write_run(tmp_path, 20)
  figure = experts_figure(read_router(tmp_path))
  titles = [axes.get_title(loc='left') for axes in figure.axes]
  assert titles[:2] == ['layer 1', 'layer 3']
  first, second = (axes.collections[0] for axes in figure.axes[:2])
  assert first.get_array().mask[2].all()
  assert not np.ma.getmaskarray(second.get_array())[2].any()
  assert first.norm(1.0) == pytest.approx(0.5)  # the uniform share is the middle of the scale


def test_saturation_between_checkpoints_has_a_panel(tmp_path):
  write_run(tmp_path, 20)
  before = len(experts_figure(read_router(tmp_path)).axes)
  saved = np.array([[10, 0.5], [20, 0.75]])
  figure = experts_figure(read_router(tmp_path), saved)
  assert len(figure.axes) == before + 1
  panel = next(a for a in figure.axes if a.get_title(loc='left').startswith('saturation'))
  assert panel.get_title(loc='left').endswith(' 75.0%')
  np.testing.assert_array_equal(panel.lines[0].get_xydata(), saved)


def test_smoothing_keeps_a_constant_and_the_length():
  np.testing.assert_allclose(smooth(np.full(9, 3.0), 5), 3.0)
  np.testing.assert_allclose(smooth(np.arange(5.0), 3), [0.5, 1, 2, 3, 3.5])


def test_a_run_is_written_down(tmp_path):
  record = run_record.write_run_record(tmp_path, 'TRAIN_STEPS = 5\n')
  assert (tmp_path / 'config.gin').read_text() == 'TRAIN_STEPS = 5\n'
  (start,) = json.loads((tmp_path / 'run.json').read_text())
  assert start == record
  assert start['start_step'] == 0
  assert start['packages']['jax']
  assert start['devices']['count'] == 8
  assert 'python' in start['command']


def test_a_resumed_run_adds_a_start_and_keeps_the_former_config(tmp_path):
  run_record.write_run_record(tmp_path, 'TRAIN_STEPS = 5\n')
  run_record.write_run_record(tmp_path, 'TRAIN_STEPS = 5\n', start_step=3)
  assert not (tmp_path / 'config_until_3.gin').exists()
  run_record.write_run_record(tmp_path, 'TRAIN_STEPS = 9\n', start_step=5)
  assert (tmp_path / 'config_until_5.gin').read_text() == 'TRAIN_STEPS = 5\n'
  assert (tmp_path / 'config.gin').read_text() == 'TRAIN_STEPS = 9\n'
  starts = json.loads((tmp_path / 'run.json').read_text())
  assert [s['start_step'] for s in starts] == [0, 3, 5]


def test_outside_a_checkout_there_is_no_commit(monkeypatch):
  def fail(*args, **kwargs):
    raise subprocess.CalledProcessError(128, 'git')

  monkeypatch.setattr(run_record.subprocess, 'run', fail)
  assert run_record.git_commit() is None
