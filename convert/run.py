"""import and export: from one form to another, verified, with a receipt."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np
from etils import epath

from convert import sizes
from convert.core.forms import RECEIPT, Form, Sink
from convert.core.names import NamesError, Row, expected_shapes, name_table
from convert.core.tensors import DTYPES, ConvertError, Stored, digest
from convert.formats.hf import MAX_SHARD, HfForm, HfSink, is_hf
from convert.formats.ours import OursForm, OursSink, is_ours
from convert.formats.t5x import T5xForm, T5xSink, is_t5x
from convert.forward import agreement, forward, seeded_tokens
from convert.workplace import Job, Workplace
from openmoe.config import Architecture, ModelConfig
from openmoe.train_state import abstract_params, model_fields

FORMS: dict[str, Callable[[epath.Path], Form]] = {'t5x': T5xForm, 'hf': HfForm, 'ours': OursForm}
_TESTS = {'t5x': is_t5x, 'hf': is_hf, 'ours': is_ours}
# A rounded copy may differ from its source by this share of the largest logit.
_LOGIT_SHARE = 0.1


def find_form(path: str | os.PathLike, kind: str | None = None) -> Form:
  """Opens a checkpoint of any form; of a run directory, its newest checkpoint.

  Raises:
    ConvertError: there is no checkpoint of that kind.
  """
  root = epath.Path(path)
  if not root.exists():
    raise ConvertError(f'{root} does not exist.')
  if not root.is_dir():
    raise ConvertError(f"{root} is a file; give the checkpoint's directory.")
  steps = [
    (int(m[1]), p) for p in root.iterdir() if (m := re.fullmatch(r'checkpoint_(\d+)', p.name))
  ]
  places = [root, *(p for _, p in sorted(steps, reverse=True))]
  for place in places:
    for name, test in _TESTS.items():
      if kind in (None, name) and test(place):
        return FORMS[name](place)
  wanted = {'t5x': 'a file `checkpoint`', 'hf': 'config.json', 'ours': 'metadata/metadata'}
  needed = wanted[kind] if kind else ' or '.join(wanted.values())
  raise ConvertError(
    f'{root} holds no {kind or ""} checkpoint: neither it nor a checkpoint_<step> '
    f'inside has {needed}.'
  )


@dataclasses.dataclass(frozen=True)
class Options:
  """How to convert.

  Attributes:
    dtype: 'float32', 'bfloat16', or None to keep the source's.
    optimizer: carry Adafactor's state along, between t5x and ours.
    max_shard: bytes of a Hugging Face weight file.
    codec: of t5x chunks, 'zstd' or 'gzip'.
    tokenizer: files to put into a Hugging Face folder.
    logits: compare logits of source and target on seeded tokens at the end.
  """

  dtype: str | None = None
  optimizer: bool = False
  max_shard: int = MAX_SHARD
  codec: str = 'zstd'
  tokenizer: Sequence[Path] = ()
  logits: bool = True


def final_path(out: str | os.PathLike, kind: str, step: int) -> epath.Path:
  """Where a conversion ends up: t5x and ours live in `checkpoint_<step>` of a run directory."""
  root = epath.Path(out if '://' in os.fspath(out) else os.path.abspath(out))
  named = re.fullmatch(r'checkpoint_(\d+)', root.name)
  if kind == 'hf':
    return root
  if named and int(named[1]) != step:
    raise ConvertError(f'{root} is named for step {named[1]}; the weights are of step {step}.')
  return root if named else root / f'checkpoint_{step}'


def _target_dtype(source: Mapping[str, Stored], wanted: str | None) -> np.dtype:
  if wanted is not None:
    return DTYPES[wanted]
  found = {stored.dtype for stored in source.values()}
  known = found & set(DTYPES.values())
  if len(found) > 1 or not known:
    names = sorted(dtype.name for dtype in found)
    raise ConvertError(f'The source has tensors of {names}; choose --dtype float32 or bfloat16.')
  return known.pop()


def _sink(
  plan: Mapping[str, Any], place: epath.Path, out: epath.Path, form: Form, options: Options
) -> Sink:
  kind, step = plan['target']['kind'], plan['target']['step']
  match kind:
    case 't5x':
      return T5xSink(place, step, options.codec)
    case 'ours':
      about = {'model': plan['model'], 'hf_fields': dict(form.kept_fields)}
      return OursSink(place, step, about | {'converted_from': f'{form.kind}: {form.path.name}'})
    case 'hf':
      remote = '://' in os.fspath(out)
      staging = Path(tempfile.mkdtemp(prefix='openmoe_convert_')) if remote else None
      files, kept = options.tokenizer, form.kept_fields
      return HfSink(place, form.step, options.max_shard, files, staging, kept)
  raise AssertionError(kind)


class _CommonShape:
  """A source as the common layout has it, for a sink to lay out its files."""

  def __init__(self, form: Form, config: ModelConfig):
    self.stored = {row.name: self._one(form, row) for row in name_table(config)}

  @staticmethod
  def _one(form: Form, row: Row) -> Stored:
    stored = form.parameter(row)
    if not form.transposed(row):
      return stored
    *lead, a, b = stored.shape
    # What is transposed on the way comes in rows of the target's own choice.
    return dataclasses.replace(stored, shape=(*lead, b, a), unit=1)


def check_shapes(
  form: Form, rows: Iterable[Row], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
  """One phrase per parameter whose shape is not the model's."""
  problems = []
  for row in rows:
    stored, expected = form.parameter(row), shapes[row.name]
    if form.transposed(row):
      expected = (*expected[:-2], expected[-1], expected[-2])
    if tuple(stored.shape) != tuple(expected):
      problems.append(f'{stored.name} has shape {list(stored.shape)}, not {list(expected)}')
  return problems


