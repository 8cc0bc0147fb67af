"""Many documents as one stream of tokens, cut into blocks.

Two ways: `continuous_blocks` keeps every token and separates documents with EOS, in one pass and
with the memory of one block and one document; `released_groups` does what the original did (128
documents at a time, no separator, long documents cut down to one random block). The choice of what
a block becomes is ul2.py's and language_model.py's.

A document is {'targets': int32 [t]} and, where the source knows it, 'document_id': int64 [].
"""

from __future__ import annotations

from collections.abc import Mapping

import seqio
import tensorflow as tf

from openmoe.data.exclusion import EXCLUDED, MARKED, signs

# Longest run of one document the released pipeline keeps in a pass, and documents it joins.
RELEASED_MAX_TOKENS = 65536
RELEASED_GROUP = 128

UNKNOWN_DOCUMENT = -1

# Autograph has nothing to do in the functions given to tf.data here, and takes most of the time to
# trace them; a run traces them for every shard and task.
plain = tf.autograph.experimental.do_not_convert


def drop_empty(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Without the documents that have no token."""
  return dataset.filter(lambda document: tf.size(document['targets']) > 0)


def continuous_blocks(
  dataset: tf.data.Dataset, block_length: int, eos_id: int, corpus: str | None = None
) -> tf.data.Dataset:
  """Blocks of block_length tokens of the stream doc EOS doc EOS ...

  No token is lost and none is added but the separators. Only the end of a finite dataset gives a
  shorter block, padded with 0.

  Args:
    dataset: tokenised documents.
    block_length: tokens of a block.
    eos_id: put after every document.
    corpus: name of the corpus, to leave documents out.

  Returns:
    {'tokens': int32 [block_length], 'documents': int64 [block_length], 'length': int32 []}:
    `documents` holds the id of the document each token came from, UNKNOWN_DOCUMENT without ids,
    EXCLUDED of one that is to be left out, MARKED of one that is looked for.
  """

  replaced = signs(corpus)

  @plain
  def with_end(document):
    tokens = tf.cast(document['targets'], tf.int32)
    # A document without tokens has no end either.
    end = tf.constant([eos_id], tf.int32)[: tf.minimum(tf.size(tokens), 1)]
    tokens = tf.concat([tokens, end], axis=0)
    number = tf.cast(document.get('document_id', UNKNOWN_DOCUMENT), tf.int64)
    for sign, numbers in replaced.items():
      is_one = tf.reduce_any(number == tf.constant(numbers, tf.int64))
      number = tf.where(is_one, tf.constant(sign, tf.int64), number)
    return tokens, tf.fill(tf.shape(tokens), number), False

  # A scan has no end-of-input hook; one last element tells it to give what it still holds.
  flush = tf.data.Dataset.from_tensors((tf.zeros([0], tf.int32), tf.zeros([0], tf.int64), True))
  documents = dataset.map(with_end).concatenate(flush)

  @plain
  def step(held, element):
    tokens = tf.concat([held[0], element[0]], axis=0)
    numbers = tf.concat([held[1], element[1]], axis=0)
    size = tf.size(tokens)
    blocks = size // block_length
    rest = size - blocks * block_length
    last = element[2] & (rest > 0)
    padding = tf.where(last, block_length - rest, 0)
    blocks += tf.cast(last, tf.int32)
    used = tf.minimum(blocks * block_length, size)
    shape = [blocks, block_length]
    out = {
      'tokens': tf.reshape(tf.pad(tokens[:used], [[0, padding]]), shape),
      'documents': tf.reshape(tf.pad(numbers[:used], [[0, padding]]), shape),
      'length': tf.fill([blocks], block_length) - tf.where(last, padding, 0),
    }
    return (tokens[used:], numbers[used:]), out

  start = (tf.zeros([0], tf.int32), tf.zeros([0], tf.int64))
  return documents.scan(start, step).unbatch()


def chunk_ids(documents: tf.Tensor, ends: tf.Tensor) -> tf.Tensor:
  """'document_ids' of chunks: a sign where one of their tokens carries it, else their two ends.

  Args:
    documents: int64 [t], of the tokens that chunks are cut from.
    ends: int32 [n, 2], first and last place of each.
  """
  ids = tf.gather(documents, ends)
  for sign in (MARKED, EXCLUDED):
    count = tf.concat([[0], tf.cumsum(tf.cast(documents == sign, tf.int32))], axis=0)
    touched = tf.gather(count, ends[:, 1] + 1) > tf.gather(count, ends[:, 0])
    ids = tf.where(touched[:, None], tf.constant(sign, tf.int64), ids)
  return ids


def released_random_chunk(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """One aligned block of at most 65536 tokens of each document, chosen uniformly."""

  @seqio.map_over_dataset(num_seeds=1)
  def choose(document, seed):
    tokens = document['targets']
    blocks = (tf.size(tokens) + RELEASED_MAX_TOKENS - 1) // RELEASED_MAX_TOKENS
    block = tf.random.stateless_uniform([], seed, 0, blocks, tf.int32)
    start = block * RELEASED_MAX_TOKENS
    return {'targets': tokens[start : start + RELEASED_MAX_TOKENS]}

  return choose(drop_empty(dataset))


def released_groups(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """{'targets': all tokens of 128 consecutive documents, zeros dropped}, no separator."""

  def flatten(group):
    tokens = group.flat_values
    return {'targets': tf.boolean_mask(tokens, tokens != 0)}

  groups = dataset.map(lambda document: tf.cast(document['targets'], tf.int32))
  return groups.ragged_batch(RELEASED_GROUP).map(flatten)


def split_groups(dataset: tf.data.Dataset, length: int) -> tf.data.Dataset:
  """Consecutive chunks of `length` tokens, the last of each element shorter.

  Returns:
    {'tokens': int32 [length], 'length': int32 []}, padded with 0.
  """

  def split(element: Mapping[str, tf.Tensor]) -> tf.data.Dataset:
    tokens = element['targets']
    size = tf.size(tokens)
    chunks = (size + length - 1) // length
    padded = tf.pad(tokens, [[0, chunks * length - size]])
    lengths = tf.minimum(length, size - tf.range(chunks) * length)
    return tf.data.Dataset.from_tensor_slices(
      {'tokens': tf.reshape(padded, [chunks, length]), 'length': lengths}
    )

  return dataset.flat_map(split)
