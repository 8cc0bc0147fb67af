"""openmoe_tiny by t5x's train.py and by ours: python -m tests.parity.t5x_train CHECKOUT [--json]

CHECKOUT is a checkout of google-research/t5x, of which no line is changed. The same three steps run
in both on each mesh, then t5x takes up our export with the optimizer, and we take up what t5x's
default saved. Printed:
  loss_difference    largest absolute difference of a loss, over meshes and steps
  params_rel, moments_rel   norm of the difference over the norm, of the worst tensor
  continued_difference      of the first loss after an export of ours was restored by t5x
  read_mismatches    tensors of t5x's checkpoint that are not bit for bit what orbax reads
  import_mismatches  tensors that are not bit for bit the same after import and export

t5x wants cached_property, fiddle, graphviz and libcst (pip install --no-deps --target EXTRAS), and
stand-ins for two packages, which are written here; --extras=EXTRAS puts a folder on its path.
Expected: some ten minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np

from convert.core.forms import Form
from convert.run import Options, convert, find_form
from openmoe.observe.metrics import read_records
from openmoe_t5x import stubs

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMITS = {
  'loss_difference': 2e-6,
  'params_rel': 1e-6,
  'moments_rel': 1e-6,
  'continued_difference': 2e-6,
  'read_mismatches': 0,
  'import_mismatches': 0,
}
MESHES = {'2x4x1': (4, 1), '2x2x2': (2, 2)}  # (expert, model) partitions of 8 devices
STEPS = 3
_OURS = ('models/openmoe_tiny', 'runs/pretrain', 'experiments/demo')


class Trainers:
  """Both trainers, in processes of their own.

  Args:
    checkout: of t5x.
    place: folder for all that is written.
    extras: folder of what t5x wants besides.
  """

  def __init__(self, checkout: str, place: pathlib.Path, extras: str | None):
    self.place = place
    stubs.write(place / 'stubs')
    path = [str(ROOT), os.path.abspath(checkout), extras, str(place / 'stubs')]
    self._environment = os.environ | {
      'PYTHONPATH': os.pathsep.join(filter(None, path)),
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
      'TF_CPP_MIN_LOG_LEVEL': '3',
      'OPENMOE_DATA_DIR': str(place / 'demo_data'),
    }
    self._run('scripts.prepare_demo')

  def _run(self, module: str, *args: str) -> None:
    done = subprocess.run(
      [sys.executable, '-m', module, *args],
      cwd=ROOT,
      env=self._environment,
      capture_output=True,
      text=True,
      encoding='utf-8',
    )
    if done.returncode:
      raise RuntimeError(f'{module} {args} ended with {done.returncode}:\n{done.stderr[-4000:]}')

  def ours(self, name: str, mesh: tuple[int, int], steps: int, **macros) -> dict[int, float]:
    """Trains by scripts.train; losses by step."""
    out = self.place / name
    macros |= {'MODEL_DIR': str(out), 'TRAIN_STEPS': steps, 'LOG_PERIOD': 1, 'EVAL_PERIOD': 0}
    macros |= {'CHECKPOINT_PERIOD': STEPS}
    macros |= {'NUM_EXPERT_PARTITIONS': mesh[0], 'NUM_MODEL_PARTITIONS': mesh[1]}
    files = [f'--gin_file=gin/{file}.gin' for file in _OURS]
    self._run('scripts.train', *files, *(f'--gin.{k}={v!r}' for k, v in macros.items()))
    return {r['step']: r['loss'] for r in read_records(out, 'train') if 'loss' in r}

  def t5x(self, name: str, mesh: tuple[int, int], steps: int, *bindings: str) -> dict[int, float]:
    """Trains by t5x.train; losses by step."""
    out = self.place / name
    macros = {'MODEL_DIR': str(out), 'TRAIN_STEPS': steps}
    macros |= {'NUM_EXPERT_PARTITIONS': mesh[0], 'NUM_MODEL_PARTITIONS': mesh[1]}
    self._run(
      't5x.train',
      f'--gin_search_paths={ROOT}',
      '--gin_file=gin/t5x/demo.gin',
      *(f'--gin.{k}={v!r}' for k, v in macros.items()),
      f'--gin.utils.SaveCheckpointConfig.period={steps}',
      *(f'--gin.{binding}' for binding in bindings),
    )
    return _losses(out)


def _losses(run: pathlib.Path) -> dict[int, float]:
  """Losses of a run of t5x, from its TensorBoard events."""
  import tensorflow as tf

  found = {}
  for path in sorted((run / 'train').glob('events*')):
    for event in tf.compat.v1.train.summary_iterator(str(path)):
      for value in event.summary.value:
        if value.tag == 'loss':
          found[event.step] = float(tf.make_ndarray(value.tensor))
  return found


def _difference(a: dict[int, float], b: dict[int, float], steps: range) -> float:
  return max(abs(a[step] - b[step]) for step in steps)


def _relative(one: Form, other: Form) -> tuple[float, float]:
  """(parameters, moments): the worst tensor's norm of the difference over its norm."""
  worst = {'target': 0.0, 'state': 0.0}
  theirs, ours = one.tensors(), other.tensors()
  if theirs.keys() != ours.keys():
    raise RuntimeError(f'Other tensors: {sorted(theirs.keys() ^ ours.keys())[:8]}')
  for path, stored in theirs.items():
    if path == 'state/step':
      continue
    a, b = (np.asarray(x.whole(), np.float64) for x in (stored, ours[path]))
    norm = np.linalg.norm(b)
    # Slots that are not in use are zeros on both sides.
    rel = float(np.linalg.norm(a - b) / norm) if norm else float(np.any(a))
    part = path.partition('/')[0]
    worst[part] = max(worst[part], rel)
  return worst['target'], worst['state']


