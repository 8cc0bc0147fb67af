"""Converts checkpoints between t5x, Hugging Face and ours, and checks them.

  python -m convert import --from {t5x,hf} --model M IN OUT     to ours; OUT is a run directory
  python -m convert export --to {t5x,hf} --model M IN OUT       from ours
  python -m convert verify A B                                  every tensor, logits, routing
  python -m convert inspect X                                   tree, shapes, bytes, step
  python -m convert diff A B                                    what training changed
  python -m convert fsck X                                      is it sound

M is a name of gin/models, a JSON file with the fields of ModelConfig, or left out where the
checkpoint tells its sizes. Exit codes: 0 done or sound, 1 a check failed, 64 cannot be done as
asked.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import sys
import tempfile
import threading
import time

from convert import checks, sizes
from convert.core.forms import Form
from convert.core.names import NamesError
from convert.core.tensors import ConvertError
from convert.formats.hf import MAX_SHARD, tokenizer_files
from convert.run import Options, convert, find_form
from openmoe.config import ConfigError

EXIT_FAILED, EXIT_USAGE = 1, 64
# Of glibc's malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX.
_MALLOC_OPTIONS = ((-3, 32 << 20), (-1, 64 << 20), (-8, 2))
_UNITS = {'KB': 10**3, 'MB': 10**6, 'GB': 10**9}


def _size(text: str) -> int:
  """'5GB' -> bytes."""
  for unit, factor in _UNITS.items():
    if text.upper().endswith(unit):
      return int(float(text[: -len(unit)]) * factor)
  return int(text)


def _bytes(n: float) -> str:
  for unit, factor in reversed(_UNITS.items()):
    if n >= factor:
      return f'{n / factor:.1f} {unit}'
  return f'{n:.0f} bytes'


class PeakMemory:
  """Largest resident memory above what the process had at the start, sampled by a thread."""

  def __init__(self):
    self.base = self._resident()
    self.peak = self.base
    self._stop = threading.Event()
    threading.Thread(target=self._watch, daemon=True).start()

  @staticmethod
  def _resident() -> int:
    with open('/proc/self/statm') as file:
      return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')

  def _watch(self) -> None:
    while not self._stop.wait(0.01):
      self.peak = max(self.peak, self._resident())

  def above_base(self) -> int:
    self._stop.set()
    return max(self.peak, self._resident()) - self.base


def _copy_rate(source: Form) -> float:
  """Bytes per second of a plain copy of the source's files, synced, on the target's disk."""
  place = tempfile.mkdtemp(prefix='.openmoe_copy_', dir='.')
  began, total = time.perf_counter(), 0
  try:
    for folder, _, files in os.walk(source.path):
      for name in files:
        path = os.path.join(place, f'{total}')
        total += os.path.getsize(os.path.join(folder, name))
        with open(os.path.join(folder, name), 'rb') as a, open(path, 'wb') as b:
          shutil.copyfileobj(a, b, 1 << 24)
          b.flush()
          os.fsync(b.fileno())
    return total / max(time.perf_counter() - began, 1e-9)
  finally:
    shutil.rmtree(place)


def _convert(args: argparse.Namespace) -> int:
  importing = args.verb == 'import'
  options = Options(
    dtype=args.dtype,
    optimizer=args.optimizer,
    max_shard=_size(getattr(args, 'max_shard', str(MAX_SHARD))),
    codec=getattr(args, 'codec', 'zstd'),
    tokenizer=tokenizer_files(args.tokenizer) if getattr(args, 'tokenizer', None) else (),
    logits=not args.no_logits,
  )
  memory = PeakMemory()
  form = find_form(args.input, args.kind if importing else 'ours')
  result = convert(form, 'ours' if importing else args.kind, args.output, args.model, options)
  report = {'path': str(result.path), 'tensors': result.tensors, 'bytes': result.nbytes}
  if result.nbytes:
    rate = result.nbytes / result.seconds
    report |= {
      'seconds': round(result.seconds, 2),
      'bytes_per_second': round(rate),
      'peak_memory_above_base': memory.above_base(),
      'logits': result.receipt['logits'],
    }
    if args.compare_copy:
      report['share_of_file_copy'] = round(rate / _copy_rate(form), 3)
  if args.json:
    print(json.dumps(report))
    return 0
  if not result.nbytes:
    print(f'{result.path} is complete already: the same conversion made it.')
    return 0
  print(f'{result.path}: {result.tensors} tensors, {_bytes(result.nbytes)}')
  print(f'{report["seconds"]} s, {_bytes(rate)}/s, each tensor read back', end='')
  share = report.get('share_of_file_copy')
  print(f'; {share:.0%} of a plain file copy' if share is not None else '')
  print(f'peak memory {_bytes(report["peak_memory_above_base"])} above the start')
  if result.receipt['logits']:
    print('logits: ' + ', '.join(f'{k} {v:.3g}' for k, v in result.receipt['logits'].items()))
  return 0


def _inspect(args: argparse.Namespace) -> int:
  form = find_form(args.path)
  tensors = form.tensors()
  total = sum(t.nbytes for t in tensors.values())
  facts = {'form': form.kind, 'path': str(form.path), 'step': form.step, 'sizes': form.sizes()}
  if args.json:
    described = {n: {'shape': list(t.shape), 'dtype': t.dtype.name} for n, t in tensors.items()}
    print(json.dumps(facts | {'bytes': total, 'tensors': described}))
    return 0
  print(f'{form.path}: {form.kind}, step {form.step}, {len(tensors)} tensors, {_bytes(total)}')
  print(', '.join(f'{k}={v}' for k, v in form.sizes().items() if not isinstance(v, dict)))
  shown: tuple[str, ...] = ()
  for name, stored in tensors.items():
    *parents, last = name.replace('.', '/').split('/') if form.kind == 'hf' else name.split('/')
    for depth, parent in enumerate(parents):
      if shown[: depth + 1] != tuple(parents[: depth + 1]):
        print('  ' * depth + parent)
    shown = tuple(parents)
    shape = 'x'.join(map(str, stored.shape)) or 'scalar'
    print(f'{"  " * len(parents)}{last}  {shape} {stored.dtype.name} {_bytes(stored.nbytes)}')
  return 0


def _verify(args: argparse.Namespace) -> int:
  a, b = find_form(args.a), find_form(args.b)
  config = _common_config(a, b, args.model)
  problems, comparison = checks.verify(a, b, config, logits=not args.no_logits)
  if args.json:
    print(json.dumps({'problems': problems, 'logits': comparison}))
  else:
    print('\n'.join(problems) or f'{a.path} and {b.path} agree in every tensor')
    print(', '.join(f'{k} {v:.3g}' for k, v in comparison.items()))
  return EXIT_FAILED if problems else 0


def _common_config(a: Form, b: Form, model: str | None):
  """The sizes of whichever of the two tells them all."""
  try:
    return sizes.of_form(a, model)
  except ConvertError:
    if model is not None:
      raise
    return sizes.of_form(b, None)


def _diff(args: argparse.Namespace) -> int:
  a, b = find_form(args.a), find_form(args.b)
  result = checks.diff(a, b, _common_config(a, b, args.model))
  if args.json:
    print(json.dumps(result))
    return 0
  for name, change in sorted(result['modules'].items(), key=lambda item: -item[1]):
    print(f'{name:18} {change:.3e}')
  for layer, change in result['router_drift'].items():
    experts = result['experts'][layer]
    most = sorted(range(len(experts)), key=lambda e: -experts[e])[:5]
    moved = ', '.join(f'{e} by {experts[e]:.2e}' for e in most)
    print(f'layer {layer}: router drift {change:.3e}; experts that moved most: {moved}')
  return 0


def _fsck(args: argparse.Namespace) -> int:
  form = find_form(args.path)
  problems = checks.fsck(form, sizes.of_form(form, args.model))
  if args.json:
    print(json.dumps({'problems': problems}))
  else:
    print('\n'.join(problems) or f'{form.path} is sound')
  return EXIT_FAILED if problems else 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    'convert', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  verbs = parser.add_subparsers(dest='verb', required=True)
  for verb, flag in (('import', '--from'), ('export', '--to')):
    sub = verbs.add_parser(verb)
    sub.add_argument(flag, dest='kind', choices=('t5x', 'hf'), required=True)
    sub.add_argument('input')
    sub.add_argument('output')
    sub.add_argument('--dtype', choices=('float32', 'bfloat16'), help="default: the source's")
    sub.add_argument('--optimizer', action='store_true', help='carry the optimizer state along')
    sub.add_argument('--no_logits', action='store_true', help='leave out the comparison of logits')
    sub.add_argument(
      '--compare_copy', action='store_true', help='also time a plain copy of the source'
    )
    if verb == 'export':
      sub.add_argument('--max_shard', default='5GB', help='size of Hugging Face weight files')
      sub.add_argument('--codec', choices=('zstd', 'gzip'), default='zstd', help='of t5x chunks')
      sub.add_argument('--tokenizer', help='folder with tokenizer files to put beside the weights')
    sub.set_defaults(run=_convert)
  for verb, run, paths in (
    ('verify', _verify, ('a', 'b')),
    ('inspect', _inspect, ('path',)),
    ('diff', _diff, ('a', 'b')),
    ('fsck', _fsck, ('path',)),
  ):
    sub = verbs.add_parser(verb)
    for path in paths:
      sub.add_argument(path)
    if verb == 'verify':
      sub.add_argument('--no_logits', action='store_true')
    sub.set_defaults(run=run)
  for sub in verbs.choices.values():
    sub.add_argument('--model', help='a name of gin/models, or a JSON file')
    sub.add_argument('--json', action='store_true', help='one JSON object and nothing else')
  return parser


def _bound_the_heap() -> None:
  """Keeps glibc from holding on to large freed blocks, without returning every small piece.

  Left alone it raises its threshold for mapped blocks as they are freed, and keeps hundreds of
  megabytes; if pieces were mapped as well, page faults would take most of the time.
  """
  libc = ctypes.CDLL(None)
  if hasattr(libc, 'mallopt'):
    for option, value in _MALLOC_OPTIONS:
      libc.mallopt(option, value)


def main(argv: list[str] | None = None) -> int:
  args = _parser().parse_args(argv)
  _bound_the_heap()
  try:
    return args.run(args)
  except BrokenPipeError:  # `| head` has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except (ConvertError, NamesError, ConfigError) as error:
    print(f'convert {args.verb}: {error}', file=sys.stderr)
    damaged = args.verb in ('verify', 'fsck')
    return EXIT_FAILED if damaged else EXIT_USAGE


if __name__ == '__main__':
  raise SystemExit(main())
