"""Where data lies: the one place that reads it from outside.

Tasks are registered at import and look their data up when a dataset is opened, so setting the
variable before the first batch is early enough.
"""

from __future__ import annotations

import dataclasses
import os

import seqio

from openmoe.config import ConfigError

DEMO_DATA_DIR = 'runs/demo_data'


def data_dir() -> str:
  """OPENMOE_DATA_DIR, or runs/demo_data under the working directory."""
  return os.environ.get('OPENMOE_DATA_DIR') or DEMO_DATA_DIR


def vocabulary_path() -> str:
  """OPENMOE_VOCABULARY: the umT5 SentencePiece model, a file or a folder, local or gs://.

  Raises:
    ConfigError: if it is not set.
  """
  path = os.environ.get('OPENMOE_VOCABULARY')
  if not path:
    raise ConfigError(
      'The umT5 vocabulary is not set: set OPENMOE_VOCABULARY (or --gin.VOCABULARY) to a '
      'SentencePiece model of 256000 pieces, such as spiece.model of google/umt5-small.'
    )
  return path


@dataclasses.dataclass(frozen=True)
class Locations:
  """Locations given in gin rather than in the environment; None leaves what is set.

  Attributes:
    vocabulary: see vocabulary_path.
    data_dir: see data_dir.
    cache_dir: where scripts.cache_tasks wrote; read by data with use_cached.
  """

  vocabulary: str | None = None
  data_dir: str | None = None
  cache_dir: str | None = None

  def register(self) -> None:
    """Makes them those of this process."""
    for name, value in (
      ('OPENMOE_VOCABULARY', self.vocabulary),
      ('OPENMOE_DATA_DIR', self.data_dir),
    ):
      if value is not None:
        os.environ[name] = value
    if self.cache_dir is not None:
      seqio.add_global_cache_dirs([self.cache_dir])
