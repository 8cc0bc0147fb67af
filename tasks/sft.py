"""Supervised fine-tuning: orca_sft and wildchat_gpt4_sft.

Prompt in `inputs`, answer in `targets`, loss on targets only. The released tasks train on all
examples and validate on the last of them; here validation is held out, and `<task>_reference` has
the overlap. Source: the authors' T5 fork.
"""

from __future__ import annotations

import functools

import seqio
import tensorflow as tf

from openmoe.data.concat import plain
from openmoe.data.tfds_source import TfdsDocuments
from tasks.chains import SHUFFLE_BUFFER, label
from tasks.pretraining import VOCABULARY


def orca_prompt(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """system prompt + 'USER: ' + question + 'ASSISTANT: ', joined with nothing; as released."""

  @plain
  def prompt(example):
    parts = [example['system_prompt'], 'USER: ', example['question'], 'ASSISTANT: ']
    return {'inputs': tf.strings.join(parts), 'targets': example['response']}

  return dataset.map(prompt, num_parallel_calls=tf.data.AUTOTUNE)


def wildchat_prompt(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Fields input and output as they are: the chat template is part of the data set."""
  return dataset.map(
    plain(lambda example: {'inputs': example['input'], 'targets': example['output']}),
    num_parallel_calls=tf.data.AUTOTUNE,
  )


def _features(targets_eos: bool) -> dict[str, seqio.Feature]:
  return {
    'inputs': seqio.Feature(VOCABULARY, add_eos=False, required=False),
    'targets': seqio.Feature(VOCABULARY, add_eos=targets_eos),
  }


# task: (TFDS, prompt, EOS on targets, examples held out). WildChat ends its answers in the literal
# text </s>, which is no EOS token.
_TASKS = {
  'orca_sft': ('orca:1.0.0', orca_prompt, True, 2000),
  'wildchat_gpt4_sft': ('wildchat_gpt4_sft:1.0.0', wildchat_prompt, False, 128),
}

for _name, (_tfds, _prompt, _eos, _held_out) in _TASKS.items():
  for _suffix, _train in (('', f'train[:-{_held_out}]'), ('_reference', 'train')):
    seqio.TaskRegistry.add(
      f'{_name}{_suffix}',
      source=TfdsDocuments(_tfds, {'train': _train, 'validation': f'train[-{_held_out}:]'}),
      preprocessors=[
        _prompt,
        functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
        seqio.CacheDatasetPlaceholder(),
        seqio.preprocessors.append_eos_after_trim,
        functools.partial(label, source=_name),
      ],
      output_features=_features(_eos),
      metric_fns=[],
      shuffle_buffer_size=SHUFFLE_BUFFER,
    )
