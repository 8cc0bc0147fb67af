"""The flags that say how a model is loaded: forms, lengths, and where its parts lie."""

from __future__ import annotations

import argparse
from typing import Any


def add(parser: argparse.ArgumentParser) -> None:
  """Adds them."""
  parser.add_argument('--dtype', default='float32', help='float32 or bfloat16')
  parser.add_argument('--vocabulary', help='SentencePiece model of a converted run')
  parser.add_argument('--max_length', type=int, help='tokens of prompt and continuation')
  parser.add_argument('--num_model_partitions', type=int, help='default: what fits')
  parser.add_argument('--num_expert_partitions', type=int, default=1, help='of the expert axis')
  parser.add_argument('--weights', default='float', help='float, int8, or int8_layers')
  parser.add_argument('--offload', default='none', help='experts in ram, or on disk')
  parser.add_argument('--expert_budget', type=float, help='GiB of experts in memory with disk')
  parser.add_argument('--offload_dir', help="of the experts' file; default: the system's")


def of(args: argparse.Namespace) -> dict[str, Any]:
  """What convert.open.load takes of them."""
  budget = args.expert_budget
  names = ('dtype', 'vocabulary', 'max_length', 'num_model_partitions', 'num_expert_partitions')
  return {name: getattr(args, name) for name in names} | {
    'weights': args.weights,
    'offload': args.offload,
    'expert_budget': None if budget is None else int(budget * (1 << 30)),
    'offload_dir': args.offload_dir,
  }
