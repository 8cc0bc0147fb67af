"""Documents from a user's own files, as a seqio data source.

.jsonl has one object a line with a text field, .csv and .parquet a column of text; a .txt file is
one document, cut at line ends where it is longer than a piece. All may be packed (.gz, .zst).
Every document has a number that tells its file and record, which the inspector turns back into
words; openmoe.data.documents reads the kinds.

Records that hold no text are never silently part of a mixture: they are skipped and counted, or
refused with file and line. A file that is damaged or was cut off ends the run by its name.
"""

from __future__ import annotations

import collections
import enum
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from openmoe.config import ConfigError, parse_enum
from openmoe.data import documents, files
from openmoe.data.concat import plain

Patterns = str | Sequence[str]

# A document's number is file * 2^32 + record.
_RECORD_BITS = 32

# With fewer files than this per shard, records and not files are dealt to shards: whole files
# would leave some shards with much more text than others, or with none.
_FILES_PER_SHARD = 4


class BadRecord(enum.Enum):
  """What happens to a record without usable text."""

  SKIP = 'skip'  # left out, counted in `skipped` and logged once a file and reason
  REFUSE = 'refuse'  # stops the run, naming file and line


class TextFiles(seqio.DataSource):
  """{'text': string, 'document_id': int64, 'usable': True} of every document of some files."""

  def __init__(
    self,
    patterns: Mapping[str, Patterns] | Callable[[], Mapping[str, Patterns]],
    splits: Sequence[str] | None = None,
    text_field: str = 'text',
    held_out_every: int | None = None,
    bad_record: BadRecord | str = BadRecord.SKIP,
    piece_bytes: int = 32768,
    shuffle_buffer: int = 256,
  ):
    """Nothing is read or looked up before a dataset is asked for.

    Args:
      patterns: glob patterns by split (local or gs://), or a function giving them when first
        needed. With held_out_every only `train` is given.
      splits: names of the splits, needed only when patterns is a function.
      text_field: key of the text in .jsonl objects, column of .csv and .parquet.
      held_out_every: every so many-th document is the `validation` split, the rest `train`; None
        or 0 for none.
      bad_record: see BadRecord.
      piece_bytes: longest document of a .txt file.
      shuffle_buffer: documents shuffled together when shuffling.
    """
    names = splits or (['train'] if callable(patterns) else list(patterns))
    if held_out_every:
      names = ['train', 'validation']
    super().__init__(splits=names)
    self._patterns = patterns
    self._field = text_field
    self._every = held_out_every
    self._bad_record = parse_enum(BadRecord, bad_record, 'TextFiles.bad_record')
    self._piece_bytes = piece_bytes
    self._shuffle_buffer = shuffle_buffer
    self.skipped: collections.Counter[tuple[str, str]] = collections.Counter()
    self._whole: set[bytes] = set()  # files that were looked through in this process
    self._counts: dict[str, int] = {}
    self._checked: set[tuple[str, int]] = set()  # (split, shards) that have documents each

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str) -> Sequence[str]:
    """The files of a split, sorted.

    Raises:
      ConfigError: when no file matches, or one has an unknown suffix.
    """
    patterns = self._patterns() if callable(self._patterns) else self._patterns
    patterns = patterns['train' if self._every else split]
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    found = sorted({name for pattern in patterns for name in tf.io.gfile.glob(pattern)})
    if not found:
      raise ConfigError(f'No file matches {patterns} (split {split!r}); check the path.')
    for name in found:
      documents.kind_of(name)
      files.check_regular(name)
    return found

  def describe(self, split: str, document_id: int) -> str:
    """Where a document is: 'path:record', records from 1 as editors count lines."""
    names = self.list_shards(split)
    file, record = document_id >> _RECORD_BITS, document_id & ((1 << _RECORD_BITS) - 1)
    return f'{names[file]}:{record + 1}' if 0 <= file < len(names) else f'document {document_id}'

  def number_of(self, split: str, name: str) -> int:
    """The number of a document that describe() names so; the end of its path is enough.

    Raises:
      ConfigError: no file, or several, are named so.
    """
    found = self.find(split, name)
    if len(found) != 1:
      raise ConfigError(
        f'{name} names {len(found)} documents of this corpus; give FILE:RECORD, records from 1, '
        'with so much of the path that one file is meant.'
      )
    return found[0]

  def find(self, split: str, name: str) -> list[int]:
    """Numbers of all documents that end in this name."""
    path, _, record = name.rpartition(':')
    if not record.isdigit() or not int(record):
      return []
    names = self.list_shards(split)
    found = [i for i, file in enumerate(names) if f'/{file}'.endswith(f'/{path.lstrip("/")}')]
    return [i * (1 << _RECORD_BITS) + int(record) - 1 for i in found]

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
    """Documents of one shard; every document is in exactly one shard."""
    del sequence_length, use_cached, num_epochs
    names = self.list_shards(split)
    numbers = list(range(len(names)))
    shards, shard = (shard_info.num_shards, shard_info.index) if shard_info else (1, 0)
    if self._deals_files(len(names), shards):
      numbers = [i for i in numbers if self._shard_of_file(i, shards) == shard]
      shards, shard = 1, 0
    dataset = tf.data.Dataset.from_tensor_slices((tf.constant(numbers, tf.int64),
                                                  [names[i] for i in numbers]))  # fmt: skip
    if shuffle:
      dataset = dataset.shuffle(len(numbers), seed=seed)
    held_out = split == 'validation'

    @plain
    def documents_of(number, path):
      @plain
      def mine(record, _):
        return self._is_mine(number, record, held_out, shards, shard)

      @plain
      def parse(record, line):
        return self._document(number, path, record, line)

      # Records are parsed one by one, in order: parsing holds Python's lock anyway.
      return self._records(path).filter(mine).map(parse)

    found = dataset.flat_map(documents_of).filter(plain(lambda document: document['usable']))
    if shuffle and self._shuffle_buffer > 1:
      found = found.shuffle(self._shuffle_buffer, seed=seed)
    return found

  def _deals_files(self, num_files: int, shards: int) -> bool:
    return num_files >= _FILES_PER_SHARD * shards

  def _shard_of_file(self, number: int, shards: int) -> int:
    """The shard that reads a whole file.

    Files of one document each are held out by their number: where that falls together with
    dealing them in turn, one shard would hold the held out ones alone.
    """
    together = bool(self._every) and shards % self._every == 0
    return (number + number // shards if together else number) % shards

  def _is_mine(self, number, record, held_out: bool, shards: int, shard: int):
    """Whether a record is of a split and a shard; numbers or tensors."""
    # Dealing by a sum of both numbers, as one-document files would all be record 0.
    count = number + record
    mine = count >= 0
    if self._every:
      mine = (count % self._every == 0) == held_out
      # Within a split the held out documents leave gaps that must not fall on one shard only.
      count = count // self._every if held_out else count - count // self._every - 1
    return mine & (count % shards == shard)

  def check_shards(self, split: str, shards: int) -> None:
    """Refuses more shards than documents, by reading until every shard has one.

    Only where records are dealt; where files are, each shard has several.

    Raises:
      ConfigError: with the number of documents and what became of the others.
    """
    names = self.list_shards(split)
    if (split, shards) in self._checked or self._deals_files(len(names), shards):
      return
    counts = collections.Counter(s for _, s, _ in self._dealt(names, split, shards))
    if len(counts) < shards:
      raise ConfigError(self._too_few(split, shards, sum(counts.values())))
    self._checked.add((split, shards))

  def num_input_examples(self, split: str) -> int:
    """Documents of a split, for rates by size: reads all of its files, once in a process.

    Raises:
      ConfigError: no file matches, or one is damaged.
    """
    if split not in self._counts:
      dealt = self._dealt(self.list_shards(split), split, 1, to_the_end=True)
      self._counts[split] = sum(1 for _ in dealt)
    return self._counts[split]

  def _dealt(self, names: Sequence[str], split: str, shards: int, to_the_end: bool = False):
    """(file and record, shard, text) of the documents of a split, until every shard has one."""
    waiting, held_out = set(range(shards)), split == 'validation'
    for number, name in enumerate(names):
      for record, raw in enumerate(documents.raw_records(name, self._piece_bytes, self._field)):
        if not waiting and not to_the_end:
          return
        owner = [s for s in range(shards) if self._is_mine(number, record, held_out, shards, s)]
        if owner:
          try:
            text = documents.parse(name, record, raw, self._field)
          except documents.BadRecordError as error:
            self._bad(name, record, str(error))
            continue
          waiting -= set(owner)
          yield (number, record), owner[0], text

  def _too_few(self, split: str, shards: int, count: int) -> str:
    other = {'train': 'validation', 'validation': 'train'}.get(split, split)
    found = sum(1 for _ in itertools.islice(self._dealt(self.list_shards(split), other, 1), 1))
    said = f'Split {split!r} of these files has {count} documents, fewer than num_shards={shards}.'
    if self._every and split == 'train' and count == 0 and found:
      said = (
        f'The only document is held out for validation (held_out_every={self._every}: the first '
        f'of every {self._every}), and nothing is left to train on.'
      )
    bad = ', '.join(f'{n} {reason}' for (_, reason), n in self.skipped.most_common(3))
    skipped = f' Records without text were skipped: {bad}.' if bad else ''
    remedy = 'Give more data, lower num_shards'
    return f'{said}{skipped} {remedy}{", or set held_out_every=0" if self._every else ""}.'

  def _records(self, path) -> tf.data.Dataset:
    """(record, raw bytes) of a file: the lines of .jsonl, pieces of .txt, cells of a column."""
    gzipped = tf.strings.regex_full_match(path, r'.*\.gz')
    # TensorFlow reads these itself, with positions inside the file.
    by_line = tf.strings.regex_full_match(path, r'.*\.jsonl(\.gz)?')
    whole = tf.numpy_function(self._look_through, [path], tf.string, stateful=False)
    whole = tf.ensure_shape(whole, [])
    lines = tf.data.TextLineDataset(
      tf.boolean_mask([whole], by_line[None]),
      compression_type=tf.where(gzipped, 'GZIP', ''),
    )
    others = tf.data.Dataset.from_tensor_slices(tf.boolean_mask([whole], ~by_line[None]))

    @plain
    def groups_of(name):
      count = tf.numpy_function(self._groups, [name], tf.int64, stateful=False)
      return tf.data.Dataset.range(tf.ensure_shape(count, [])).map(plain(lambda g: (name, g)))

    @plain
    def pieces_of(name, group):
      pieces = tf.numpy_function(self._pieces, [name, group], tf.string, stateful=False)
      return tf.data.Dataset.from_tensor_slices(tf.ensure_shape(pieces, [None]))

    return lines.concatenate(others.flat_map(groups_of).flat_map(pieces_of)).enumerate()

  def _look_through(self, path: bytes) -> bytes:
    if path not in self._whole:
      documents.check_whole(path.decode())
      self._whole.add(path)
    return path

  def _groups(self, path: bytes) -> np.int64:
    """What is read at once: row groups of .parquet, else the whole file."""
    name = path.decode()
    return np.int64(documents.row_groups(name) if name.endswith('.parquet') else 1)

  def _pieces(self, path: bytes, group: int):
    name = path.decode()
    match documents.kind_of(name):
      case '.txt':
        pieces = documents.cut(name, self._piece_bytes)
      case '.csv':
        pieces = documents.csv_texts(name, self._field)
      case '.parquet':
        pieces = documents.parquet_texts(name, int(group), self._field)
      case _:
        pieces = documents.lines(name)
    # A list of one would become a scalar.
    return np.array(pieces, dtype=object)

  def _document(self, number, path, record, line):
    text, ok = tf.numpy_function(
      self._parse, [path, record, line], [tf.string, tf.bool], stateful=False
    )
    return {
      'text': tf.ensure_shape(text, []),
      'document_id': number * (1 << _RECORD_BITS) + record,
      'usable': tf.ensure_shape(ok, []),
    }

  def _parse(self, path: bytes, record: int, line: bytes):
    """(text, usable) of one record."""
    try:
      return documents.parse(path.decode(), int(record), line, self._field), True
    except documents.BadRecordError as error:
      self._bad(path.decode(), int(record), str(error))
      return b'', False

  def _bad(self, name: str, record: int, reason: str) -> None:
    """Counts a record without text, or refuses it."""
    if self._bad_record is BadRecord.REFUSE:
      raise ConfigError(f'{name}:{record + 1}: {reason}; repair or remove the record.')
    if not self.skipped[name, reason]:
      logging.warning('%s:%d: %s; skipped, as are others like it.', name, record + 1, reason)
    self.skipped[name, reason] += 1
