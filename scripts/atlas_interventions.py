"""The verb `intervene` of scripts.atlas."""

from __future__ import annotations

import argparse
import itertools

from openmoe.config import ConfigError
from openmoe.observe.text import visible
from scripts import atlas_models
from scripts.atlas_data import add_data, texts_of


def add_intervene(parser: argparse.ArgumentParser) -> None:
  """Arguments of `intervene`."""
  atlas_models.add_model(parser)
  add_data(parser)
  parser.add_argument(
    '--variant', action='append', default=[], help='such as ban=mlp.3:0,5; repeat'
  )
  parser.add_argument('--keep_top', type=float, help="keep this share of a group's top experts")
  parser.add_argument('--of', metavar='FOLDER', help='record that tells a group its top experts')
  parser.add_argument('--by', default='source', help='label of the groups')
  parser.add_argument('--replay', metavar='FOLDER', help='follow a record in place of all this')
  parser.add_argument('--own_weights', action='store_true', help='with it: only its experts')
  parser.add_argument('--results', nargs='+', default=[], metavar='DIRECTORY',
                      help='evaluations to compare by item, the first as it is')  # fmt: skip
  parser.add_argument('--out', help='folder of the page')
  parser.set_defaults(run=intervene)


def _replay(args: argparse.Namespace) -> int:
  from openmoe.atlas import interventions
  from openmoe.atlas.record import Record

  record = Record(args.replay)
  args.capacity = None if record.header.capacity is None else 'released'
  args.length = record.header.length
  found = interventions.replay(atlas_models.open_model(args), record, args.own_weights)
  print(
    f'{found.tokens:,} tokens, loss {found.loss:.4f}, recorded {found.recorded_loss:.4f}; largest '
    f'gap of a log-probability {found.largest_gap:.3g}, {found.other_predictions} other predictions'
  )
  return 0


def _compare(directories: list[str]) -> int:
  from openmoe.atlas.interventions import benchmark_differences
  from openmoe.evaluation import results

  base = results.load_all(directories[0])
  for other in directories[1:]:
    print(visible(f'{other} less {directories[0]}'))
    for row in benchmark_differences(base, results.load_all(other)):
      print(visible('  '.join(row)))
  return 0


def intervene(args: argparse.Namespace) -> int:
  """Measures variants, follows a record, or compares evaluations."""
  from openmoe.atlas import interventions, pages
  from openmoe.atlas.counts import Study
  from openmoe.atlas.record import Record
  from openmoe.atlas.recording import limited
  from openmoe.atlas.sources import encoded
  from openmoe.inference.routing import routed

  if args.results:
    return _compare(args.results)
  if args.replay:
    return _replay(args)
  variants = {words: words for words in args.variant}
  if args.keep_top is not None:
    if not args.of or not 0 < args.keep_top <= 1:
      raise ConfigError('--keep_top=SHARE is in (0, 1] and needs --of=RECORD.')
    variants |= interventions.keep_top(Study(Record(args.of)), args.keep_top, args.by)
  if not variants:
    raise ConfigError('Give --variant, --keep_top, --replay or --results.')
  model = atlas_models.open_model(args)
  models = {interventions.BASE: model}
  models |= {name: routed(model, words) for name, words in variants.items()}
  documents = limited(encoded(model, texts_of(args, model)), args.max_tokens)
  found = interventions.report(
    interventions.measure(models, documents, atlas_models.calls_of(args))
  )
  for row in itertools.chain([found.parts[0].head], found.parts[0].cells):
    print(visible('  '.join(f'{cell!s:<18}' for cell in row)))
  if args.out:
    print(visible(pages.write_page(found, args.out, model.name)))
  return 0
