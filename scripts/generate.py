"""Continues texts, or talks: python -m scripts.generate --checkpoint=runs/openmoe_tiny [PROMPT ...]

  python -m scripts.generate --checkpoint=runs/openmoe_tiny 'import os'
  python -m scripts.generate --checkpoint=FOLDER --prompts_file=prompts.txt --samples=4 \\
    --temperature=0.8 --top_p=0.95 --json
  python -m scripts.generate --checkpoint=FOLDER --chat

Prompts are the arguments, the lines of --prompts_file, or standard input as one text. A single
continuation is shown as it comes. --chat puts each prompt into the model's chat template; without
prompts it is a conversation, ended by an empty line or Ctrl-D. --checkpoint is a run directory, one
of its checkpoints, or a Hugging Face folder. Exit code 64: something cannot be run as asked.
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import argparse
import sys

from scripts import model_flags, quiet, together_flags

quiet.import_tensorflow()

import jax

from convert.open import load
from openmoe.config import ConfigError
from openmoe.inference import console
from openmoe.inference.decode import Sampling


def prompts_from(args: argparse.Namespace) -> list[str]:
  """Prompts of the command line, none for a conversation.

  Raises:
    ConfigError: there are none, or the file is missing or no text.
  """
  prompts = [*args.prompts, *(console.read_prompts(args.prompts_file) if args.prompts_file else ())]
  talks = args.chat and sys.stdin.isatty()
  if not prompts and not talks:
    text = console.decode(sys.stdin.buffer.read(), 'Standard input').rstrip('\n')
    prompts = [text] if text else []
  if not prompts and not talks:
    raise ConfigError('There is no prompt: give arguments, --prompts_file, or text on stdin.')
  if '' in prompts:
    raise ConfigError('An argument is an empty prompt; leave it out.')
  return prompts


def run(args: argparse.Namespace) -> None:
  """Opens the model and shows what it says."""
  sampling = Sampling(args.temperature, args.top_k, args.top_p)
  own = (args.seed, args.chat, args.system)
  asking = console.Asking(args.max_new_tokens, tuple(args.stop), sampling, args.samples, *own)
  prompts = prompts_from(args)
  with together_flags.joined(args, args.checkpoint):
    show(args, prompts, asking)


def show(args: argparse.Namespace, prompts: list[str], asking: console.Asking) -> None:
  """Runs in every process, and prints in the first.

  Raises:
    ConfigError: a conversation is wanted of several processes.
  """
  if args.multiprocess and not prompts:
    raise ConfigError('--multiprocess takes prompts; a conversation has one process.')
  model = load(
    args.checkpoint,
    capacity=args.capacity,
    routing=args.routing,
    **model_flags.of(args),
  )
  if not prompts:
    console.talk(model, asking)
  elif len(prompts) == args.samples == 1 and not args.json and not args.multiprocess:
    console.stream(model, prompts[0], asking)
  else:
    for line in console.lines(model, prompts, asking, args.json):
      if jax.process_index() == 0:
        print(line)


@command.guarded
def main(argv: list[str] | None = None) -> None:
  parser = command.Parser(__doc__)
  parser.add_argument('prompts', nargs='*', metavar='PROMPT')
  parser.add_argument('--checkpoint', default='runs/openmoe_tiny', help='what to load')
  model_flags.add(parser)
  together_flags.add(parser)
  parser.add_argument('--capacity', action='store_true', help='route as in training, with drops')
  parser.add_argument('--routing', default='', help="such as 'ban=mlp.3:0,5'; docs/ROUTING.md")
  parser.add_argument('--prompts_file', help='a prompt a line, in UTF-8')
  parser.add_argument('--max_new_tokens', type=int, default=64, help='at most so many')
  parser.add_argument('--stop', action='append', default=[], help='ends a continuation; repeat')
  parser.add_argument('--temperature', type=float, default=0.0, help='0: the likeliest token')
  parser.add_argument('--top_k', type=int, default=0, help='draw among so many; 0 for all')
  parser.add_argument('--top_p', type=float, default=1.0, help='the fewest that reach this mass')
  parser.add_argument('--samples', type=int, default=1, help='continuations of each prompt')
  parser.add_argument('--seed', type=int, default=0, help='of draws')
  parser.add_argument('--chat', action='store_true', help='prompts are what a user says')
  parser.add_argument('--system', help="system message; OpenMoE's own by default")
  parser.add_argument('--json', action='store_true', help='one JSON object a prompt, nothing else')
  run(parser.parse_intermixed_args(argv))


if __name__ == '__main__':
  sys.exit(main())
