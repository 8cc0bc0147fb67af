"""Shows what a model is trained on.

  python -m scripts.inspect_data --mixture=demo_ul2 --step=3
      prints the decoded rows of one batch: source, document, objective; tokens that carry loss in
      green, the rest dim, sentinels in yellow.
  python -m scripts.inspect_data --mixture=demo_ul2 --summary
      prints tokens by source, padding and loss share, and the rate, over --steps batches.

  python -m scripts.inspect_data --run_dir=runs/openmoe_tiny --step=187
      the same for a batch of a run: with its data configuration, from the data position of its
      newest checkpoint at or before the step, so at most a checkpoint period is read over.
  python -m scripts.inspect_data --run_dir=runs/openmoe_tiny --document=prose.jsonl:17
      every step, row and segment in which the document was trained on, up to the newest
      checkpoint; with --mixture, over the first --steps batches. FILE:RECORD as the rows of a step
      have it, or the number of a document. All is read again, from the beginning.
  python -m scripts.inspect_data --run_dir=runs/openmoe_tiny --worst=187
      the documents of a batch by their loss in the newest checkpoint at or before the step.

--modules are imported first, as they register the tasks.
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import argparse
import ast
import json
import sys
from collections.abc import Iterator

from scripts import quiet

quiet.import_tensorflow()

from openmoe.config import ConfigError, DataConfig
from openmoe.data import inspection, occurrences
from openmoe.data.stream import ShardedStream
from openmoe.observe.text import visible
from scripts import registry


def data_config(args: argparse.Namespace) -> DataConfig:
  """The data that the arguments describe.

  Raises:
    ConfigError: they are no valid data.
  """
  lengths = {'targets': 256} if 'full_lm' in args.mixture else {'inputs': 128, 'targets': 128}
  if args.task_feature_lengths:
    try:
      lengths = ast.literal_eval(args.task_feature_lengths)
    except (ValueError, SyntaxError) as error:
      raise ConfigError(
        f"--task_feature_lengths={args.task_feature_lengths} must look like {{'targets': 256}}."
      ) from error
  named = {n: getattr(args, n) for n in ('split', 'seed', 'num_shards', 'use_cached')}
  return DataConfig(args.mixture, lengths, args.batch_size, **named)


def run(args: argparse.Namespace) -> Iterator[str]:
  """What is printed, piece by piece."""
  if bool(args.mixture) == bool(args.run_dir):
    raise ConfigError('Give either --mixture or --run_dir.')
  if args.step < 0 or args.steps < 1:
    raise ConfigError(f'--step={args.step} must be 0 or more, --steps={args.steps} at least 1.')
  registry.load(args)
  if args.document is not None:
    if args.run_dir:
      return occurrences.of_run(args.run_dir, args.document)
    return occurrences.of_mixture(data_config(args), args.document, args.steps)
  if args.worst is not None:
    from convert.open import load

    return occurrences.hardest(args.run_dir or '', args.worst, load)
  return batch_lines(args)


def batch_lines(args: argparse.Namespace) -> Iterator[str]:
  """The rows of a batch, or figures over many."""
  found = inspection.position_of_run(args.run_dir, args.step) if args.run_dir else None
  config = found.data if found else data_config(args)
  with ShardedStream(config, range(config.num_shards)) as stream:
    if found:
      stream.restore(found.positions)
    if not args.summary:
      color = args.color == 'always' or (args.color == 'auto' and sys.stdout.isatty())
      ahead = args.step - (found.step if found else 0)
      yield inspection.step_text(config, stream, ahead, color)
      return
    result = inspection.summarise(config, stream, args.steps)
  if args.json:
    yield json.dumps(result)
  else:
    yield visible('\n'.join(f'{name}: {value}' for name, value in result.items()))


@command.guarded
def main(argv: list[str] | None = None) -> None:
  parser = command.Parser(__doc__)
  parser.add_argument('--mixture', help='task or mixture')
  parser.add_argument('--run_dir', help='or the directory of a run')
  parser.add_argument('--step', type=int, default=0, help='batch, from 0: what step + 1 trains on')
  parser.add_argument('--summary', action='store_true', help='figures over --steps batches instead')
  parser.add_argument('--steps', type=int, default=20, help='batches of the summary')
  parser.add_argument('--json', action='store_true', help='the summary as one JSON object')
  parser.add_argument('--task_feature_lengths', help="such as {'inputs': 128, 'targets': 128}")
  parser.add_argument('--batch_size', type=int, default=8, help='rows of the global batch')
  parser.add_argument('--num_shards', type=int, default=8, help='logical shards')
  parser.add_argument('--seed', type=int, default=0, help='data seed')
  parser.add_argument('--split', default='train')
  parser.add_argument('--use_cached', action='store_true', help='what scripts.cache_tasks wrote')
  parser.add_argument('--text_files', help='files to register as text_files_*')
  parser.add_argument('--color', choices=('auto', 'always', 'never'), default='auto')
  parser.add_argument('--document', help='FILE:RECORD or number: where it was trained on')
  parser.add_argument('--worst', type=int, metavar='STEP', help='documents of a batch by loss')
  registry.add_arguments(parser)
  for text in run(parser.parse_args(argv)):
    print(text, flush=True)


if __name__ == '__main__':
  sys.exit(main())
