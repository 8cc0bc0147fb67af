"""Prepared TFDS data sets as a source that any number of logical shards can share.

seqio deals a data set's files to shards, and falls back to dealing examples of a shuffled stream,
which overlap when every shard has a seed of its own. Here a shard is a contiguous run of the
split's examples, whatever the files.
"""

from __future__ import annotations

from collections.abc import Mapping

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from openmoe.config import ConfigError
from openmoe.data.concat import plain

_RECORD_BITS = 32


class TfdsDocuments(seqio.TfdsDataSource):
  """A TFDS data set with 'document_id' (file * 2^32 + record) added to its examples."""

  def __init__(
    self, name: str, splits: Mapping[str, str], remedy: str = '', tokens: float | None = None
  ):
    """Nothing is looked up before a dataset is asked for.

    Args:
      name: 'data_set:version'.
      splits: seqio split -> TFDS split, slices allowed ('train[:-2000]').
      remedy: said when the data set is not there.
      tokens: about how many the train split holds, for the plan of a run.
    """
    super().__init__(tfds_name=name, splits=dict(splits))
    self._split_map = dict(splits)
    self.tokens = tokens
    self._remedy = remedy or 'Build it with scripts/build_datasets.sh.'

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def builder(self) -> tfds.core.DatasetBuilder:
    """The prepared data set.

    Raises:
      ConfigError: naming the data set and where it was looked for.
    """
    name, directory = self.tfds_dataset.name, self.tfds_dataset.data_dir
    try:
      found = tfds.builder(name, data_dir=directory, try_gcs=False)
      prepared = bool(found.info.splits)
    except (tfds.core.registered.DatasetNotFoundError, AssertionError, OSError) as error:
      raise ConfigError(self._missing(name, directory)) from error
    if not prepared:
      raise ConfigError(self._missing(name, directory))
    return found

  def _missing(self, name: str, directory: str | None) -> str:
    where = directory or 'the default TFDS directory'
    return f'There is no TFDS data set {name} in {where}; set --tfds_data_dir. {self._remedy}'

  def num_input_examples(self, split: str) -> int:
    """Documents of a split, for rates by size.

    Raises:
      ConfigError: the data set or the split is not there.
    """
    builder = self.builder()
    return self._count(builder, self._wanted(builder, split))

  def _wanted(self, builder: tfds.core.DatasetBuilder, split: str) -> str:
    """The TFDS split that a seqio split is."""
    wanted = self._split_map.get(split, split)
    if wanted.split('[')[0] not in builder.info.splits:
      raise ConfigError(
        f'{self.tfds_dataset.name} has no split {wanted!r}, only {sorted(builder.info.splits)}.'
      )
    return wanted

  def describe(self, split: str, document_id: int) -> str:
    """'data_set file i record j', as numbered in the split's files."""
    del split
    file, record = document_id >> _RECORD_BITS, document_id & ((1 << _RECORD_BITS) - 1)
    return f'{self.tfds_dataset.name} file {file} record {record}'

  def get_dataset(
    self,
    split: str = 'train',
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    *,
    sequence_length=None,
    use_cached: bool = False,
    num_epochs: int | None = 1,
  ) -> tf.data.Dataset:
    """Examples of one shard; every example of the split is in exactly one shard.

    Raises:
      ConfigError: the data set or the split is not there, or has fewer examples than shards.
    """
    del sequence_length, use_cached, num_epochs
    builder = self.builder()
    wanted = self._wanted(builder, split)
    count = self._count(builder, wanted)
    if shard_info and shard_info.num_shards > 1:
      if count < shard_info.num_shards:
        raise ConfigError(
          f'{self.tfds_dataset.name} has {count} examples in {wanted!r}, fewer than num_shards='
          f'{shard_info.num_shards}: lower num_shards.'
        )
      wanted = tfds.even_splits(wanted, shard_info.num_shards)[shard_info.index]
    config = tfds.ReadConfig(
      shuffle_seed=seed, skip_prefetch=True, add_tfds_id=True, try_autocache=False
    )
    dataset = builder.as_dataset(split=wanted, shuffle_files=shuffle, read_config=config)
    return dataset.map(plain(_with_document_id))

  def _count(self, builder: tfds.core.DatasetBuilder, wanted: str) -> int:
    """Examples of a split or slice.

    Raises:
      ConfigError: the slice holds out more than there is.
    """
    whole = builder.info.splits[wanted.split('[')[0]].num_examples
    try:
      count = builder.info.splits[wanted].num_examples
    except ValueError:
      count = 0
    if not count:
      raise ConfigError(
        f'{self.tfds_dataset.name} has {whole} examples, and {wanted!r} leaves none of them: as '
        'many as the slice says are held out. Build the data set from more of the raw files.'
      )
    return count


def _with_document_id(example):
  """Turns a TFDS id ('name.tfrecord-00003-of-00100__17') into a number."""
  number = {
    key: tf.strings.to_number(
      tf.strings.regex_replace(example['tfds_id'], pattern, r'\1'), tf.int64
    )
    for key, pattern in (('file', r'.*-(\d+)-of-\d+.*__\d+$'), ('record', r'.*__(\d+)$'))
  }
  rest = {k: v for k, v in example.items() if k != 'tfds_id'}
  return {**rest, 'document_id': number['file'] * (1 << _RECORD_BITS) + number['record']}