def read_by_orbax(checkpoint: pathlib.Path) -> dict[str, np.ndarray]:
  """Every array of a t5x checkpoint, as orbax reads it."""
  import orbax.checkpoint

  reader = orbax.checkpoint.PyTreeCheckpointer()
  # As numpy: on which devices the arrays were is of no concern.
  plain = orbax.checkpoint.RestoreArgs(restore_type=np.ndarray)
  leaves = reader.metadata(checkpoint / 'state').item_metadata.tree
  is_leaf = lambda node: not isinstance(node, dict)
  args = jax.tree.map(lambda _: plain, leaves, is_leaf=is_leaf)
  tree = reader.restore(checkpoint / 'state', restore_args=args)
  theirs: dict[str, np.ndarray] = {}

  def walk(node, path: str) -> None:
    if isinstance(node, dict):
      for key, child in node.items():
        walk(child, f'{path}/{key}' if path else str(key))
    elif node is not None:
      theirs[path] = np.asarray(node)

  walk(tree, '')
  return theirs


def _read_mismatches(checkpoint: pathlib.Path) -> int:
  """Tensors of what t5x saved that our reader and orbax's read otherwise."""
  theirs = read_by_orbax(checkpoint)
  ours = find_form(checkpoint).tensors()
  wrong = theirs.keys() ^ ours.keys()
  for path in theirs.keys() & ours.keys():
    a, b = theirs[path], np.asarray(ours[path].whole())
    if a.shape != b.shape or a.dtype != b.dtype or a.tobytes() != b.tobytes():
      wrong.add(path)
  return len(wrong)


def _import_mismatches(checkpoint: pathlib.Path, place: pathlib.Path) -> int:
  """Tensors that an import and an export change."""
  options = Options(optimizer=True, logits=False)
  run = convert(find_form(checkpoint), 'ours', place / 'imported', 'openmoe_tiny', options)
  back = convert(find_form(run.path), 't5x', place / 'back', None, options)
  before, after = find_form(checkpoint).tensors(), find_form(back.path).tensors()
  same = {
    path for path in before.keys() & after.keys() if before[path].sha256() == after[path].sha256()
  }
  return len(before.keys() | after.keys()) - len(same)


def compare(checkout: str, extras: str | None, meshes: list[str]) -> dict[str, float]:
  """All figures; see the module's docstring."""
  options = Options(optimizer=True, logits=False)
  found = dict.fromkeys(LIMITS, 0.0)

  def note(name: str, value: float) -> None:
    found[name] = max(found[name], value)

  with tempfile.TemporaryDirectory() as folder:
    place = pathlib.Path(folder)
    both = Trainers(checkout, place, extras)
    for mesh in meshes:
      ours = both.ours(f'ours_{mesh}', MESHES[mesh], STEPS)
      theirs = both.t5x(f't5x_{mesh}', MESHES[mesh], STEPS)
      note('loss_difference', _difference(ours, theirs, range(1, STEPS + 1)))
      exported = convert(
        find_form(place / f'ours_{mesh}'), 't5x', place / f'export_{mesh}', None, options
      ).path
      saved = place / f't5x_{mesh}' / f'checkpoint_{STEPS}'
      params, moments = _relative(find_form(saved), find_form(exported))
      note('params_rel', params)
      note('moments_rel', moments)
      note('read_mismatches', _read_mismatches(saved))
    # Both go on from our export, with the data from their beginning.
    restore = (
      f"utils.RestoreCheckpointConfig.path='{exported}'",
      "utils.RestoreCheckpointConfig.mode='specific'",
    )
    start = str(place / f'ours_{mesh}' / f'checkpoint_{STEPS}')
    ours = both.ours('ours_on', MESHES[mesh], STEPS + 1, INITIAL_CHECKPOINT=start)
    theirs = both.t5x('t5x_on', MESHES[mesh], STEPS + 1, *restore)
    note('continued_difference', _difference(ours, theirs, range(STEPS + 1, STEPS + 2)))
    note('import_mismatches', _import_mismatches(saved, place))
  return found


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('checkout', help='of google-research/t5x')
  parser.add_argument('--extras', help='folder of the packages that t5x wants')
  parser.add_argument('--mesh', action='append', choices=list(MESHES), help='default: all')
  parser.add_argument('--json', action='store_true', help='one JSON object and nothing else')
  args = parser.parse_args(argv)
  result = compare(args.checkout, args.extras, args.mesh or list(MESHES))
  if args.json:
    print(json.dumps(result))
  else:
    for name, value in result.items():
      limit = LIMITS[name]
      print(f'{name:22} {value:.3g}  limit {limit:.0e}  {"ok" if value <= limit else "NO"}')
  return int(any(not result[name] <= limit for name, limit in LIMITS.items()))


if __name__ == '__main__':
  raise SystemExit(main())
