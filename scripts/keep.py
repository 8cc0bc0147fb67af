"""Keeps a run going until it is complete: bash scripts/keep.sh [OPTION ...] -- COMMAND ...

  bash scripts/keep.sh -- bash scripts/run_pretrain.sh
  bash scripts/keep.sh --tpu=NAME --zone=ZONE --type=v4-32 --runtime=tpu-ubuntu2204-base \\
    --more=--spot --run_dir=gs://bucket/run -- bash openmoe/scripts/run_pretrain.sh
  bash scripts/keep.sh --slurm --more=--nodes=4 -- bash scripts/run_pretrain.sh

Starts COMMAND again when it ends with 75, 69, 137 or another signal, or its machine is lost, after
a wait that doubles while no step is gained. Stops at 0, 64, 65, 66 and 130, and at the third death
in a row at one step. Ends with the code of the last start; --log has each, what it did and lost.
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import os
import sys

from openmoe.running.keeper import Keeper, Place, run_dir_of
from openmoe.running.places import QueuedTpu, Slurm

_LOG = 'keep.jsonl'


def parser() -> command.Parser:
  options = command.Parser(__doc__)
  options.add_argument(
    '--run_dir', help='whose steps are counted; default: MODEL_DIR of COMMAND or the environment'
  )
  options.add_argument('--log', help=f'default: {_LOG} in the run directory if local, else here')
  options.add_argument('--wait', type=float, default=10.0, help='seconds before the next start')
  options.add_argument('--most_wait', type=float, default=600.0, help='seconds at most')
  options.add_argument('--tpu', metavar='NAME', help='a queued resource of Google Cloud')
  options.add_argument('--zone', help='of --tpu')
  options.add_argument('--type', help='of --tpu, such as v4-32')
  options.add_argument('--runtime', help='of --tpu: its --runtime-version')
  options.add_argument('--slurm', action='store_true', help='as a batch job')
  options.add_argument(
    '--more', action='append', default=[], help='an argument of gcloud create, or of sbatch; repeat'
  )
  options.add_argument('command', nargs='+', metavar='COMMAND', help='what is run')
  return options


def place(options) -> Place:
  """Where the command runs."""
  if options.tpu:
    shape = (options.zone, options.type, options.runtime)
    if not all(shape):
      raise SystemExit(command.fail('--tpu needs --zone, --type and --runtime.'))
    return QueuedTpu(options.tpu, *shape, more=options.more)
  return Slurm(options.more) if options.slurm else Place()


@command.guarded
def main(argv: list[str] | None = None) -> int:
  options = parser().parse_args(argv)
  run_dir = options.run_dir or run_dir_of(options.command)
  local = run_dir is not None and '://' not in run_dir
  log = options.log or (os.path.join(run_dir, _LOG) if local else _LOG)
  say = lambda text: print(text, flush=True)
  waits = (options.wait, options.most_wait)
  return Keeper(options.command, run_dir, place(options), log, *waits, note=say).keep()


if __name__ == '__main__':
  sys.exit(main())
