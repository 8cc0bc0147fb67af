"""Predictions or scores over data: python -m scripts.infer --checkpoint=RUN --input=X --out_dir=OUT

  python -m scripts.infer --checkpoint=runs/openmoe_tiny --input=prompts.jsonl --out_dir=OUT
  python -m scripts.infer --checkpoint=FOLDER --input=demo_prose_full_lm --split=validation \\
    --mode=score --out_dir=OUT --shard_id=0 --num_shards=4
  python -m scripts.infer --checkpoint=FOLDER --input=boolq_fixed --split=test --modules=MODULE ...

X is a .jsonl file of {"inputs": "...", "targets": "..."} (.gz and .zst too), or a seqio task or
mixture. OUT/<name>-<mode>.jsonl-00000-of-00004 has a line an example, in t5x's fields: `inputs`,
and `prediction` or `score`. Every run of another --shard_id does its part; the same command again
goes on where it was stopped, to the same file. Exit codes: 0, 64 where something cannot be done as
asked, 65 where data are damaged, 130 after Ctrl-C.
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import argparse
import pathlib
import sys
import time

from scripts import quiet

quiet.import_tensorflow()

from convert.open import load
from openmoe.data import examples
from openmoe.inference.decode import Sampling
from openmoe.inference.over_data import InferConfig, Mode, infer
from scripts import registry


def run(args: argparse.Namespace) -> None:
  """Opens data and model, and goes through the shard."""
  registry.load(args)
  config = InferConfig(
    name=pathlib.PurePath(args.input).name.partition('.')[0],
    out_dir=args.out_dir,
    mode=args.mode,
    shard_id=args.shard_id,
    num_shards=args.num_shards,
    chunk=args.chunk,
    max_new_tokens=args.max_new_tokens,
    samples=args.samples,
    seed=args.seed,
    stop=tuple(args.stop),
    sampling=Sampling(args.temperature, args.top_k, args.top_p),
  )
  model = load(
    args.checkpoint, dtype=args.dtype, max_length=args.max_length, vocabulary=args.vocabulary
  )
  lengths = (args.inputs_length, args.targets_length)
  found = examples.open_examples(args.input, args.split, model.vocabulary.encode, *lengths)
  times = [time.monotonic()]

  def show(done: int, new: int) -> None:
    times.append(time.monotonic())
    rate = new / max(times[-1] - times[-2], 1e-6)
    said = f'{rate:.1f} examples/s' if new else 'done before'
    print(f'{done} examples, {said}', file=sys.stderr, flush=True)

  print(infer(model, found, config, show))


@command.guarded
def main(argv: list[str] | None = None) -> None:
  parser = command.Parser(__doc__)
  parser.add_argument('--checkpoint', required=True, help='a run, a checkpoint, a HF folder')
  parser.add_argument('--input', required=True, help='a .jsonl file, or a task or mixture')
  parser.add_argument('--out_dir', required=True, help='where the files go')
  parser.add_argument('--split', default='validation', help='of a task')
  parser.add_argument('--mode', default='predict', choices=[mode.value for mode in Mode])
  parser.add_argument('--shard_id', type=int, default=0, help='this part of the examples')
  parser.add_argument('--num_shards', type=int, default=1, help='of so many')
  parser.add_argument('--chunk', type=int, default=64, help='examples between two saves')
  parser.add_argument('--inputs_length', type=int, help='most tokens of the inputs')
  parser.add_argument('--targets_length', type=int, help='most tokens of the targets')
  parser.add_argument('--max_new_tokens', type=int, default=64, help='at most so many')
  parser.add_argument('--stop', action='append', default=[], help='ends a prediction; repeat')
  parser.add_argument('--temperature', type=float, default=0.0, help='0: the likeliest token')
  parser.add_argument('--top_k', type=int, default=0, help='draw among so many; 0 for all')
  parser.add_argument('--top_p', type=float, default=1.0, help='the fewest that reach this mass')
  parser.add_argument('--samples', type=int, default=1, help='predictions of each example')
  parser.add_argument('--seed', type=int, default=0, help='of draws')
  parser.add_argument('--dtype', default='float32', help='float32 or bfloat16')
  parser.add_argument('--max_length', type=int, help='tokens of inputs and what follows')
  parser.add_argument('--vocabulary', help='SentencePiece model of a converted run')
  registry.add_arguments(parser)
  run(parser.parse_args(argv))


if __name__ == '__main__':
  sys.exit(main())
