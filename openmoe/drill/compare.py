"""Two run directories compared bit for bit: parameters, optimizer, batches and metrics.

It reads with orbax and nothing of the code that is under test; only the records of batches and
metrics are read as training reads them. Data positions are not compared: they hold how far
TensorFlow has read ahead; that they continue right is what the batches show.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from openmoe.checkpoint.paths import checkpoint_name
from openmoe.observe.batches import read_batches
from openmoe.observe.metrics import read_records, read_router
from openmoe.observe.notes import TIMED

_TOLERANCE = 1e-5  # of another mesh: norm of the difference over the norm


@dataclasses.dataclass(frozen=True)
class Aspect:
  """One thing that two runs are compared in.

  Attributes:
    name: what is compared.
    digest: of it in the second run.
    count: numbers, steps or records compared.
    differing: how many of them differ.
    difference: the largest relative one; 0 where all bits are the same, inf where it has no size.
    first: the first that differs, in words; '' for none.
  """

  name: str
  digest: str
  count: int
  differing: int
  difference: float = 0.0
  first: str = ''

  @property
  def same(self) -> bool:
    """Whether there is something to compare, and all bits of it are the same."""
    return self.count > 0 and self.differing == 0

  def holds(self, exact: bool) -> bool:
    """Whether this is as it should be: the same bits, or on another mesh the same to rounding."""
    return self.same or (not exact and self.count > 0 and self.difference <= _TOLERANCE)


def read_arrays(directory: os.PathLike | str) -> dict[str, np.ndarray]:
  """Path -> array of an item of a checkpoint, whatever devices wrote it."""
  logging.set_verbosity(logging.ERROR)  # orbax misses metadata that lie a folder higher
  with ocp.PyTreeCheckpointer() as reader:
    tree = reader.metadata(os.fspath(directory)).item_metadata.tree
    as_numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    found = reader.restore(os.fspath(directory), restore_args=as_numpy)
  leaves = jax.tree_util.tree_leaves_with_path(found)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def compare(first: os.PathLike | str, second: os.PathLike | str, step: int) -> list[Aspect]:
  """What two runs have in common after `step`, the first of them undisturbed."""
  one, two = pathlib.Path(first), pathlib.Path(second)
  checkpoint = checkpoint_name(step)
  return [
    _arrays('parameters', one / checkpoint / 'params', two / checkpoint / 'params'),
    _arrays('optimizer', one / checkpoint / 'state', two / checkpoint / 'state'),
    _named('batches', _batches(one), _batches(two)),
    _records('metrics', one, two),
    _routers(one, two),
  ]


def _digest(parts) -> str:
  digest = hashlib.sha256()
  for part in parts:
    digest.update(part if isinstance(part, bytes) else repr(part).encode())
  return digest.hexdigest()


def _arrays(name: str, one: pathlib.Path, two: pathlib.Path) -> Aspect:
  return _of_arrays(name, read_arrays(one), read_arrays(two))


def _of_arrays(name: str, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> Aspect:
  digest = _digest(part for key in sorted(b) for part in (key, b[key].dtype, b[key].tobytes()))
  differing, worst, first = 0, 0.0, ''
  for key in sorted(a.keys() | b.keys()):
    x, y = a.get(key), b.get(key)
    if x is None or y is None or x.shape != y.shape or x.dtype != y.dtype:
      differing, worst, first = differing + 1, math.inf, first or f'{key} is not in both'
      continue
    bits = lambda v: np.frombuffer(np.ascontiguousarray(v).tobytes(), np.uint8)
    if np.array_equal(bits(x), bits(y)):
      continue
    wrong = int(np.sum(x != y)) or 1
    differing += wrong
    distance = np.linalg.norm(np.ravel(x).astype(np.float64) - np.ravel(y).astype(np.float64))
    size = float(distance / max(np.linalg.norm(np.ravel(x).astype(np.float64)), 1e-30))
    worst = max(worst, size if math.isfinite(size) else math.inf)
    first = first or f'{wrong} of {x.size} numbers of {key}'
  return Aspect(name, digest, sum(v.size for v in b.values()), differing, worst, first)


def _named(name: str, a: dict, b: dict) -> Aspect:
  """Things without a size: they are the same or not."""
  wrong = sorted((k for k in a.keys() | b.keys() if a.get(k) != b.get(k)), key=str)
  digest = _digest(sorted((str(k), str(v)) for k, v in b.items()))
  return Aspect(
    name, digest, len(b), len(wrong), math.inf if wrong else 0.0, f'{wrong[0]}' if wrong else ''
  )


def _batches(run: pathlib.Path) -> dict[str, str]:
  return {
    f'step {step}, shard {shard}': digest
    for step, shards in sorted(read_batches(run).items())
    for shard, digest in shards.items()
  }


def _records(name: str, one: pathlib.Path, two: pathlib.Path) -> Aspect:
  a, b = _metrics(one), _metrics(two)
  differing, worst, first = 0, 0.0, ''
  for key in sorted(a.keys() | b.keys()):
    x, y = a.get(key, {}), b.get(key, {})
    fields = [f for f in sorted(x.keys() | y.keys()) if repr(x.get(f)) != repr(y.get(f))]
    if not fields:
      continue
    differing += 1
    worst = max(worst, *(_apart(x.get(f), y.get(f)) for f in fields))
    told = f'{fields[0]} of {key[1]} step {key[0]} is {x.get(fields[0])} and {y.get(fields[0])}'
    first = first or told
  digest = _digest(sorted((k, sorted(v.items())) for k, v in b.items()))
  return Aspect(name, digest, len(b), differing, worst, first)


def _metrics(run: pathlib.Path) -> dict[tuple[int, str], dict]:
  """(step, kind) -> what was measured; a step that is there twice counts as a field."""
  found: dict[tuple[int, str], dict] = {}
  for record in read_records(run):
    key = record['step'], str(record.get('kind'))
    values = {k: v for k, v in record.items() if k not in TIMED}
    found[key] = values if key not in found else found[key] | {'records': 2}
  return found


def _apart(x: object, y: object) -> float:
  if not isinstance(x, int | float) or not isinstance(y, int | float):
    return math.inf
  return abs(x - y) / max(abs(x), 1.0)


def _routers(one: pathlib.Path, two: pathlib.Path) -> Aspect:
  a, b = read_router(one), read_router(two)
  aspect = _of_arrays('router records', a, b)
  # A dense model has none, and two runs without any are alike.
  return aspect if a or b else dataclasses.replace(aspect, count=1)
