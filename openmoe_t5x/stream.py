"""Our packed stream as t5x's dataset: train_script.train.get_dataset_fn = @stream.stream.

Batches are those of scripts.train for the same mixture, seed and logical shards, on any number of
hosts. Positions are saved where t5x saves its dataset (SaveCheckpointConfig.save_dataset = True).
"""

from __future__ import annotations

from typing import Any

import clu.data.dataset_iterator as clu_data
import numpy as np

from openmoe.config import ConfigError, DataConfig
from openmoe.data.stream import ShardedStream
from openmoe_t5x.names import FEATURES


class _Stream(clu_data.DatasetIterator):
  """A ShardedStream in t5x's protocol."""

  def __init__(self, config: DataConfig, shards: range):
    self._stream = ShardedStream(config, shards)
    rows = config.batch_size // config.num_shards * len(shards)
    kinds = {'loss_weights': np.float32}
    self._spec = {
      name: clu_data.ArraySpec(np.dtype(kinds.get(field, np.int32)), (rows, config.row_length))
      for field, name in FEATURES.items()
    }

  @property
  def element_spec(self) -> dict[str, clu_data.ArraySpec]:
    return self._spec

  def __next__(self) -> dict[str, np.ndarray]:
    batch = next(self._stream)
    return {name: getattr(batch, field) for field, name in FEATURES.items()}

  def save(self, filename: Any) -> None:
    """Writes the position of every shard of this host."""
    entries = {k: np.frombuffer(v, np.uint8) for k, v in self._stream.state().items()}
    np.savez(filename, **entries)

  def restore(self, filename: Any) -> None:
    """Goes on from a position."""
    with np.load(f'{filename}.npz') as file:
      self._stream.restore({name: file[name].tobytes() for name in file.files})


def stream(
  cfg: Any,
  shard_id: int,
  num_shards: int,
  feature_converter_cls: Any,
  num_epochs: int | None = None,
  *,
  logical_shards: int = 8,
  **unused: Any,
) -> _Stream:
  """The dataset of one host, for train_script.train.get_dataset_fn.

  Args:
    cfg: t5x's DatasetConfig; its seed, or 0, is DATA_SEED.
    logical_shards: DATA_SHARDS of the run.

  Raises:
    ConfigError: the hosts do not divide the shards, or the data are not there.
  """
  del feature_converter_cls, unused
  if logical_shards % num_shards:
    raise ConfigError(
      f'logical_shards={logical_shards} of the data do not divide over {num_shards} hosts; set '
      'stream.stream.logical_shards to a multiple.'
    )
  config = DataConfig(
    mixture_or_task_name=cfg.mixture_or_task_name,
    task_feature_lengths=cfg.task_feature_lengths,
    batch_size=cfg.batch_size,
    split=cfg.split,
    seed=cfg.seed or 0,
    num_shards=logical_shards,
    shuffle=cfg.shuffle,
    pack=cfg.pack,
    use_cached=cfg.use_cached,
    num_epochs=num_epochs,
  )
  each = logical_shards // num_shards
  return _Stream(config, range(shard_id * each, (shard_id + 1) * each))
