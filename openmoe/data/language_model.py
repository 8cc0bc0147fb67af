"""Next-token prediction as a seqio preprocessor over tokenised documents.

`fixed` (default) cuts the stream doc EOS doc EOS ... into full chunks: EOS only where a document
ends. `reference` joins 128 documents and is meant to be followed by
seqio.preprocessors.append_eos_after_trim, which then overwrites the last token of every chunk with
EOS, as in the released runs.
"""

from __future__ import annotations

from collections.abc import Mapping

import seqio
import tensorflow as tf

from openmoe.config import ConfigError, parse_enum
from openmoe.data import concat
from openmoe.data.ul2 import Mode


def full_lm(
  dataset: tf.data.Dataset,
  sequence_length: Mapping[str, int],
  output_features: Mapping[str, seqio.Feature],
  mode: Mode | str = Mode.FIXED,
  corpus: str | None = None,
) -> tf.data.Dataset:
  """Chunks {'targets': int32 [sequence_length['targets']]}, from tokenised documents.

  Args:
    dataset: {'targets': int32 [n]}, optionally 'document_id': int64 [].
    sequence_length: {'targets': tokens of a chunk}; inputs would stay empty and are refused.
    output_features: their vocabulary gives EOS.
    mode: see the module's text.
    corpus: name of the corpus, to leave documents out.

  Returns:
    {'targets'}; fixed mode adds 'objective' (0) and 'document_ids' as ul2_objective does.
  """
  if 'targets' not in (sequence_length or ()):
    told = None if sequence_length is None else dict(sequence_length)
    raise ConfigError(
      f"task_feature_lengths={told}: next-token prediction needs {{'targets': tokens of a row}}."
    )
  if 'inputs' in sequence_length:
    raise ConfigError(
      f'task_feature_lengths={dict(sequence_length)}: next-token prediction has no inputs, and '
      "room reserved for them would stay padding; give {'targets': n} only."
    )
  mode = parse_enum(Mode, mode, 'full_lm.mode')
  length = sequence_length['targets']
  eos_id = output_features['targets'].vocabulary.eos_id
  if mode is Mode.FIXED:
    blocks = concat.continuous_blocks(dataset, length, eos_id, corpus)

    @seqio.map_over_dataset
    def fixed(block):
      size = block['length']
      return {
        'targets': block['tokens'][:size],
        'objective': tf.constant(0, tf.int32),
        'document_ids': concat.chunk_ids(block['documents'], tf.stack([0, size - 1])[None])[0],
      }

    return fixed(blocks)

  def with_end(document):
    return {'targets': tf.concat([tf.cast(document['targets'], tf.int32), [eos_id]], axis=0)}

  chosen = concat.released_random_chunk(dataset).map(with_end)
  chunks = concat.split_groups(concat.released_groups(chosen), length)
  return chunks.map(lambda chunk: {'targets': chunk['tokens'][: chunk['length']]})
