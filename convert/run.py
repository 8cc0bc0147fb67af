"""import and export: from one form to another, verified, with a receipt."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from convert import sizes
from convert.core.forms import RECEIPT, Form, Options, Sink
from convert.core.names import Row, name_table
from convert.core.source import check_source, find_form, model_shapes, open_form
from convert.core.tensors import DTYPES, ConvertError, Stored, digest
from convert.formats.hf import HfSink
from convert.formats.ours import OursSink
from convert.formats.t5x import T5xSink
from convert.formats.t5x_orbax import OrbaxSink
from convert.logits import agreement, forward, seeded_tokens
from convert.workplace import Job, Workplace
from openmoe.checkpoint import safe_json
from openmoe.checkpoint.description import keep_vocabulary
from openmoe.config import ModelConfig

__all__ = ['Options', 'Result', 'convert', 'find_form']

SINKS: dict[str, type[Sink]] = {'t5x': T5xSink, 'hf': HfSink, 'ours': OursSink}
# A rounded copy may differ from its source by this share of the largest logit.
_LOGIT_SHARE = 0.1


def _target_dtype(source: Mapping[str, Stored], wanted: str | None) -> np.dtype:
  if wanted is not None:
    return DTYPES[wanted]
  found = {stored.dtype for stored in source.values()}
  known = found & set(DTYPES.values())
  if len(found) > 1 or not known:
    names = sorted(dtype.name for dtype in found)
    raise ConvertError(f'The source has tensors of {names}; choose --dtype float32 or bfloat16.')
  return known.pop()


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


def _jobs(form: Form, sink: Sink, config: ModelConfig, slots: Mapping) -> list[Job]:
  jobs = []
  for row in name_table(config):
    turned = row.transposed and form.layout is not sink.layout
    jobs.append(Job(form.parameter(row), sink.parameter(row), turned))
    jobs += [Job(s, sink.slot(row, name)) for name, s in slots.get(row.t5x, {}).items()]
  # The largest begin first, so that threads do not wait for one at the end.
  return sorted(jobs, key=lambda job: -job.source.nbytes)


def _slots_in_use(form: Form, config: ModelConfig) -> dict[str, dict[str, Stored]]:
  """Adafactor's slots in use by t5x path of the parameter.

  Raises:
    ConvertError: a slot is missing, or momentum is in use.
  """
  if not form.has_optimizer:
    raise ConvertError(
      f'--optimizer: {form.path} has no Adafactor state; only t5x and our own checkpoints of '
      'Adafactor runs do.'
    )
  found = {}
  for row in name_table(config):
    used = form.slots(row)
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
  config, target = sizes.of_form(form, model), SINKS[kind]
  if options.orbax:
    if kind != 't5x' or options.codec != 'zstd':
      raise ConvertError(
        '--orbax goes with --to t5x and --codec zstd alone; leave one of them out.'
      )
    target = OrbaxSink
  target.check_model(config)
  rows, shapes = list(name_table(config)), model_shapes(config)
  check_source(form, rows, shapes)
  common = _CommonShape(form, config).stored
  dtype = _target_dtype(common, options.dtype)
  step = form.step or 0
  if options.optimizer and not target.holds_optimizer:
    raise ConvertError(f'--optimizer: a checkpoint of kind {kind} holds no optimizer state.')
  slots = _slots_in_use(form, config) if options.optimizer else {}
  described = form.describe(config)
  if not options.optimizer:
    described = dataclasses.replace(described, optimizer=None)
  plan = {
    'source': {'kind': form.kind, 'fingerprint': form.fingerprint()},
    'target': {'kind': kind, 'dtype': dtype.name, 'codec': options.codec, 'step': step},
    'optimizer': options.optimizer,
    'max_shard': options.max_shard,
    'tokenizer': [[f.name, digest(f.read_bytes().hex())] for f in options.tokenizer],
    'description': described.plain(),
  }
  if options.orbax:
    plan['target'] |= {'orbax': True}
  final = target.final_path(out, step)
  if (done := _already(final, plan)) is not None:
    return Result(final, len(done['tensors']), 0, 0.0, done)
  with contextlib.ExitStack() as stack:
    stack.enter_context(_room_for(final, common, dtype))
    work = stack.enter_context(contextlib.closing(Workplace(final, plan)))
    began = time.perf_counter()
    sink = target.begin(work.path, form, described, options)
    stack.enter_context(contextlib.closing(sink))
    sink.prepare(config, common, dtype)
    if slots:
      sink.prepare_slots(slots)
    jobs = _jobs(form, sink, config, slots)
    lines = work.run(jobs)
    _check_each_once(jobs, lines)
    sink.finish()
    seconds = time.perf_counter() - began
    # Reading it as any other checkpoint also checks names, files and headers.
    made = open_form(kind, work.path)
    check_source(made, rows, shapes)
    comparison = None
    if options.logits:
      lossless = all('cast' not in line['operation'] for line in lines)
      comparison = _compare_logits(form, made, config, lossless)
    receipt = _receipt(plan, made, lines, comparison)
    began = time.perf_counter()
    work.commit(json.dumps(receipt, indent=1).encode())
    seconds += time.perf_counter() - began
  if target.keeps_vocabulary and (content := form.vocabulary_content()):
    keep_vocabulary(final.parent, described.vocabulary, content)
  nbytes = sum(job.target.stored.nbytes for job in jobs)
  return Result(final, len(jobs), nbytes, seconds, receipt)


@contextlib.contextmanager
def _room_for(out: epath.Path, tensors: Mapping[str, Stored], dtype: np.dtype) -> Iterator[None]:
  """A full disk becomes a ConvertError that says how much would be needed."""
  try:
    yield
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    needed = sum(stored.nbytes // stored.dtype.itemsize for stored in tensors.values())
    place = next(p for p in (out, *out.parents) if p.exists())
    raise ConvertError(
      f'no space left on the disk of {place}: {needed * dtype.itemsize:,} bytes are needed in all, '
      f'{shutil.disk_usage(os.fspath(place)).free:,} are free. Make room and give the same command '
      'again: it goes on from what is there.'
    ) from error


def _already(final: epath.Path, plan: Mapping[str, Any]) -> Mapping[str, Any] | None:
  """The receipt of the very same conversion, if it is complete."""
  path = final / RECEIPT
  if not path.exists():
    return None
  receipt = safe_json.read(path, limit=256 << 20)
  return receipt if receipt.get('plan') == digest(plan) else None


def _check_each_once(jobs: Sequence[Job], lines: Sequence[Mapping[str, Any]]) -> None:
  """Every source tensor was used exactly once, and every target written exactly once."""
  for what in ('source', 'target'):
    names = collections.Counter(line[what] for line in lines)
    doubled = sorted(name for name, count in names.items() if count > 1)
    if doubled or len(lines) != len(jobs):
      raise ConvertError(f'{what} tensors not used exactly once: {doubled or "some are missing"}.')


def _receipt(plan, made: Form, lines, comparison) -> dict[str, Any]:
  """No times and no machine: the same conversion gives the same receipt."""
  return {
    'version': 1,
    'plan': digest(plan),
    **{key: plan[key] for key in ('source', 'target', 'description')},
    'target_fingerprint': made.fingerprint(),
    'each_source_tensor_used_once': True,
    'tensors': sorted(lines, key=lambda line: line['target']),
    'logits': comparison,
  }
