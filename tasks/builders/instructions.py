"""Builders of the fine-tuning sets: WildChat, Orca.

Nobody publishes the authors' TFDS versions, so the fields follow what their tasks read and the
content follows the public raw files.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence

import tensorflow_datasets as tfds

from openmoe.config import ConfigError
from tasks import records

_TURN = ('role', 'content')


class _Texts(tfds.core.GeneratorBasedBuilder):
  """String fields FIELDS of every example, split train."""

  VERSION = tfds.core.Version('1.0.0')
  MANUAL_DOWNLOAD_INSTRUCTIONS = 'See scripts/build_datasets.sh.'
  FIELDS: tuple[str, ...] = ()
  code_path = None  # as in corpora.py

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict({f: tfds.features.Text() for f in self.FIELDS}),
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(str(dl_manager.manual_dir))}


def _all_records(folder: str) -> Iterator[tuple[str, dict]]:
  """Records of the .jsonl files, or of the .parquet files where there are those."""
  if any(pathlib.Path(folder).rglob('*.parquet')):
    return records.parquet_records(folder)
  return records.jsonl_records(folder)


def _need(where: str, record: Mapping, *fields: str) -> list[str]:
  values = [record.get(field) for field in fields]
  for field, value in zip(fields, values, strict=True):
    if not isinstance(value, str):
      raise ConfigError(f'{where}: field {field!r} holds no text but {value!r}.')
  return values


class Orca(_Texts):
  """Orca-style instructions (system_prompt, question, response): OpenOrca's .parquet or .jsonl."""

  name = 'orca'
  FIELDS = ('system_prompt', 'question', 'response')

  def _generate_examples(self, folder: str):
    for key, record in _all_records(folder):
      yield key, dict(zip(self.FIELDS, _need(key, record, *self.FIELDS), strict=True))


def chat_example(turns: Sequence[Mapping[str, str]]) -> dict[str, str] | None:
  """input and output of a conversation in the released chat template, or None without an answer.

  The last answer is the output, ended by the literal text </s>; all before it is the input. How
  the authors flattened turns is not known: this is Llama-2's order with the released strings. A
  conversation with a turn that holds no text, as moderated ones have, is none.
  """
  pairs, system = [], ''
  for turn in turns:
    role, content = (turn.get(k) if isinstance(turn, Mapping) else None for k in _TURN)
    if not isinstance(content, str):
      return None
    if role == 'system':
      system = content
    elif role == 'user':
      pairs.append([content, None])
    elif role == 'assistant' and pairs and pairs[-1][1] is None:
      pairs[-1][1] = content
    else:
      return None
  if pairs and pairs[-1][1] is None:
    pairs.pop()
  if not pairs or any(answer is None for _, answer in pairs):
    return None
  text = f'<<SYS>>\n{system}\n<</SYS>>\n\n' if system else ''
  for question, answer in pairs[:-1]:
    text += f'<s>[INST] {question} [/INST] {answer} </s>'
  return {'input': f'{text}<s>[INST] {pairs[-1][0]} [/INST]', 'output': f' {pairs[-1][1]} </s>'}


class WildchatGpt4Sft(_Texts):
  """GPT-4 conversations of WildChat, flattened by the released chat template."""

  name = 'wildchat_gpt4_sft'
  FIELDS = ('input', 'output')

  def _generate_examples(self, folder: str):
    found = 0
    for key, record in _all_records(folder):
      # Toxic conversations are left out, as in the non-toxic release the authors name.
      if not str(record.get('model', '')).startswith('gpt-4') or record.get('toxic'):
        continue
      if not isinstance(record.get('conversation'), list):
        raise ConfigError(f"{key}: field 'conversation' holds no list of turns.")
      example = chat_example(record['conversation'])
      if example:
        found += 1
        yield key, example
    if not found:
      raise ConfigError(f'{folder} holds no answered GPT-4 conversation; is it WildChat?')


BUILDERS = {builder.name: builder for builder in (Orca, WildchatGpt4Sft)}
