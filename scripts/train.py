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
  130 a second Ctrl-C ended it at once
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import os
import sys

from scripts import quiet

quiet.import_tensorflow()

import gin
import jax
from absl import flags

from openmoe import train as train_lib
from openmoe.data import stream
from openmoe.observe.display import Sheltered
from scripts import data_flags, gin_flags, processes

EXIT_DATA_ENDED, EXIT_STOPPED = 66, 75

_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Print counts, shardings and bytes; run nothing.')
_DEVICES = flags.DEFINE_integer(
  'dry_run_devices', None, 'Plan for so many devices; default: those here.'
)


def configure() -> dict:
  """Arguments of openmoe.train.train from the gin flags, all validated."""
  gin_flags.parse()
  data_flags.use()
  return gin_flags.bindings('train.train')


@command.guarded
def main() -> int:
  if not _DRY_RUN.value:
    processes.join()
  arguments = configure()
  if _DRY_RUN.value:
    from scripts import dry_run

    dry_run.show(arguments, _DEVICES.value)
    return 0
  try:
    return _train(arguments)
  except KeyboardInterrupt:
    print('\nInterrupted a second time: steps since the last checkpoint are lost.', file=sys.stderr)
    return command.INTERRUPTED


def _train(arguments: dict) -> int:
  result = train_lib.train(**arguments, config_text=gin.config_str())
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
  try:
    gin_flags.run(main)
  except SystemExit as end:
    if stream.abandoned:  # the thread of a stuck read would keep the process for ever
      os._exit(end.code if isinstance(end.code, int) else 1)
    raise


if __name__ == '__main__':
  run()
