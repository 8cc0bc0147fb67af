"""Arguments of scripts.atlas that say which texts are recorded."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator

from openmoe.config import ConfigError
from openmoe.inference.model import LanguageModel
from scripts import quiet
from tasks import routing_data

FIELDS = ('text', 'source', 'domain', 'language')


def add_data(parser: argparse.ArgumentParser) -> None:
  """Which texts."""
  parser.add_argument('--data', nargs='+', default=[], metavar='FILES')
  for name in FIELDS:
    parser.add_argument(f'--{name}_field', default=name, help='dots go into objects')
  parser.add_argument('--task', help='or a seqio task or mixture')
  parser.add_argument('--split', default='validation')
  parser.add_argument('--questions', help='or MT-Bench: its questions')
  parser.add_argument('--answers', help='and answers, in the format of FastChat')
  parser.add_argument('--max_tokens', type=int, help='stop there')


def texts_of(args: argparse.Namespace, model: LanguageModel) -> Iterator[routing_data.Text]:
  """What the arguments name."""

  if sum(map(bool, (args.data, args.task, args.questions))) != 1:
    raise ConfigError('Give one of --data, --task and --questions.')
  if args.task:
    quiet.import_tensorflow()
    for module in ('demo', 'pretraining', 'sft'):
      importlib.import_module(f'tasks.{module}')

    return routing_data.of_task(args.task, args.split, model.vocabulary)
  if args.questions:
    return routing_data.of_mt_bench(args.questions, args.answers)
  names = routing_data.Fields(
    args.text_field, args.source_field, args.domain_field, args.language_field
  )
  return routing_data.of_files(args.data, names)
