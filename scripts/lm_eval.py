"""lm-evaluation-harness with our models: python -m scripts.lm_eval --model openmoe ...

  python -m scripts.lm_eval run --model openmoe \\
    --model_args checkpoint=runs/openmoe_tiny,dtype=float32 --tasks arc_easy --limit 20

Everything else is the harness's own command line (extra `eval`).
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import sys

from scripts import quiet

quiet.import_tensorflow()

from convert.open import load
from openmoe.evaluation import harness


@command.guarded
def main() -> int | None:
  harness.register(load)
  from lm_eval.__main__ import cli_evaluate

  return cli_evaluate()


if __name__ == '__main__':
  sys.exit(main())
