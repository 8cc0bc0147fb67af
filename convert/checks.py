"""verify, diff and fsck: what two checkpoints have in common, and whether one is sound."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

from convert.core.forms import Form, reading
from convert.core.names import Row, listed, name_table
from convert.core.source import model_problems, model_shapes, shape_problems
from convert.core.tensors import ConvertError, Stored, as_bytes, cast, is_finite, same_bytes
from convert.logits import agreement, forward, seeded_tokens
from openmoe.config import ModelConfig

_MODULES = ('router', 'attention', 'experts', 'extra_mlp', 'mlp', 'moe')


def _pairs(a: Form, b: Form, row: Row) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
  """(first row, rows of a, rows of b) in the common layout, cut alike."""
  others = b.pieces(row)
  first, held = next(others)
  for start, x in a.pieces(row):
    while len(x):
      if start >= first + len(held):
        first, held = next(others)
        continue
      count = min(len(x), first + len(held) - start)
      yield start, x[:count], held[start - first : start - first + count]
      start, x = start + count, x[count:]


def _hint(a: Form, b: Form, row: Row) -> str:
  """What happened to a tensor that differs, where it is one of the usual mistakes."""
  if row.experts:
    here, there = _expert_digests(a, row), _expert_digests(b, row)
    moved = [(i, there.index(h)) for i, h in enumerate(here) if h in there and there[i] != h]
    if moved:
      return f': experts moved, {", ".join(f"{i} is at {j}" for i, j in moved)}'
    return ''
  shape = a.parameter(row).shape
  square = len(shape) == 2 and shape[0] == shape[1]
  if square and np.array_equal(a.load(row).astype(np.float32), b.load(row).T.astype(np.float32)):
    return ': it is transposed'
  return ''


def _expert_digests(form: Form, row: Row) -> list[bytes]:
  """Digest of every expert's values as float32, so that forms of different dtype compare."""
  digests = []
  for _, x in form.pieces(row):
    digests += [hashlib.sha256(as_bytes(w.astype(np.float32))).digest() for w in x]
  return digests


def verify(a: Form, b: Form, config: ModelConfig, logits: bool = True) -> tuple[list[str], dict]:
  """Every tensor of two checkpoints, then logits and routing on seeded tokens.

  Tensors agree when they are equal bit by bit or, of different dtypes, when the wider one rounds
  to the other. Logits of b are along the routing of a, so that they tell of the weights alone;
  same_first_expert tells of the routing.

  Returns:
    (problems, each naming its tensor; the comparison of logits and routing, empty when names or
    shapes already keep the two from being the same model)
  """
  rows, shapes = list(name_table(config)), model_shapes(config)
  problems = [f'{f.path}: {p}' for f in (a, b) for p in model_problems(f, rows, shapes)]
  if problems:
    return problems, {}
  for row in rows:
    try:
      worst = _largest_difference(a, b, row)
    except ConvertError as error:
      problems.append(str(error))
      continue
    if worst is not None:
      there = b.parameter(row).name
      problems.append(
        f'{a.parameter(row).name} differs from {there} by up to {worst:.3g}{_hint(a, b, row)}'
      )
  comparison = {}
  if logits and not any('cannot be read' in p or 'truncated' in p for p in problems):
    tokens = seeded_tokens(config.vocab_size)
    first = forward(a, config, tokens)
    follow = first.experts if first.experts.size else None
    comparison = agreement(first, forward(b, config, tokens, follow))
  return problems, comparison


def _largest_difference(a: Form, b: Form, row: Row) -> float | None:
  """Largest absolute difference, or None where the tensors agree."""
  worst, equal = 0.0, True
  for _, x, y in _pairs(a, b, row):
    if x.dtype.itemsize < y.dtype.itemsize:
      x, y = y, x
    x = np.ascontiguousarray(cast(x, y.dtype, row.name))
    if same_bytes(x, np.ascontiguousarray(y)):
      continue
    equal = False
    with np.errstate(invalid='ignore'):
      difference = np.abs(x.astype(np.float32) - y.astype(np.float32))
    worst = max(worst, float(np.max(np.nan_to_num(difference, nan=np.inf))))
  return None if equal else worst


@dataclasses.dataclass
class Change:
  """Squared norms of a difference and of what it is a difference from."""

  moved: float = 0.0
  size: float = 0.0

  def add(self, x: np.ndarray, y: np.ndarray) -> None:
    x, y = x.astype(np.float64), y.astype(np.float64)
    self.moved += float(np.sum(np.square(y - x)))
    self.size += float(np.sum(np.square(x)))

  @property
  def relative(self) -> float:
    return (self.moved / self.size) ** 0.5 if self.size else float(self.moved > 0)


