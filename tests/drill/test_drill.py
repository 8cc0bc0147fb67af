"""The drill: twins that are the same in kind, moments that come, a comparison that sees a bit."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import pytest
from absl import flags

from openmoe import plan
from openmoe.checkpoint.checkpointer import Checkpointer
from openmoe.checkpoint.description import identity
from openmoe.config import ConfigError, MeshConfig
from openmoe.drill import compare, control, twin
from openmoe.drill.moments import EARLY, LATER, Moment, Watcher, draw, durations
from openmoe.drill.starts import Failed, Shape, Starts
from openmoe.models import build_model
from openmoe.observe.notes import encode
from openmoe.optimizer import learning_rate, make_optimizer
from openmoe.programme import Programme, Stage, as_programme
from openmoe.train_step import abstract_state, init_state
from tests.run_case import ROOT, arguments, corpus

RUNS = {
  'openmoe_8b': ('openmoe_8b', 'openmoe_8b'),
  'openmoe_34b': ('openmoe_34b', 'openmoe_34b'),
  'openllama_base': ('openllama_base', 'openllama_base'),
  'openmoe_tiny': ('openmoe_tiny', 'demo'),
  'jetmoe_tiny': ('jetmoe_tiny', 'demo', 'demo_phases'),
}


# --- the twin


@pytest.mark.parametrize('name', RUNS)
def test_a_twin_is_the_run_in_small(name, monkeypatch):
  from scripts import configuration  # defines flags

  model, *overlays = RUNS[name]
  files = [f'gin/models/{model}.gin', 'gin/runs/pretrain.gin']
  files += [f'gin/experiments/{overlay}.gin' for overlay in overlays]
  given = [f'--gin_file={ROOT}/{file}' for file in files]
  argv = ['x', *given, "--gin_bindings=MODEL_DIR='runs/x'", '--gin_bindings=EVAL_PERIOD=100']
  flags.FLAGS.unparse_flags()
  flags.FLAGS(argv)
  monkeypatch.setenv('OPENMOE_VOCABULARY', 'unused')
  whole = configuration.configure(tiny=False)
  small = twin.tiny(whole, 24)
  mesh = twin.fitting(whole['mesh'], 8)
  a, b = whole['model'], small['model']
  assert (a.architecture, a.sparse_period, a.dtype) == (b.architecture, b.sparse_period, b.dtype)
  if a.moe:
    assert (
      dataclasses.replace(b.moe, num_experts=a.moe.num_experts, group_size=a.moe.group_size)
      == a.moe
    )
  assert plan.count_params(plan.abstract_params(b)[0]) < 64 * b.vocab_size + 10**6
  before = as_programme(whole['data'], whole['run'].total_steps)
  after = as_programme(small['data'], small['run'].total_steps)
  names = lambda p: [(s.name, s.data.mixture_or_task_name, s.data.seed) for s in p.stages]
  assert names(before) == names(after)
  assert small['run'].total_steps == after.total_steps == 24
  assert small['run'].record_batches
  assert (mesh.num_expert_partitions > 1) == (whole['mesh'].num_expert_partitions > 1)
  assert (mesh.num_model_partitions > 1) == (whole['mesh'].num_model_partitions > 1)
  plan.check(
    small['run'], b, small['optimizer'], after, small['eval_data'],
    plan.abstract_mesh(mesh, 8), mesh.fsdp,
  )  # fmt: skip
  rate = lambda given, programme: float(
    plan.learning_rate(given['optimizer'], programme.total_steps)(programme.total_steps // 2)
  )
  assert 0.5 < rate(small, after) / rate(whole, before) < 2


def test_batches_of_a_twin_do_not_depend_on_its_mesh():
  given = arguments('nowhere', None)
  twins = [twin.tiny(given | {'mesh': MeshConfig(e, m)}) for e, m in ((4, 1), (2, 2), (1, 1))]
  for one in twins[1:]:
    assert (one['data'], one['model'], one['run']) == tuple(
      twins[0][name] for name in ('data', 'model', 'run')
    )


# --- the moments

TIMELINE = [
  ('start', 0, 0.0), ('setup', 0, 0.0), ('data', 0, 0.5), ('restore', 0, 2.5), ('data', 0, 3.0),
  ('step', 0, 3.5), ('compile', 0, 3.6), ('step', 0, 6.6), ('save', 3, 7.0), ('step', 3, 7.2),
  ('commit', 3, 7.6), ('evaluation', 4, 8.0), ('step', 4, 9.0),
]  # fmt: skip


def write_timeline(run: pathlib.Path, lines, mode='w'):
  run.mkdir(exist_ok=True)
  with (run / 'timeline.jsonl').open(mode) as file:
    for kind, step, time in lines:
      more = {'seconds': 1.5} if kind == 'start' else {}
      file.write(encode({'step': step, 'kind': kind, 'time': time} | more))


def test_every_phase_is_drawn_before_any_comes_twice():
  data = arguments('nowhere', None)['data']
  stages = Programme(tuple(Stage(n, 12 * 8 * 32, data) for n in 'ab'))
  drawn = draw(10, stages, 24, {'step': 0.1}, eval_period=8, seed=3)
  assert sorted(m.phase for m in drawn) == sorted((*EARLY, *LATER))
  assert [m.step for m in drawn] == sorted(m.step for m in drawn)
  assert {m.step for m in drawn if m.phase == 'switch'} == {12}
  assert {m.step for m in drawn if m.phase == 'evaluation'} <= {8, 16}
  assert {m.number for m in drawn} == {signal.SIGKILL, signal.SIGTERM}
  assert drawn != draw(10, stages, 24, {'step': 0.1}, eval_period=8, seed=4)
  plain = draw(10, as_programme(data, 24), 24, {}, eval_period=0, seed=3)
  assert not {'switch', 'evaluation'} & {m.phase for m in plain}


def test_a_phase_lasts_as_the_undisturbed_run_tells(tmp_path):
  write_timeline(tmp_path, TIMELINE)
  lines = [json.loads(line) for line in (tmp_path / 'timeline.jsonl').read_text().splitlines()]
  lasts = durations(lines)
  assert lasts['import'] == 1.5
  assert lasts['compile'] == pytest.approx(3.0)
  assert lasts['write'] == pytest.approx(0.4)
  assert lasts['evaluation'] == pytest.approx(1.0)


def test_moments_are_recognised_and_former_starts_do_not_count(tmp_path):
  run = tmp_path / 'run'
  write_timeline(run, TIMELINE)
  (run / 'batches').mkdir()
  batches = run / 'batches' / 'process_0.jsonl'
  record = lambda step: encode({'step': step, 'kind': 'batch', 'shards': {'0': 'x'}})
  batches.write_text(record(3) + record(4))
  watcher = Watcher(run)
  at = lambda phase, step=0: watcher.arrived(Moment(phase, step, 0.0, 9))
  assert at('import')
  assert not any(at(phase) for phase in ('data', 'restore', 'compile', 'save', 'rename'))
  assert (watcher.doing(), watcher.steps(), watcher.resumed_at()) == ('import', 0, None)
  write_timeline(run, [(k, 3 if k != 'save' else 6, t) for k, _, t in TIMELINE[:9]], 'a')
  assert at('compile')
  assert at('save', 6)
  assert not at('save', 7)
  assert not at('write', 6)
  assert not at('rename', 6)
  assert (watcher.doing(), watcher.steps(), watcher.resumed_at()) == ('save', 3, 3)
  batches.write_text(record(3) + record(4) + record(5) + record(6))
  assert (at('step', 6), at('step', 7)) == (True, False)
  write_timeline(run, [('step', 6, 9.0), ('commit', 6, 9.1)], 'a')
  assert at('write', 6)
  assert at('rename', 6)


# --- the comparison


def make_run(folder: pathlib.Path, given) -> None:
  """A run directory with a checkpoint, a batch and a metric record."""
  _, axes = abstract_state(given['model'], given['optimizer'])
  transform = make_optimizer(given['optimizer'], axes, learning_rate(given['optimizer'], 12))
  state = jax.jit(lambda: init_state(build_model(given['model']), transform, 0))()
  with Checkpointer(folder, 1, identity(given['model'])) as writer:
    writer.save(4, state, {'shard_0': b'x'}, {})
    writer.wait()
  (folder / 'batches').mkdir()
  line = {'step': 1, 'kind': 'batch', 'shards': {'0': 'abc'}}
  (folder / 'batches' / 'process_0.jsonl').write_text(encode(line))
  record = {'step': 1, 'kind': 'train', 'time': 1.0, 'loss': 2.5, 'tokens_per_second': 7.0}
  (folder / 'metrics.jsonl').write_text(encode(record))


@pytest.fixture(scope='module')
def recorded(tmp_path_factory):
  given = arguments('nowhere', None)
  folder = tmp_path_factory.mktemp('recorded') / 'run'
  make_run(folder, given)
  return given, folder


def aspects(one, two):
  return {aspect.name: aspect for aspect in compare.compare(one, two, 4)}


def test_a_run_is_the_same_as_its_copy(recorded, tmp_path):
  _, folder = recorded
  copy = shutil.copytree(folder, tmp_path / 'copy')
  record = {'step': 1, 'kind': 'train', 'time': 9.0, 'loss': 2.5, 'tokens_per_second': 1.0}
  (copy / 'metrics.jsonl').write_text(encode(record))  # only clocks differ
  found = aspects(folder, copy)
  assert all(aspect.same for aspect in found.values()), found
  assert found['parameters'].count > 10_000


def test_one_bit_of_one_number_is_seen(recorded, tmp_path):
  given, folder = recorded
  told = control.alter_a_bit(folder, tmp_path / 'altered', 4, given)
  assert 'the last bit of one number of' in told
  found = aspects(folder, tmp_path / 'altered')
  assert found['parameters'].differing == 1
  assert 0 < found['parameters'].difference < 1e-6
  assert not found['parameters'].holds(exact=True)
  assert found['parameters'].holds(exact=False)
  assert found['optimizer'].same
  assert found['batches'].same


@pytest.mark.parametrize(
  ('name', 'path', 'before', 'after'),
  [
    ('batches', 'batches/process_0.jsonl', 'abc', 'abd'),
    ('metrics', 'metrics.jsonl', '2.5', '2.5000000000000004'),
    ('metrics', 'metrics.jsonl', '"step": 1', '"step": 2'),
  ],
)
def test_another_record_is_seen(recorded, tmp_path, name, path, before, after):
  _, folder = recorded
  copy = shutil.copytree(folder, tmp_path / 'copy')
  text = (copy / path).read_text()
  assert before in text
  (copy / path).write_text(text.replace(before, after))
  found = aspects(folder, copy)
  assert [n for n, aspect in found.items() if not aspect.same] == [name]


def test_a_record_that_is_there_twice_or_not_at_all_is_seen(recorded, tmp_path):
  _, folder = recorded
  copy = shutil.copytree(folder, tmp_path / 'copy')
  text = (copy / 'metrics.jsonl').read_text()
  (copy / 'metrics.jsonl').write_text(text * 2)
  assert not aspects(folder, copy)['metrics'].same
  (copy / 'metrics.jsonl').write_text('')
  assert not aspects(folder, copy)['metrics'].holds(exact=False)
  shutil.rmtree(copy / 'batches')
  assert not aspects(folder, copy)['batches'].holds(exact=False)


def test_a_start_that_fails_by_itself_fails_the_drill(tmp_path):
  starts = Starts(['-c', 'import sys; print("no such thing"); sys.exit(3)'], os.environ)
  with pytest.raises(Failed, match=r'undisturbed ended with \[3\], not \[0\]: no such thing'):
    starts.run(tmp_path, Shape(1, 1, MeshConfig()))
  with pytest.raises(ConfigError, match='does not divide the 3 devices'):
    Shape(2, 3, MeshConfig())


# --- the command


def small_run() -> list[str]:
  """Arguments of scripts.train for a small run on the corpus of the tests."""
  files = ('models/openmoe_tiny', 'runs/pretrain', 'mixtures/text_files')
  values = ('TRAIN_STEPS=30', 'BATCH_SIZE=8', 'DATA_SHARDS=1', 'EVAL_PERIOD=0')
  own = {
    'TEXT_FILES': str(corpus() / 'text.jsonl'),
    'MIXTURE_OR_TASK_NAME': 'text_files_full_lm',
    'text_files.UserFiles.vocabulary': str(corpus() / 'vocabulary.model'),
  }
  return [
    *(f'--gin_file=gin/{name}.gin' for name in files),
    *(f'--gin.{value}' for value in (*values, "TASK_FEATURE_LENGTHS={'targets': 32}")),
    *(f'--gin.{name}={value!r}' for name, value in own.items()),
  ]


def run_drill(folder: pathlib.Path, *more: str) -> dict:
  given = os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=1')
  done = subprocess.run(
    [sys.executable, '-m', 'scripts.drill', f'--directory={folder}', *small_run(), *more],
    cwd=ROOT,
    env=os.environ | {'XLA_FLAGS': given},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return json.loads((folder / 'resume_proof.json').read_text())


@pytest.mark.slow  # continuous integration runs it too
def test_a_run_with_two_kills_is_the_same_bit_for_bit(tmp_path):
  proof = run_drill(tmp_path / 'drill', '--kills=2', '--tiny_steps=8')
  assert (proof['verdict'], proof['exact']) == ('survived', True)
  assert len(proof['kills']) == 2
  assert all(kill['resumed_at'] is not None for kill in proof['kills'])
  assert {a['name']: a['differing'] for a in proof['compared']} == {
    'parameters': 0, 'optimizer': 0, 'batches': 0, 'metrics': 0, 'router records': 0,
  }  # fmt: skip
  assert proof['control']['differs']
  assert len(proof['configuration_sha256']) == 64
