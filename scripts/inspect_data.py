"""Shows what a model is trained on.

  python -m scripts.inspect_data --mixture=demo_ul2 --step=3
      prints the decoded rows of one batch: source, document, objective; tokens that carry loss in
      green, the rest dim, sentinels in yellow.
  python -m scripts.inspect_data --mixture=demo_ul2 --summary
      prints tokens by source, padding and loss share, and the rate, over --steps batches.

  python -m scripts.inspect_data --run_dir=runs/openmoe_tiny --step=187
      the same for a batch of a run: with its data configuration, from the data position of its
      newest checkpoint at or before the step, so at most a checkpoint period is read over.

--modules are imported first, as they register the tasks.
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import argparse
import ast
import json
import sys

from scripts import quiet

quiet.import_tensorflow()

from openmoe.config import ConfigError, DataConfig
from openmoe.data import inspection
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
  return DataConfig(
    args.mixture,
    lengths,
    args.batch_size,
    split=args.split,
    seed=args.seed,
    num_shards=args.num_shards,
    use_cached=args.use_cached,
  )


def run(args: argparse.Namespace) -> str:
  """What is printed."""
  if bool(args.mixture) == bool(args.run_dir):
    raise ConfigError('Give either --mixture or --run_dir.')
  if args.step < 0 or args.steps < 1:
    raise ConfigError(f'--step={args.step} must be 0 or more, --steps={args.steps} at least 1.')
  registry.load(args)
  first, config, positions = 0, None, None
  if args.run_dir:
    first, config, positions = inspection.position_of_run(args.run_dir, args.step)
  config = config or data_config(args)
  with ShardedStream(config, range(config.num_shards)) as stream:
    if positions:
      stream.restore(positions)
    if not args.summary:
      color = args.color == 'always' or (args.color == 'auto' and sys.stdout.isatty())
      return inspection.step_text(config, stream, args.step - first, color)
    result = inspection.summarise(config, stream, args.steps)
  if args.json:
    return json.dumps(result)
  return visible('\n'.join(f'{name}: {value}' for name, value in result.items()))


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
  registry.add_arguments(parser)
  print(run(parser.parse_args(argv)))


if __name__ == '__main__':
  sys.exit(main())
