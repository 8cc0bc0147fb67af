"""Trains a model: python -m scripts.train --gin_file=MODEL --gin_file=RUN [--gin.NAME=VALUE ...]

  python -m scripts.train --gin_file=gin/models/openmoe_tiny.gin \\
    --gin_file=gin/runs/pretrain.gin --gin_file=gin/experiments/demo.gin \\
    --gin.MODEL_DIR="'runs/openmoe_tiny'"

The same command continues a run that was stopped, or says that it is complete. Exit codes:
  0   complete
  75  stopped by SIGTERM or SIGINT after saving; start again to continue (EX_TEMPFAIL)
  65  the loss is not finite (EX_DATAERR)
  66  the training data ended before TRAIN_STEPS; what was trained is saved (EX_NOINPUT)
  64  something cannot be run as configured; nothing was compiled (EX_USAGE)
  69  another process of the run is absent or gone; start all again to continue (EX_UNAVAILABLE)
  130 a second Ctrl-C ended it at once
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import sys

from scripts import quiet

quiet.import_tensorflow()

import gin
import jax
from absl import flags

from convert import starting
from openmoe import train as train_lib
from openmoe.data import stream
from openmoe.observe.display import Sheltered
from openmoe.running.facts import facts_of
from scripts import processes, while_training
from scripts.configuration import configure

EXIT_DATA_ENDED, EXIT_STOPPED = 66, 75

_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Print counts, shardings and bytes; run nothing.')
_DEVICES = flags.DEFINE_integer(
  'dry_run_devices', None, 'Plan for so many devices; default: those here.'
)


@command.guarded
def main() -> int:
  arguments = configure()
  if _DRY_RUN.value:
    from scripts import dry_run

    dry_run.show(arguments, _DEVICES.value)
    return 0
  try:
    with processes.joined(lambda: facts_of(arguments), arguments['run'].model_dir):
      return _train(arguments)
  except KeyboardInterrupt:
    print('\nInterrupted a second time: steps since the last checkpoint are lost.', file=sys.stderr)
    return command.INTERRUPTED


def _train(arguments: dict) -> int:
  run = starting.with_own_checkpoint(arguments['run'], arguments['model'])
  given = while_training.with_benchmarks(arguments | {'run': run})
  result = train_lib.train(**given, config_text=gin.config_str())
  if result.end is train_lib.End.STOPPED:
    return EXIT_STOPPED
  if result.end is train_lib.End.DATA:
    return EXIT_DATA_ENDED
  if jax.process_index() == 0:
    from scripts import epilogue

    epilogue.show(result, arguments)
  return 0


def run() -> None:
  """Entry point."""
  # Whoever reads what is shown may go away; training does not end for it.
  sys.stdout, sys.stderr = Sheltered(sys.stdout), Sheltered(sys.stderr)
  processes.run(main, abandoned=lambda: stream.abandoned)


if __name__ == '__main__':
  run()
