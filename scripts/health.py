"""Says what the health rules would have noted in a recorded run: python -m scripts.health RUN

  python -m scripts.health runs/openmoe_tiny
  python -m scripts.health runs/openmoe_tiny --gin_file=gin/health/guard.gin --json

RUN is a run directory; its metrics.jsonl is read, nothing else. Rules are those of
openmoe/health/rules.py, which --gin_file and --gin.NAME=VALUE extend as in training.
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import json
import sys

from absl import flags
from rich.console import Console
from rich.text import Text

from openmoe.health import HealthConfig
from openmoe.health.replay import Replay, replay
from openmoe.observe.text import visible
from scripts import gin_flags


def configuration(files: list[str], bindings: list[str]) -> HealthConfig:
  """The rules with what gin files and bindings say of health.HealthConfig."""
  if not files:
    return HealthConfig()
  given = [*(f'--gin_file={f}' for f in files), *(f'--gin_bindings={b}' for b in bindings)]
  flags.FLAGS([sys.argv[0], *given])
  gin_flags.parse()
  return HealthConfig(**gin_flags.bindings('health.HealthConfig'))


def show(found: Replay, run: str) -> None:
  """Prints events as a table, and what was looked at."""
  console = Console(highlight=False)
  if found.events:
    console.print(found.table())
  fired = sum(event.fired for event in found.events)
  summary = f'{visible(run)}: {len(found.rules)} rules over {found.records} records, {fired} fired.'
  console.print(Text(summary))
  if found.blind:
    console.print(Text(f'Not recorded, so not watched: {", ".join(found.blind)}.', style='dim'))


@command.guarded
def main(argv: list[str] | None = None) -> None:
  parser = command.Parser(__doc__)
  parser.add_argument('run', metavar='RUN', help='run directory')
  parser.add_argument('--json', action='store_true', help='print JSON')
  parser.add_argument('--gin_file', action='append', default=[], metavar='FILE', help='more rules')
  parser.add_argument(
    '--gin_bindings', action='append', default=[], metavar='NAME=VALUE', help='as --gin.NAME=VALUE'
  )
  arguments = parser.parse_args(gin_flags.rewrite(sys.argv[1:] if argv is None else argv))
  found = replay(arguments.run, configuration(arguments.gin_file, arguments.gin_bindings))
  if arguments.json:
    print(json.dumps(found.as_json(), indent=1))
  else:
    show(found, arguments.run)


if __name__ == '__main__':
  sys.exit(main())
