"""Flags that say where data lie; scripts with gin share them, by t5x's names."""

from __future__ import annotations

import seqio
from absl import flags

from scripts import registry

_TFDS = flags.DEFINE_string('tfds_data_dir', None, 'Where TFDS data sets lie (local or gs://).')
_CACHES = flags.DEFINE_list('seqio_additional_cache_dirs', [], 'Where scripts.cache_tasks wrote.')


def use() -> None:
  """Says to seqio what the flags say.

  Raises:
    ConfigError: a directory does not exist.
  """
  if _TFDS.value:
    registry.use_tfds_dir(_TFDS.value)
  seqio.add_global_cache_dirs(_CACHES.value)
