"""The three chains every pretraining corpus has, registered in one call.

source -> targets <- text -> tokenize -> (cache) -> objective. With corpus `c` the tasks are
`c_ul2`, `c_ul2_noprefix` and `c_full_lm`, and each with `_reference` appended in the released
pipeline's quirks (openmoe/data/ul2.py says which).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import seqio
import tensorflow as tf

from openmoe.data.concat import plain
from openmoe.data.language_model import full_lm
from openmoe.data.ul2 import Mode, ul2_objective

# seqio shuffles 1000 examples; here each of the (default 8) logical shards shuffles its own, and
# the buffers are part of every saved position.
SHUFFLE_BUFFER = 128

OBJECTIVES = ('ul2', 'ul2_noprefix', 'full_lm')


def output_features(vocabulary: seqio.Vocabulary) -> dict[str, seqio.Feature]:
  """inputs and targets, EOS on both; inputs are absent in next-token prediction."""
  return {
    'inputs': seqio.Feature(vocabulary, add_eos=True, required=False),
    'targets': seqio.Feature(vocabulary, add_eos=True),
  }


def take_text(dataset: tf.data.Dataset, text_field: str = 'text') -> tf.data.Dataset:
  """{'targets': text, 'document_id'} of a source's examples."""

  @plain
  def take(example):
    taken = {'targets': example[text_field]}
    if 'document_id' in example:
      taken['document_id'] = example['document_id']
    return taken

  return dataset.map(take, num_parallel_calls=tf.data.AUTOTUNE)


def label(dataset: tf.data.Dataset, source: str) -> tf.data.Dataset:
  """Examples that know which corpus they are from."""
  return dataset.map(plain(lambda example: {**example, 'source': tf.constant(source)}))


def objective_steps(objective: str, mode: Mode, corpus: str | None = None) -> list:
  """The preprocessors after the cache, for one of OBJECTIVES."""
  if objective == 'full_lm':
    step = functools.partial(full_lm, mode=mode, corpus=corpus)
  else:
    prefixes = objective == 'ul2'
    step = functools.partial(ul2_objective, mode=mode, mode_prefixes=prefixes, corpus=corpus)
  # The fixed mode counts its EOS in the lengths; trimming is what breaks the released examples.
  trim = [seqio.preprocessors.append_eos_after_trim] if mode is Mode.REFERENCE else []
  return [step, *trim]


def add_corpus(
  corpus: str,
  source: seqio.DataSource,
  vocabulary: seqio.Vocabulary,
  text_field: str = 'text',
  objectives: Sequence[str] = OBJECTIVES,
  shuffle_buffer: int = SHUFFLE_BUFFER,
) -> list[str]:
  """Registers the corpus's tasks and returns their names.

  Raises:
    ValueError: from seqio, if one is registered already.
  """
  names = []
  for objective in objectives:
    for mode in Mode:
      suffix = '_reference' if mode is Mode.REFERENCE else ''
      names.append(f'{corpus}_{objective}{suffix}')
      seqio.TaskRegistry.add(
        names[-1],
        source=source,
        preprocessors=[
          functools.partial(take_text, text_field=text_field),
          functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
          seqio.CacheDatasetPlaceholder(),
          *objective_steps(objective, mode, corpus),
          functools.partial(label, source=corpus),
        ],
        output_features=output_features(vocabulary),
        metric_fns=[],
        shuffle_buffer_size=shuffle_buffer,
      )
  return names
