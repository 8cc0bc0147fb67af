"""Tells whether what a prompt gives depends on its batch: python -m scripts.check_batch

  python -m scripts.check_batch --checkpoint=runs/openmoe_tiny
  python -m scripts.check_batch --checkpoint=FOLDER --capacity --prompts_file=prompts.txt --json

The prompts are continued alone, in one batch, shuffled, beside a long one, among rows that crowd a
few experts, and over all devices where there are several. Without --capacity the tokens must be
the same in all ways: exit code 1 says that they are not. With it, the table says how much is
dropped and how far answers move. Exit code 64: something cannot be run as asked.
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import argparse
import dataclasses
import json
import sys

from scripts import quiet

quiet.import_tensorflow()

import jax
from rich.console import Console
from rich.table import Table

from convert.open import load
from openmoe.inference import console
from openmoe.inference.contract import Row, check

PROMPTS = (
  'import os',
  'def main(',
  'The',
  'class A:\n  """',
  'Once upon a time there was',
  '1 + 1 =',
)


def run(args: argparse.Namespace) -> int:
  """Prints a table; 1 where nothing may be dropped and tokens differ."""
  texts = console.read_prompts(args.prompts_file) if args.prompts_file else PROMPTS
  options = {'dtype': args.dtype, 'max_length': args.max_length, 'vocabulary': args.vocabulary}
  options |= {'capacity': args.capacity}
  split = load(args.checkpoint, **options) if len(jax.devices()) > 1 else None
  model = load(args.checkpoint, devices=jax.devices()[:1], **options)
  prompts = [model.vocabulary.encode(text) for text in texts]
  rows = check(model, prompts, args.max_new_tokens, split)
  if args.json:
    print(json.dumps([dataclasses.asdict(row) for row in rows]))
  else:
    show(rows, model.name)
  return int(not args.capacity and any(row.tokens for row in rows))


def show(rows: list[Row], name: str) -> None:
  """Prints the table."""
  table = Table('asked for', 'other tokens', 'largest difference of a log-probability', 'dropped')
  table.title = f'{name}, against each prompt alone'
  for row in rows:
    table.add_row(row.way, str(row.tokens), f'{row.log_prob:.2e}', f'{row.dropped:.1%}')
  Console().print(table)


@command.guarded
def main(argv: list[str] | None = None) -> int:
  parser = command.Parser(__doc__)
  parser.add_argument('--checkpoint', default='runs/openmoe_tiny', help='what to load')
  parser.add_argument('--prompts_file', help='a prompt a line, in UTF-8')
  parser.add_argument('--max_new_tokens', type=int, default=16, help='of every prompt')
  parser.add_argument('--capacity', action='store_true', help='route as in training, with drops')
  parser.add_argument('--dtype', default='float32', help='float32 or bfloat16')
  parser.add_argument('--max_length', type=int, default=256, help='tokens of a sequence')
  parser.add_argument('--vocabulary', help='SentencePiece model of a converted run')
  parser.add_argument('--json', action='store_true', help='one JSON list, nothing else')
  return run(parser.parse_args(argv))


if __name__ == '__main__':
  sys.exit(main())
