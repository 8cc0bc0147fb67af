"""Where data lies: the one place that reads it from outside.

Tasks are registered at import and look their data up when a dataset is opened, so setting the
variable before the first batch is early enough.
"""

from __future__ import annotations

import os

DEMO_DATA_DIR = 'runs/demo_data'


def data_dir() -> str:
  """OPENMOE_DATA_DIR, or runs/demo_data under the working directory."""
  return os.environ.get('OPENMOE_DATA_DIR') or DEMO_DATA_DIR
