"""The command line of conversion.

Converts checkpoints between t5x, Hugging Face and ours, and checks them.

  python -m convert import --from {t5x,hf} --model M IN OUT     to ours; OUT is a run directory
  python -m convert export --to {t5x,hf} --model M IN OUT       from ours
  python -m convert series SOURCE... OUT                        every checkpoint, OUT/stepN-tokensMB
  python -m convert verify A B                                  every tensor, logits, routing
  python -m convert inspect X                                   tree, shapes, bytes, step
  python -m convert diff A B                                    what training changed
  python -m convert fsck X                                      is it sound
  python -m convert classifier IN OUT                           of scripts.classify <-> transformers

M is a name of gin/models, a JSON file with the fields of ModelConfig, or left out where the
checkpoint tells its sizes. Exit codes: 0 done or sound, 1 a check failed, 64 cannot be done as
asked.
"""

from __future__ import annotations

import argparse
import json

from convert import checks, sizes
from convert.core.forms import Form, Options, reading
from convert.core.names import NamesError
from convert.core.source import find_form
from convert.core.tensors import ConvertError
from convert.formats.hf import MAX_SHARD, tokenizer_files
from convert.run import convert
from openmoe.config import ConfigError
from openmoe.observe import command
from openmoe.observe.text import visible

EXIT_FAILED = 1
_UNITS = {'KB': 10**3, 'MB': 10**6, 'GB': 10**9}


def _size(text: str) -> int:
  """'5GB' -> bytes.

  Raises:
    ConfigError: it is no size.
  """
  number, factor = text.upper(), 1
  for unit, bytes_of_unit in _UNITS.items():
    if number.endswith(unit):
      number, factor = number.removesuffix(unit), bytes_of_unit
  try:
    size = float(number) * factor
  except ValueError:
    size = 0
  if not 1 <= size < 1 << 62:
    raise ConfigError(f'--max_shard={text} is no size; give bytes, or a number with KB, MB or GB.')
  return int(size)


def _bytes(n: float) -> str:
  for unit, factor in reversed(_UNITS.items()):
    if n >= factor:
      return f'{n / factor:.1f} {unit}'
  return f'{n:.0f} bytes'


def _say(*lines: str) -> None:
  """Prints lines in which names from files may stand."""
  for line in lines:
    print(visible(line))


def _convert(args: argparse.Namespace) -> int:
  importing = args.verb == 'import'
  options = Options(
    dtype=args.dtype,
    optimizer=args.optimizer,
    max_shard=_size(getattr(args, 'max_shard', str(MAX_SHARD))),
    codec=getattr(args, 'codec', 'zstd'),
    orbax=getattr(args, 'orbax', False),
    tokenizer=tokenizer_files(args.tokenizer) if getattr(args, 'tokenizer', None) else (),
    logits=not args.no_logits,
  )
  form = find_form(args.input, args.kind if importing else 'ours')
  result = convert(form, 'ours' if importing else args.kind, args.output, args.model, options)
  report = {'path': str(result.path), 'tensors': result.tensors, 'bytes': result.nbytes}
  if result.nbytes:
    rate = result.nbytes / result.seconds
    report |= {'seconds': round(result.seconds, 2), 'bytes_per_second': round(rate)}
    report['logits'] = result.receipt['logits']
  if args.json:
    print(json.dumps(report))
    return 0
  if not result.nbytes:
    _say(f'{result.path} is complete already: the same conversion made it.')
    return 0
  _say(f'{result.path}: {result.tensors} tensors, {_bytes(result.nbytes)}')
  print(f'{report["seconds"]} s, {_bytes(rate)}/s, each tensor read back')
  if result.receipt['logits']:
    print('logits: ' + ', '.join(f'{k} {v:.3g}' for k, v in result.receipt['logits'].items()))
  return 0


def _inspect(args: argparse.Namespace) -> int:
  form = find_form(args.path)
  with reading(form.path):
    tensors, told = form.tensors(), form.sizes()
  total = sum(t.nbytes for t in tensors.values())
  facts = {'form': form.kind, 'path': str(form.path), 'step': form.step, 'sizes': told}
  if args.json:
    described = {n: {'shape': list(t.shape), 'dtype': t.dtype.name} for n, t in tensors.items()}
    print(json.dumps(facts | {'bytes': total, 'tensors': described}))
    return 0
  _say(f'{form.path}: {form.kind}, step {form.step}, {len(tensors)} tensors, {_bytes(total)}')
  _say(', '.join(f'{k}={v}' for k, v in told.items() if not isinstance(v, dict)))
  shown: tuple[str, ...] = ()
  for name, stored in tensors.items():
    *parents, last = name.split(form.separator)
    for depth, parent in enumerate(parents):
      if shown[: depth + 1] != tuple(parents[: depth + 1]):
        _say('  ' * depth + parent)
    shown = tuple(parents)
    shape = 'x'.join(map(str, stored.shape)) or 'scalar'
    _say(f'{"  " * len(parents)}{last}  {shape} {stored.dtype.name} {_bytes(stored.nbytes)}')
  return 0