@functools.cache
def model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Shape of every row in the common layout, by its name; from the model itself."""
  shapes = flax.traverse_util.flatten_dict(abstract_params(config)[0], sep='/')
  ours = {path: leaf.shape for path, leaf in shapes.items()}
  return expected_shapes(name_table(config), ours)


def check_source(form: Form, rows: Sequence[Row], shapes: Mapping[str, tuple[int, ...]]) -> None:
  """Refuses a source whose names or shapes are not the model's.

  Raises:
    NamesError, ConvertError: naming every tensor at fault.
  """
  problems = form.check_names(rows)
  if problems:
    shown = '; '.join(problems[:8]) + f'; and {len(problems) - 8} more' * (len(problems) > 8)
    raise NamesError(f'{form.path}: {shown}. Is --model the one that these weights belong to?')
  problems = check_shapes(form, rows, shapes) or list(form.alias_problems(rows))
  if problems:
    raise ConvertError(f'{form.path}: {"; ".join(problems[:8])}. Is --model the right one?')


def _jobs(form: Form, sink: Sink, config: ModelConfig, slots: Mapping) -> list[Job]:
  jobs = []
  for row in name_table(config):
    turned = row.transposed and (form.kind == 'hf') != (sink.kind == 'hf')
    jobs.append(Job(form.parameter(row), sink.parameter(row), turned))
    jobs += [Job(s, sink.slot(row, name)) for name, s in slots.get(row.t5x, {}).items()]
  # The largest begin first, so that threads do not wait for one at the end.
  return sorted(jobs, key=lambda job: -job.source.nbytes)


def _slots_in_use(form: Form, config: ModelConfig) -> dict[str, dict[str, Stored]]:
  """Adafactor's slots by t5x path of the parameter; without those of t5x that only hold a place.

  Raises:
    ConvertError: a slot is missing, or momentum is in use.
  """
  if not getattr(form, 'has_optimizer', False):
    raise ConvertError(
      f'--optimizer: {form.path} has no Adafactor state; only t5x and our own checkpoints of '
      'Adafactor runs do.'
    )
  found = {}
  for row in name_table(config):
    slots = form.slots(row)
    used = {name: s for name, s in slots.items() if s.shape != (1,) or form.kind == 'ours'}
    if set(used) not in ({'v'}, {'v_row', 'v_col'}):
      raise ConvertError(f'{row.t5x}: slots in use are {sorted(used)}, not v, or v_row and v_col.')
    found[row.t5x] = used
  return found


def _compare_logits(
  form: Form, made: Form, config: ModelConfig, lossless: bool
) -> dict[str, float]:
  """Logits and routing of source and target.

  Raises:
    ConvertError: they differ more than the change of dtype explains.
  """
  tokens = seeded_tokens(config.vocab_size)
  source = forward(form, config, tokens)
  follow = None if lossless or not source.experts.size else source.experts
  result = agreement(source, forward(made, config, tokens, follow))
  # Nothing changed, so nothing may differ but the order of sums in the output layer.
  limit = (1e-5 if lossless else _LOGIT_SHARE) * max(result['largest_logit'], 1.0)
  if not result['max_logit_difference'] <= limit:
    raise ConvertError(
      f'Logits of {made.path} differ from those of {form.path} by '
      f'{result["max_logit_difference"]:.3g}, more than {limit:.3g}; nothing was finished.'
    )
  return result


@dataclasses.dataclass(frozen=True)
class Result:
  """What a conversion did.

  Attributes:
    path: of the finished checkpoint.
    tensors, nbytes: moved, as they lie in the target.
    seconds: of moving, reading back and finishing; without the comparison of logits.
    receipt: as written.
  """

  path: epath.Path
  tensors: int
  nbytes: int
  seconds: float
  receipt: Mapping[str, Any]


def convert(form: Form, kind: str, out: str, model: str | None, options: Options) -> Result:
  """Converts a checkpoint to another form.

  Args:
    form: the source.
    kind: of the target.
    out: run directory or checkpoint directory (t5x, ours), or folder (hf).
    model: --model; None to take the sizes from the source.

  Raises:
    ConvertError, NamesError: nothing appears under the final name; the message says why.
  """
  config = sizes.of_form(form, model)
  if kind == 't5x' and config.architecture is not Architecture.OPENMOE:
    raise ConvertError(
      f'--to t5x: {config.name} is a {config.architecture.value}, for which t5x has no model and '
      'no names; export it --to hf.'
    )
  rows, shapes = list(name_table(config)), model_shapes(config)
  check_source(form, rows, shapes)
  common = _CommonShape(form, config).stored
  dtype = _target_dtype(common, options.dtype)
  step = form.step or 0
  if options.optimizer and 'hf' in (form.kind, kind):
    raise ConvertError('--optimizer: Hugging Face folders hold no optimizer state.')
  slots = _slots_in_use(form, config) if options.optimizer else {}
  plan = {
    'source': {'kind': form.kind, 'fingerprint': form.fingerprint()},
    'target': {'kind': kind, 'dtype': dtype.name, 'codec': options.codec, 'step': step},
    'optimizer': options.optimizer,
    'max_shard': options.max_shard,
    'tokenizer': [[f.name, digest(f.read_bytes().hex())] for f in options.tokenizer],
    'model': model_fields(config),
  }
  final = final_path(out, kind, step)
  if (done := _already(final, plan)) is not None:
    return Result(final, len(done['tensors']), 0, 0.0, done)
  work = Workplace(final, plan)
  try:
    began = time.perf_counter()
    sink = _sink(plan, work.path, final, form, options)
    sink.prepare(config, common, dtype)
    if slots:
      sink.prepare_slots(slots)
    jobs = _jobs(form, sink, config, slots)
    lines = work.run(jobs)
    _check_each_once(jobs, lines)
    sink.finish()
    seconds = time.perf_counter() - began
    # Reading it as any other checkpoint also checks names, files and headers.
    made = FORMS[kind](getattr(sink, 'local', work.path))
    check_source(made, rows, shapes)
    comparison = None
    if options.logits:
      lossless = all('cast' not in line['operation'] for line in lines)
      comparison = _compare_logits(form, made, config, lossless)
    receipt = _receipt(plan, made, lines, comparison)
    began = time.perf_counter()
    work.commit(json.dumps(receipt, indent=1).encode())
    seconds += time.perf_counter() - began
  finally:
    work.close()
  nbytes = sum(job.target.stored.nbytes for job in jobs)
  return Result(final, len(jobs), nbytes, seconds, receipt)


def _already(final: epath.Path, plan: Mapping[str, Any]) -> Mapping[str, Any] | None:
  """The receipt of the very same conversion, if it is complete."""
  path = final / RECEIPT
  if not path.exists():
    return None
  receipt = json.loads(path.read_text())
  return receipt if receipt.get('plan') == digest(plan) else None


def _check_each_once(jobs: Sequence[Job], lines: Sequence[Mapping[str, Any]]) -> None:
  """Every source tensor was used exactly once, and every target written exactly once."""
  for what in ('source', 'target'):
    names = [line[what] for line in lines]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled or len(names) != len(jobs):
      raise ConvertError(f'{what} tensors not used exactly once: {doubled or "some are missing"}.')


def _receipt(plan, made: Form, lines, comparison) -> dict[str, Any]:
  """No times and no machine: the same conversion gives the same receipt."""
  return {
    'version': 1,
    'plan': digest(plan),
    **{key: plan[key] for key in ('source', 'target', 'model')},
    'target_fingerprint': made.fingerprint(),
    'each_source_tensor_used_once': True,
    'tensors': sorted(lines, key=lambda line: line['target']),
    'logits': comparison,
  }