def module(row: Row) -> str:
  """A row's module, for summaries."""
  if row.layer is None:
    return row.ours.split('/', 1)[0]
  return next(name for name in _MODULES if name in row.place)


def mixture(row: Row) -> int | str:
  """Which router a row belongs to; a layer of JetMoE has one more, that of its attention."""
  return f'{row.layer} attention' if row.place.startswith('attention/') else row.layer


def diff(a: Form, b: Form, config: ModelConfig) -> dict:
  """What changed from a to b.

  Returns:
    {'modules': {module: relative change}, 'tensors': {name: relative change},
     'router_drift': {layer: relative change}, 'experts': {layer: [relative change by expert]}};
    a relative change is |b - a| / |a|. Layers are those of mixture().

  Raises:
    ConvertError: the two are not of the same model.
  """
  rows, shapes = list(name_table(config)), model_shapes(config)
  for form in (a, b):
    if problems := model_problems(form, rows, shapes):
      raise ConvertError(f'{form.path}: {listed(problems)}')
  modules, tensors = collections.defaultdict(Change), collections.defaultdict(Change)
  experts: dict[int | str, dict[int, Change]] = {}
  routers: dict[int | str, float] = {}
  for row in rows:
    for start, x, y in _pairs(a, b, row):
      modules[module(row)].add(x, y)
      tensors[row.name].add(x, y)
      if row.experts:
        layer = experts.setdefault(mixture(row), collections.defaultdict(Change))
        for i in range(len(x)):
          layer[start + i].add(x[i], y[i])
    if module(row) == 'router':
      routers[mixture(row)] = tensors[row.name].relative
  return {
    'modules': {name: change.relative for name, change in modules.items()},
    'tensors': {name: change.relative for name, change in tensors.items()},
    'router_drift': routers,
    'experts': {n: [layer[e].relative for e in sorted(layer)] for n, layer in experts.items()},
  }


def fsck(form: Form, config: ModelConfig) -> list[str]:
  """Everything that is wrong with one checkpoint; each phrase names the tensor or file.

  Raises:
    ConvertError: so much is wrong that the rest cannot be looked at.
  """
  with reading(form.path):
    return _fsck(form, config)


def _fsck(form: Form, config: ModelConfig) -> list[str]:
  rows, shapes = list(name_table(config)), model_shapes(config)
  problems = [*form.problems(), *form.check_names(rows)]
  recorded = {line['target']: line for line in (form.receipt() or {}).get('tensors', ())}
  named = {form.parameter(row).name: row for row in rows if _there(form, row)}
  if len(named) == len(rows):
    problems += form.alias_problems(rows)
  wrong = dict(shape_problems(form, named.values(), shapes))
  problems += wrong.values()
  for name, row in named.items():
    if row not in wrong:  # of a shape that nobody expects it may also be of any size
      problems += _values(form.parameter(row), row, recorded.get(name))
  others = form.tensors()
  for name, stored in others.items():
    # The rest of ours is whole arrays of which the rows above are slices.
    if name.startswith('state/'):
      problems += _values(stored, None, recorded.get(name))
  return list(dict.fromkeys(problems))


def _there(form: Form, row: Row) -> bool:
  try:
    form.parameter(row)
  except (KeyError, ConvertError):
    return False  # form.check_names has said so
  return True


def _values(stored: Stored, row: Row | None, recorded: dict | None) -> Iterator[str]:
  """Problems of one tensor's values: unreadable, not finite, doubled or empty experts, changed."""
  whole, finite = hashlib.sha256(), True
  seen: dict[bytes, int] = {}
  try:
    for start, x in stored.pieces():
      whole.update(as_bytes(x))
      if finite and not is_finite(x):
        finite = False
        yield f'{stored.name} has values that are not finite'
      if row is None or not row.experts:
        continue
      for i, expert in enumerate(x, start):
        if not expert.any():
          yield f'{stored.name}: expert {i} is missing, all its values are 0'
          continue
        content = hashlib.sha256(as_bytes(expert)).digest()
        if content in seen:
          yield f'{stored.name}: experts {seen[content]} and {i} are the same'
        seen.setdefault(content, i)
  except ConvertError as error:
    yield str(error)
    return
  if recorded and whole.hexdigest() != recorded['sha256_after']:
    yield f'{stored.name} is not what the receipt records (another SHA-256)'
