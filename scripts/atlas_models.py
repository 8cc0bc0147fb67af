"""Verbs of scripts.atlas that open a model."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from openmoe.atlas.forward import Calls
from openmoe.inference.model import LanguageModel
from openmoe.observe.display import duration
from scripts.atlas_data import add_data, texts_of


def add_model(parser: argparse.ArgumentParser) -> None:
  """Which checkpoint, and how its rows are put together."""
  parser.add_argument('--checkpoint', required=True)
  parser.add_argument('--vocabulary', help='SentencePiece model, where the checkpoint has none')
  parser.add_argument('--model', help='its sizes, where the checkpoint does not tell them')
  parser.add_argument('--dtype', default='float32')
  parser.add_argument(
    '--length', type=int, default=1024, help='longest row; texts go on in another'
  )
  parser.add_argument('--capacity', choices=('released',), help='with slots; else nothing drops')
  for name, kind in (('group_size', int), ('capacity_factor', float)):
    parser.add_argument(f'--{name}', type=kind, help="in place of the checkpoint's")
  parser.add_argument('--rows', type=int, default=8, help='rows of a call with --capacity')
  parser.add_argument('--ignore_padding', choices=('on', 'off'), help='as above')


def calls_of(args: argparse.Namespace) -> Calls:
  padding = None if args.ignore_padding is None else args.ignore_padding == 'on'
  sizes = (args.length, args.rows, args.group_size, args.capacity_factor)
  return Calls(bool(args.capacity), *sizes, padding)


def open_model(args: argparse.Namespace) -> LanguageModel:
  """The checkpoint, by this project or by transformers."""
  if getattr(args, 'transformers', False):
    from openmoe.atlas.transformers_models import TransformersModel

    return TransformersModel.open(args.checkpoint, args.vocabulary, args.dtype)
  from convert.open import load

  options = {'vocabulary': args.vocabulary, 'model': args.model, 'dtype': args.dtype}
  return load(args.checkpoint, max_length=args.length, capacity=bool(args.capacity), **options)


def add_record(parser: argparse.ArgumentParser) -> None:
  """Arguments of `record`."""
  add_model(parser)
  add_data(parser)
  parser.add_argument('--out', required=True, help='folder of the record')
  parser.add_argument('--series', action='store_true', help='every checkpoint of a run or series')
  parser.add_argument('--transformers', action='store_true', help='open it with transformers')
  parser.add_argument('--no_probs', action='store_true', help='leave all probabilities out')
  parser.set_defaults(run=record)


def show(progress) -> None:
  """One line that is written over."""
  share = '' if progress.share is None else f'{progress.share:.0%}, {duration(progress.left)} left'
  end = '\r' if sys.stderr.isatty() else '\n'
  text = f'{progress.tokens:,} tokens, {progress.rate:,.0f}/s {share}'
  print(f'{text:<60}', end=end, file=sys.stderr, flush=True)


def record(args: argparse.Namespace) -> int:
  """Records a checkpoint, or all of a series."""
  if not args.series:
    return _record(args, args.checkpoint, args.out)
  from convert.series import checkpoints

  for path in checkpoints(args.checkpoint):
    _record(args, str(path), f'{args.out}/{path.name}')
  return 0


def _record(args: argparse.Namespace, checkpoint: str, out: str) -> int:
  from openmoe.atlas import recording
  from openmoe.atlas.sources import encoded
  from openmoe.evaluation.run import tokenizer_digest

  args = argparse.Namespace(**vars(args) | {'checkpoint': checkpoint})
  model = open_model(args)
  about: dict[str, Any] = {'tokenizer': tokenizer_digest(model.vocabulary)}
  about['sources'] = ' '.join([*args.data, args.task or '', args.questions or '']).strip()
  limits = {
    'most_tokens': args.max_tokens,
    'count': sum(1 for _ in texts_of(args, model)) if args.max_tokens is None else None,
    'show': show,
  }
  documents, probs = encoded(model, texts_of(args, model)), not args.no_probs
  if args.transformers:
    from openmoe.atlas import transformers_models

    writer = transformers_models.record(
      model, documents, out, args.length, about=about, probs=probs, **limits
    )
  else:
    from convert.open import provenance

    about |= provenance(checkpoint)
    writer = recording.record(
      model, documents, out, calls_of(args), about=about, probs=probs and None, **limits
    )
  print(f'\n{out}: {writer.tokens:,} tokens of {writer.documents:,} documents')
  return 0
