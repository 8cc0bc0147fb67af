"""Who opens closes: what is left when a run raises, diverges or runs out of data."""

import contextlib
import dataclasses
import json
import types

import pytest

from openmoe import train as train_lib
from openmoe.config import ConfigError
from openmoe.feed import Feed
from openmoe.observe.record import write_run_record
from openmoe.running.observation import NonFiniteLoss
from scripts import train as door
from tests.run_case import arguments, child, corpus, curve, source_of

# A disk so slow that the save of step 4 has begun and is not finished when step 5 fails.
FAILS = """
import os, sys, threading, time
from openmoe.checkpoint import manifest
from openmoe.feed import Feed
from openmoe import train as train_lib
from tests.run_case import arguments, source_of
take, write, taken = Feed.__next__, manifest.write, []
def slow(*args, **named):
  print('writing', flush=True)
  time.sleep(2)
  write(*args, **named)
  print('written', flush=True)
def fails(self):
  taken.append(1)
  if len(taken) == 5:
    raise RuntimeError('step 5 fails')
  return take(self)
manifest.write, Feed.__next__ = slow, fails
before = {t.name for t in threading.enumerate()}
try:
  train_lib.train(**arguments(sys.argv[2], source_of(sys.argv[1]), eval_period=0))
finally:
  left = sorted({t.name for t in threading.enumerate()} - before)
  print('threads left:', [name for name in left if 'data' in name or 'save' in name], flush=True)
"""


def left(folder) -> list[str]:
  """What lies in a run directory that is a checkpoint, or unfinished."""
  marks = ('checkpoint', 'tmp', 'partial')
  return sorted(p.name for p in folder.iterdir() if any(mark in p.name for mark in marks))


def test_a_failure_in_the_loop_leaves_the_save_that_had_begun(tmp_path):
  temporary = tmp_path / 'tmp'
  temporary.mkdir()
  process = child(FAILS, corpus(), tmp_path / 'run', env={'TMPDIR': str(temporary)})
  out, _ = process.communicate(timeout=120)
  assert process.returncode == 1, out
  assert out.rstrip().endswith('RuntimeError: step 5 fails')
  assert out.index('\nwriting') < out.index('\nwritten') < out.index('\nthreads left: []'), out
  assert left(tmp_path / 'run') == ['checkpoint_4']
  assert not list(temporary.iterdir())
  result = train_lib.train(**arguments(tmp_path / 'run', source_of(corpus()), total_steps=5))
  assert (result.step, result.resumed_from) == (5, 4)


def test_data_that_end_end_the_run_with_a_checkpoint(tmp_path, monkeypatch, capsys):
  given = arguments(tmp_path, source_of(corpus()), total_steps=1000, checkpoint_period=1000)
  given['data'] = dataclasses.replace(given['data'], num_epochs=1)
  monkeypatch.setattr(door, '_DRY_RUN', types.SimpleNamespace(value=False))
  monkeypatch.setattr(door.processes, 'joined', lambda *_: contextlib.nullcontext())
  monkeypatch.setattr(door, 'configure', lambda: given)
  assert door.main() == 66
  out = capsys.readouterr().out
  step = curve(tmp_path)[-1][0]
  assert 0 < step < 1000
  assert left(tmp_path) == [f'checkpoint_{step}']
  assert f"The data of stage 'run' ended after step {step} of 1000, which is saved" in out
  assert f'Set TRAIN_STEPS = {step}' in out
  assert [s for s, *_ in curve(tmp_path)] == list(range(1, step + 1))
  again = train_lib.train(**given)
  assert (again.step, again.end) == (step, train_lib.End.DATA)
  assert left(tmp_path) == [f'checkpoint_{step}']


def test_data_without_a_batch_are_refused(tmp_path, monkeypatch):
  def nothing(self):
    raise StopIteration

  monkeypatch.setattr(Feed, '__next__', nothing)
  with pytest.raises(ConfigError, match='hold no batch at all'):
    train_lib.train(**arguments(tmp_path, source_of(corpus()), eval_period=0))
  assert left(tmp_path) == []


def test_divergence_names_a_checkpoint_of_this_directory(tmp_path):
  """Not that of the run it began from, and not one whose save failed."""
  source = source_of(corpus())
  first = arguments(tmp_path / 'first', source, total_steps=2, eval_period=0)
  train_lib.train(**first)
  changes = {'initial_checkpoint': f'{tmp_path}/first/checkpoint_2', 'eval_period': 0}
  second = arguments(tmp_path / 'second', source, learning_rate=1e38, **changes)
  with pytest.raises(NonFiniteLoss, match='last good checkpoint: none was written'):
    train_lib.train(**second)


def test_every_former_configuration_is_kept(tmp_path):
  for text in ('a = 1\n', 'a = 2\n', 'a = 3\n', 'a = 4\n'):
    write_run_record(tmp_path, text, 100)
  names = ('config.gin', 'config_until_100.gin', 'config_until_100_2.gin', 'config_until_100_3.gin')
  texts = [(tmp_path / name).read_text() for name in names]
  assert texts == ['a = 4\n', 'a = 1\n', 'a = 2\n', 'a = 3\n']
  assert len(json.loads((tmp_path / 'run.json').read_text())) == 4
