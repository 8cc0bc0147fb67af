"""Holds the predictions of scripts.plan against published runs.

  python -m scripts.plan_published [--effort full]

Compiles our step nearest to each run of openmoe/pods/published.py and prints the predicted share of
the peak beside the published one, as a table in Markdown; docs/PODS.md has it.
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import os

os.environ['JAX_PLATFORMS'] = 'cpu'  # whatever is here, the plan is for something else

from openmoe.pods import calibration
from openmoe.pods.published import RUNS
from openmoe.pods.request import Effort


@command.guarded
def main() -> None:
  parser = command.Parser(__doc__)
  parser.add_argument('--effort', choices=['fast', 'full'], default='full')
  parser.add_argument('--runs', default='', help='numbers of runs, as 0,2; default: all')
  given = parser.parse_args()
  runs = [RUNS[int(n)] for n in command.names(given.runs)] or RUNS
  share = lambda value: '-' if value is None else f'{value:.1%}'
  found = calibration.compare(Effort(given.effort), runs)
  print('| run | machine | published | predicted, compiler | fused attention | error |')
  print('|---|---|---|---|---|---|')
  for one in found:
    run = ', '.join(filter(None, [one.run.name, one.run.routing]))
    predicted = f'{share(one.low)} to {share(one.high)}' if one.low else 'does not fit'
    error = f'{one.fused / one.published - 1:+.0%}' if one.fused else '-'
    where = one.step.request.target
    print(
      f'| {run} | {where} | {share(one.published)} | {predicted} | {share(one.fused)} | {error} |'
    )
  factor = calibration.correction(found)
  if factor:
    print(f'\nmedian of published over predicted: {factor:.2f}')


if __name__ == '__main__':
  raise SystemExit(main())
