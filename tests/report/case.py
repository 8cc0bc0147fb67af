"""Run directories as a report finds them, made of notes alone."""

import json
import pathlib

import numpy as np

from openmoe.observe.notes import encode

HOSTILE = '<script>alert(1)</script>\x1b[2J'


def write_run(
  folder: pathlib.Path,
  steps: int = 60,
  *,
  layers: int = 2,
  stages=(),
  restart: int = 0,
  text: str = 'plain',
  bare: bool = False,
) -> pathlib.Path:
  """A run of so many steps.

  Args:
    layers: sparse ones; 0 for a dense model.
    stages: (name, steps) of each.
    restart: step that a second start went on from, after a kill 5 steps later.
    text: put wherever a run directory holds text of somebody's.
    bare: metrics.jsonl alone.
  """
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  records, loads = [], []
  for step in range(1, steps + 1):
    record = {'step': step, 'kind': 'train', 'time': 1e9 + step, 'loss': 2 + 5 / step}
    record |= {'tokens_seen': 4096.0 * step, 'tokens_per_second': 1234.5, 'learning_rate': 0.01}
    if layers:
      load = rng.dirichlet(np.full(8, 9.0), layers)
      loads.append(load)
      record |= {'dropped_fraction': 0.38, 'late_dropped_fraction': 0.5, 'avoidable_drops': 0.01}
      record |= {'expert_load_max': 8 * load.max(), 'expert_load_min': 8 * load.min()}
      record |= {'router_logsumexp': 2.1, 'effective_experts': 0.9, 'dead_experts': 0.0}
    records.append(record)
    if step % 20 == 0:
      validation = {'loss': 2.2 + 5 / step, 'unigram_entropy': 3.0}
      records.append({'step': step, 'kind': 'validation', 'time': 1e9 + step} | validation)
  (folder / 'metrics.jsonl').write_text(''.join(encode(r) for r in records))
  if bare:
    return folder
  if layers:
    (folder / 'router').mkdir(exist_ok=True)
    arrays = {'steps': np.arange(1, steps + 1), 'expert_load': np.array(loads)}
    arrays['dropped_fraction'] = np.full((steps, layers), 0.38)
    np.savez(folder / 'router' / '000000000.npz', **arrays)
  _write_starts(folder, steps, stages, restart, text)
  (folder / 'config.gin').write_text(f"A = 1\nNAME = '{text}'\nB = 3\n")
  event = {'step': 7, 'kind': 'fired', 'rule': text, 'value': 3.5, 'action': 'note', 'text': text}
  cleared = event | {'step': 9, 'kind': 'cleared'}
  (folder / 'health.jsonl').write_text(encode(event) + encode(cleared))
  samples = [{'prompt': text, 'text': f'{text} and on'}]
  (folder / 'samples.json').write_text(json.dumps(samples))
  return folder


def _write_starts(folder, steps, stages, restart, text) -> None:
  start = {'start_step': 0, 'stages': stages, 'host': text, 'git_commit': text, 'time': text}
  start['devices'] = {'kind': text, 'count': 8, 'processes': 1}
  lines = [(0, 'start', 0), (1, 'data', 0), (3, 'step', 0), (4, 'compile', 0), (9, 'step', 0)]
  starts = [start]
  if restart:
    lines += [(9 + restart, 'save', restart), (10 + restart, 'step', restart)]
    lines += [(15 + restart, 'evaluation', restart + 5)]
    lines += [(40 + restart, 'start', 0), (41 + restart, 'data', restart)]
    lines += [(43 + restart, 'step', restart)]
    starts.append(start | {'start_step': restart})
    (folder / f'config_until_{restart}.gin').write_text(f"A = 1\nNAME = '{text}'\nB = 2\n")
  lines += [(60 + steps, 'save', steps), (62 + steps, 'end', steps)]
  rows = [{'time': 1e9 + t, 'kind': k, 'step': s} for t, k, s in lines]
  (folder / 'timeline.jsonl').write_text(''.join(encode(row) for row in rows))
  (folder / 'run.json').write_text(json.dumps(starts))