def _verify(args: argparse.Namespace) -> int:
  a, b = find_form(args.a), find_form(args.b)
  config = _common_config(a, b, args.model)
  problems, comparison = checks.verify(a, b, config, logits=not args.no_logits)
  if args.json:
    print(json.dumps({'problems': problems, 'logits': comparison}))
  else:
    _say(*problems or [f'{a.path} and {b.path} agree in every tensor'])
    print(', '.join(f'{k} {v:.3g}' for k, v in comparison.items()))
  return EXIT_FAILED if problems else 0


def _series(args: argparse.Namespace) -> int:
  from convert.series import convert_series

  files = tokenizer_files(args.tokenizer) if args.tokenizer else ()
  options = Options(args.dtype, tokenizer=files, logits=not args.no_logits)
  *sources, out = args.paths
  if not sources:
    raise ConfigError('series takes sources and, behind them, the folder of the series.')
  made = []
  for name, result in convert_series(
    sources, args.kind, out, args.model, options, args.tokens_per_step
  ):
    made.append({'name': name, 'path': str(result.path), 'bytes': result.nbytes})
    if not args.json:
      _say(f'{name}: {_bytes(result.nbytes) if result.nbytes else "complete already"}')
  if args.json:
    print(json.dumps(made))
  return 0


def _classifier(args: argparse.Namespace) -> int:
  from convert import classifier  # opens tokenizers and a model, which nothing else here needs

  line = classifier.convert(args.input, args.output)
  _say(json.dumps({'path': args.output, 'made': line}) if args.json else line)
  return 0


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
    _say(*problems or [f'{form.path} is sound'])
  return EXIT_FAILED if problems else 0


def _parser() -> argparse.ArgumentParser:
  parser = command.Parser(__doc__, prog='convert')
  verbs = parser.add_subparsers(dest='verb', required=True)
  for verb, flag, doc in (
    ('import', '--from', 'Makes a checkpoint of ours, in the run directory OUTPUT.'),
    ('export', '--to', 'Makes a checkpoint of another form from one of ours.'),
  ):
    sub = verbs.add_parser(verb, doc=doc)
    sub.add_argument(flag, dest='kind', choices=('t5x', 'hf'), required=True)
    sub.add_argument('input')
    sub.add_argument('output')
    sub.add_argument('--dtype', choices=('float32', 'bfloat16'), help="default: the source's")
    sub.add_argument('--optimizer', action='store_true', help='carry the optimizer state along')
    sub.add_argument('--no_logits', action='store_true', help='leave out the comparison of logits')
    if verb == 'export':
      sub.add_argument('--max_shard', default='5GB', help='size of Hugging Face weight files')
      sub.add_argument('--codec', choices=('zstd', 'gzip'), default='zstd', help='of t5x chunks')
      sub.add_argument('--orbax', action='store_true', help="as t5x's present default writes")
      sub.add_argument('--tokenizer', help='folder with tokenizer files to put beside the weights')
    sub.set_defaults(run=_convert)
  sub = verbs.add_parser('series', doc='Makes stepN-tokensMB of every checkpoint of a run.')
  sub.add_argument('paths', nargs='+', metavar='SOURCE... OUT')
  sub.add_argument('--to', dest='kind', choices=('t5x', 'hf'), default='hf')
  sub.add_argument('--dtype', choices=('float32', 'bfloat16'), help="default: the source's")
  sub.add_argument('--tokens_per_step', type=int, help='where a checkpoint does not tell')
  sub.add_argument('--tokenizer', help='folder with tokenizer files to put beside the weights')
  sub.add_argument('--no_logits', action='store_true', help='leave out the comparison of logits')
  sub.set_defaults(run=_series)
  for verb, run, paths, doc in (
    ('verify', _verify, ('a', 'b'), 'Compares every tensor, logits and routing.'),
    ('inspect', _inspect, ('path',), 'Shows tree, shapes, bytes and step.'),
    ('diff', _diff, ('a', 'b'), 'Tells what training changed from A to B.'),
    ('fsck', _fsck, ('path',), 'Tells whether a checkpoint is sound.'),
    ('classifier', _classifier, ('input', 'output'), 'Makes a classifier of the other form.'),
  ):
    sub = verbs.add_parser(verb, doc=doc)
    for path in paths:
      sub.add_argument(path)
    if verb == 'verify':
      sub.add_argument('--no_logits', action='store_true')
    sub.set_defaults(run=run)
  for sub in verbs.choices.values():
    sub.add_argument('--model', help='a name of gin/models, or a JSON file')
    sub.add_argument('--json', action='store_true', help='one JSON object and nothing else')
  return parser


def run(argv: list[str] | None = None) -> int:
  """Does what the arguments say; returns the exit code."""
  args = _parser().parse_args(argv)
  try:
    return args.run(args)
  except (ConvertError, NamesError, ConfigError) as error:
    found = args.verb in ('verify', 'fsck')  # there it is the result
    return command.fail(f'{args.verb}: {error}', EXIT_FAILED if found else error.exit_code)
