"""Documents from a user's own .txt and .jsonl files, as a seqio data source.

A .jsonl file has one object a line with a text field; a .txt file is one document, cut at line
ends where it is longer than a piece. Both may be gzipped (.gz). Every document has a number that
tells its file and record, which the inspector turns back into words.

Records that hold no text are never silently part of a mixture: they are skipped and counted, or
refused with file and line.
"""

from __future__ import annotations

import collections
import enum
import gzip
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from openmoe.config import ConfigError, parse_enum
from openmoe.data.concat import plain

Patterns = str | Sequence[str]

# A document's number is file * 2^32 + record.
_RECORD_BITS = 32

# With fewer files than this per shard, records and not files are dealt to shards: whole files
# would leave some shards with much more text than others, or with none.
_FILES_PER_SHARD = 4

_SUFFIXES = ('.txt', '.txt.gz', '.jsonl', '.jsonl.gz')


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
      text_field: key of the text in .jsonl objects.
      held_out_every: every so many-th document is the `validation` split, the rest `train`.
      bad_record: see BadRecord.
      piece_bytes: longest document of a .txt file.
      shuffle_buffer: documents shuffled together when shuffling.
    """
    names = splits or (['train'] if callable(patterns) else list(patterns))
    if held_out_every:
      names = ['train', 'validation']
    super().__init__(splits=names)
    self._patterns = patterns
    self._text_field = text_field
    self._every = held_out_every
    self._bad_record = parse_enum(BadRecord, bad_record, 'TextFiles.bad_record')
    self._piece_bytes = piece_bytes
    self._shuffle_buffer = shuffle_buffer
    self.skipped: collections.Counter[tuple[str, str]] = collections.Counter()

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
    files = sorted({name for pattern in patterns for name in tf.io.gfile.glob(pattern)})
    if not files:
      raise ConfigError(f'No file matches {patterns} (split {split!r}); check the path.')
    for name in files:
      if not name.endswith(_SUFFIXES):
        raise ConfigError(f'{name} must end in one of {list(_SUFFIXES)}.')
    return files

  def describe(self, split: str, document_id: int) -> str:
    """Where a document is: 'path:record', records from 1 as editors count lines."""
    files = self.list_shards(split)
    file, record = document_id >> _RECORD_BITS, document_id & ((1 << _RECORD_BITS) - 1)
    return f'{files[file]}:{record + 1}' if 0 <= file < len(files) else f'document {document_id}'

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
    files = self.list_shards(split)
    numbers = list(range(len(files)))
    shards, shard = (shard_info.num_shards, shard_info.index) if shard_info else (1, 0)
    if len(files) >= _FILES_PER_SHARD * shards:
      numbers, shards, shard = numbers[shard::shards], 1, 0
    dataset = tf.data.Dataset.from_tensor_slices((tf.constant(numbers, tf.int64),
                                                  [files[i] for i in numbers]))  # fmt: skip
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

    documents = dataset.flat_map(documents_of)
    documents = documents.filter(plain(lambda document: document['usable']))
    if shuffle and self._shuffle_buffer > 1:
      documents = documents.shuffle(self._shuffle_buffer, seed=seed)
    return documents

  def _is_mine(self, number, record, held_out: bool, shards: int, shard: int):
    # Dealing by a sum of both numbers, as one-document files would all be record 0.
    count = number + record
    mine = tf.constant(True)
    if self._every:
      mine = (count % self._every == 0) == held_out
      # Within a split the held out documents leave gaps that must not fall on one shard only.
      count = count // self._every if held_out else count - count // self._every - 1
    return mine & (count % shards == shard)

  def _records(self, path) -> tf.data.Dataset:
    """(record, raw bytes) of a file: the lines of .jsonl, the pieces of .txt."""
    gzipped = tf.strings.regex_full_match(path, r'.*\.gz')
    is_text = tf.strings.regex_full_match(path, r'.*\.txt(\.gz)?')
    lines = tf.data.TextLineDataset(
      tf.boolean_mask([path], ~is_text[None]),
      compression_type=tf.where(gzipped, 'GZIP', ''),
    )
    texts = tf.data.Dataset.from_tensor_slices(tf.boolean_mask([path], is_text[None]))

    @plain
    def pieces_of(name):
      cut = tf.numpy_function(self._cut, [name], tf.string, stateful=False)
      return tf.data.Dataset.from_tensor_slices(tf.ensure_shape(cut, [None]))

    pieces = texts.flat_map(pieces_of)
    return lines.concatenate(pieces).enumerate()

  def _cut(self, path: bytes):
    """Pieces of a text file of at most piece_bytes, ending at line ends where it has any."""
    with tf.io.gfile.GFile(path.decode(), 'rb') as f:
      content = f.read()
    if path.endswith(b'.gz'):
      content = gzip.decompress(content)
    pieces, start = [], 0
    while start < len(content):
      end = min(start + self._piece_bytes, len(content))
      if end < len(content):
        newline = content.rfind(b'\n', start, end)
        end = newline + 1 if newline > start else _character_end(content, start, end)
      pieces.append(content[start:end])
      start = end
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
    reason, text = '', b''
    try:
      if path.endswith((b'.txt', b'.txt.gz')):
        text = line
        text.decode('utf-8')
      else:
        value = json.loads(line.decode('utf-8'))
        text = value[self._text_field]
        text = text.encode('utf-8')
    except UnicodeError:
      reason = 'invalid UTF-8'
    except json.JSONDecodeError as error:
      reason = f'invalid JSON ({error.msg})'
    except (KeyError, TypeError, AttributeError):
      reason = f'no text in field {self._text_field!r}'
    if not reason and not text.strip():
      reason = 'empty'
    if not reason:
      return text, True
    if self._bad_record is BadRecord.REFUSE:
      raise ValueError(f'{path.decode()}:{record + 1}: {reason}; repair or remove the record.')
    key = (path.decode(), reason)
    if not self.skipped[key]:
      logging.warning('%s:%d: %s; skipped, as are others like it.', key[0], record + 1, reason)
    self.skipped[key] += 1
    return b'', False


def _character_end(content: bytes, start: int, end: int) -> int:
  """The last end of a whole UTF-8 character at or before `end`."""
  cut = end
  while cut > start and content[cut] & 0xC0 == 0x80:
    cut -= 1
  return cut if cut > start else end
