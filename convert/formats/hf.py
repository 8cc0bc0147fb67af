"""Hugging Face folders: config.json, weights in .safetensors or .bin shards, tokenizer files.

Written folders of OpenMoE hold our own PyTorch model beside the weights, so they load with
trust_remote_code=True and nothing else; see convert/torch/. JetMoE is transformers' own model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
from etils import epath

from convert.core.forms import MAX_SHARD, Form, Layout, Options, Sink, read_model
from convert.core.names import Row, hf_names, name_problems, name_table
from convert.core.tensors import ConvertError, Stored, Writable, is_float, write_synced
from convert.formats import hf_config
from convert.formats.pickled import read_bin
from convert.formats.safetensor import SafetensorsFile, read_safetensors
from openmoe.checkpoint import safe_json
from openmoe.checkpoint.description import Description, vocabulary_record
from openmoe.checkpoint.paths import (
  Unreadable,
  absolute,
  is_inside,
  is_remote,
  open_regular,
  read_small,
)
from openmoe.config import ConfigError, ModelConfig
from openmoe.inference import chat
from openmoe.inference.tokenizer import MODELS, added_tokens

TORCH_SOURCES = pathlib.Path(__file__).parents[1] / 'torch'
INDEX = 'model.safetensors.index.json'
_READERS = {'.safetensors': read_safetensors, '.bin': read_bin}
_STEMS = (('model', '.safetensors'), ('pytorch_model', '.bin'))
_LARGEST_CONFIG = 4 << 20
_LARGEST_TOKENIZER = 64 << 20
VOCABULARIES = (*MODELS, 'tokenizer.json')  # what tells a vocabulary, the first that is there
# Files of a tokenizer that are taken along; no others, whatever they are called.
_TOKENIZER = (
  'added_tokens.json',
  'chat_template.jinja',
  'chat_template.json',
  'merges.txt',
  'sentencepiece.bpe.model',
  'sentencepiece.model',
  'special_tokens_map.json',
  'spiece.model',
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
  'vocab.json',
  'vocab.txt',
)


class HfForm(Form):
  """Reads a Hugging Face folder.

  Raises:
    ConvertError: config.json or a shard cannot be read, or there are no weights.
  """

  kind, layout, separator = 'hf', Layout.TORCH, '.'

  def __init__(self, path: os.PathLike | str):
    self.path = epath.Path(path)
    try:
      file = self.path / 'config.json'
      self.config = safe_json.read(file, limit=_LARGEST_CONFIG)
      self.step = None
      if self.config.get('openmoe_step') is not None:
        self.step = safe_json.field(self.config, 'openmoe_step', int, str(file))
    except (OSError, Unreadable) as error:
      raise ConvertError(f'{self.path}/config.json cannot be read: {error}') from error
    self._files, self._index = self._find_files()
    self._tensors: dict[str, Stored] = {}
    self._doubled: list[str] = []
    self._where: dict[str, str] = {}
    for name in self._files:
      path = self.path / name
      if not path.exists():
        raise ConvertError(f'{self.path}: the index names {name}, which is missing.')
      for key, stored in _READERS[path.suffix](path).items():
        if key in self._tensors:
          self._doubled.append(key)
        self._tensors[key], self._where[key] = stored, name

  def _find_files(self) -> tuple[list[str], dict[str, str]]:
    """(weight files, tensor -> file of the index)."""
    for stem, suffix in _STEMS:
      single, index = f'{stem}{suffix}', self.path / f'{stem}{suffix}.index.json'
      where = _read_index(index) if index.exists() else {}
      # A single file goes before shards, as in transformers: an index that does not name it was
      # left by an earlier save.
      if (self.path / single).exists() and single not in where.values():
        return [single], {}
      if where:
        return sorted(set(where.values())), where
    raise ConvertError(
      f'{self.path} has neither model.safetensors nor pytorch_model.bin nor an index of shards.'
    )

  def tensors(self) -> dict[str, Stored]:
    return dict(self._tensors)

  def parameter(self, row: Row) -> Stored:
    # Of a tied tensor that was saved under one name, either name will do.
    name = next((n for n in (row.hf, *row.hf_aliases) if n in self._tensors), row.hf)
    stored = self._tensors[name]
    if row.part == (0, 1) or stored.rows % row.part[1]:
      return stored  # of a shape that is refused, where it does not divide
    return _part(stored, row)

  def check_names(self, rows: Sequence[Row]) -> list[str]:
    of_alias = {alias: row.hf for row in rows for alias in row.hf_aliases}
    found = dict.fromkeys(of_alias.get(name, name) for name in self._tensors)
    return [
      f'{problem}; as {self._tensors[name].dtype.name} it is no weight: remove it from the file'
      if (name := problem.split(' ', 1)[0]) in self._tensors
      and name not in self._doubled
      and not is_float(self._tensors[name].dtype)
      else problem
      for problem in name_problems([*found, *self._doubled], hf_names(rows))
    ]

  def sizes(self) -> dict[str, Any]:
    return hf_config.sizes(self.config)

  def base(self) -> ModelConfig | None:
    """Our own fields of config.json; transformers' names go before them where both are there."""
    told = self.config.get(hf_config.MODEL_FIELDS)
    where = f'{self.path}/config.json: {hf_config.MODEL_FIELDS}'
    return None if told is None else read_model(told, where)

  def describe(self, config: ModelConfig) -> Description:
    """What the folder says beside its weights: tokens, context, tokenizer, chat template.

    Raises:
      ConvertError: a file of these is damaged.
    """
    more = self.path / 'generation_config.json'
    try:
      facts = safe_json.read(more) if more.exists() else {}
      known = hf_config.told_tokens(self.config, facts, config.vocab_size)
      known['chat'] = chat.record_of(pathlib.Path(self.path))
      if name := self._vocabulary_name():
        kind = 'tokenizer.json' if name.endswith('.json') else 'sentencepiece'
        added = added_tokens(pathlib.Path(self.path)) if kind == 'sentencepiece' else {}
        known['vocabulary'] = vocabulary_record(
          kind, str(self.path / name), 0, self.vocabulary_content(), added
        )
      return dataclasses.replace(super().describe(config), **known)
    except (ConfigError, OSError, Unreadable) as error:
      raise ConvertError(f'{self.path}: {error}') from error

  def _vocabulary_name(self) -> str | None:
    return next((n for n in VOCABULARIES if (self.path / n).is_file()), None)

  def vocabulary_content(self) -> bytes:
    name = self._vocabulary_name()
    try:
      return read_small(self.path / name, _LARGEST_TOKENIZER) if name else b''
    except (OSError, Unreadable) as error:
      raise ConvertError(f'{self.path / name} cannot be read: {error}') from error

  def problems(self) -> Iterator[str]:
    for name, file in sorted(self._index.items()):
      if self._where.get(name) != file:
        yield f'{name}: the index says {file}, it lies in {self._where.get(name, "no file")}'
    for name in sorted(set(self._where) - set(self._index)) if self._index else ():
      yield f'{name} lies in {self._where[name]} and is not in the index'
    for name in self._doubled:
      yield f'{name} is there more than once'

  def alias_problems(self, rows: Iterable[Row]) -> Iterator[str]:
    """Tied tensors that are written twice must be the same twice."""
    for row in rows:
      for alias in row.hf_aliases:
        there = self._tensors.get(alias)
        if (
          there is not None
          and row.hf in self._tensors
          and there.sha256() != self.parameter(row).sha256()
        ):
          yield f'{alias} differs from {row.hf}, to which it is tied'


def _read_index(path: epath.Path) -> dict[str, str]:
  """{tensor: weight file in the same folder}.

  Raises:
    ConvertError: it is of another form, or names what cannot be a weight file there.
  """
  try:
    where = safe_json.field(safe_json.read(path), 'weight_map', dict, str(path))
  except (OSError, Unreadable) as error:
    raise ConvertError(f'{path} cannot be read: {error}') from error
  if not where:
    raise ConvertError(f'{path} names no tensors.')
  for tensor, name in where.items():
    if not isinstance(name, str):
      raise ConvertError(f'{path}: {tensor} is said to lie in {name!r:.40}, which is no file name.')
    if not is_inside(name) or '/' in name:
      raise ConvertError(f'{path} names files outside its folder: {name}.')
    if os.path.splitext(name)[1] not in _READERS:
      raise ConvertError(
        f'{path} names {name}; weights are read from {" and ".join(_READERS)} files.'
      )
  return where


def _part(stored: Stored, row: Row) -> Stored:
  """The rows of a tensor that are a row of the table."""
  first, stop = row.rows_of(stored.rows)
  return dataclasses.replace(
    stored,
    name=row.name,
    shape=(stop - first, *stored.shape[1:]),
    read=lambda a, b: stored.read(first + a, first + b),
  )


class HfSink(Sink):
  """Writes a Hugging Face folder.

  Args:
    path: directory that becomes the folder; of one in an object store, shards are made in a local
      directory and uploaded whole when all are done.
    step: noted in config.json.
    max_shard: bytes of a weight file, unless one tensor is larger.
    extra_files: tokenizer files to copy along.
    described: what the folder is to say; None where only the model is known.
  """

  kind, layout, holds_optimizer, keeps_vocabulary = 'hf', Layout.TORCH, False, False

  def __init__(
    self,
    path: epath.Path,
    step: int | None,
    max_shard: int = MAX_SHARD,
    extra_files: Sequence[pathlib.Path] = (),
    described: Description | None = None,
  ):
    self._path, self._step, self._max_shard = path, step, max_shard
    self._staged = is_remote(path)
    self._local = epath.Path(tempfile.mkdtemp(prefix='openmoe_convert_')) if self._staged else path
    self._extra, self._described = list(extra_files), described
    self._files: dict[str, SafetensorsFile] = {}
    self._where: dict[str, str] = {}

  @classmethod
  def begin(cls, place: epath.Path, source: Form, described: Description, options: Options) -> Self:
    return cls(place, source.step, options.max_shard, options.tokenizer, described)

  @classmethod
  def final_path(cls, out: os.PathLike | str, step: int) -> epath.Path:
    """A folder of its own, whatever the step."""
    del step
    return absolute(out)

  def close(self) -> None:
    if self._staged:
      shutil.rmtree(self._local, ignore_errors=True)

  def prepare(self, config: ModelConfig, sources: Mapping[str, Stored], dtype: np.dtype) -> None:
    self._config, self._dtype = config, dtype
    shards: list[list[tuple[str, tuple, np.dtype]]] = [[]]
    size, total = 0, 0
    for row in name_table(config):
      number, count = row.part
      if number:
        continue  # laid out with the first part
      shape = sources[row.name].shape
      if row.transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
      shape = (count * shape[0], *shape[1:])
      nbytes = math.prod(shape) * dtype.itemsize
      if shards[-1] and size + nbytes > self._max_shard:
        shards.append([])
        size = 0
      shards[-1].append((row.hf, shape, dtype))
      size, total = size + nbytes, total + nbytes
    self._total = total
    self._local.mkdir(parents=True, exist_ok=True)
    for i, tensors in enumerate(shards, 1):
      name = f'model-{i:05}-of-{len(shards):05}.safetensors'
      name = name if len(shards) > 1 else 'model.safetensors'
      file = SafetensorsFile(self._local / name, tensors)
      self._files[name] = file
      self._where |= dict.fromkeys((tensor for tensor, _, _ in tensors), name)

  def parameter(self, row: Row) -> Writable:
    target = self._files[self._where[row.hf]].writable(row.hf)
    if row.part == (0, 1):
      return target
    first, _ = row.rows_of(target.stored.rows)
    write = lambda start, x: target.write(first + start, x)
    return Writable(_part(target.stored, row), write, target.sync)

  def finish(self) -> None:
    write = lambda name, value: write_synced(
      self._local / name, (json.dumps(value, indent=2) + '\n').encode()
    )
    if len(self._files) > 1:
      write(INDEX, {'metadata': {'total_size': self._total}, 'weight_map': self._where})
    described = self._described or Description(self._config)
    write('config.json', hf_config.to_hf(described, self._dtype.name, self._step))
    write('generation_config.json', hf_config.generation(described))
    for name in hf_config.sources(self._config):
      shutil.copyfile(TORCH_SOURCES / name, self._local / name)
    for file in self._extra:
      write_synced(self._local / file.name, read_small(file, _LARGEST_TOKENIZER))
    told = {'chat_template.jinja', 'tokenizer_config.json'} & {file.name for file in self._extra}
    if described.chat and not told:  # what came with the weights goes with them
      text = described.chat.template_text.encode()
      write_synced(self._local / 'chat_template.jinja', text)
      marks = {'bos_token': described.chat.bos_text, 'eos_token': described.chat.eos_text}
      write('tokenizer_config.json', marks)
    card = hf_config.card(self._config, self._dtype.name).encode()
    write_synced(self._local / 'README.md', card)
    if self._staged:
      for file in sorted(self._local.iterdir()):
        _upload(file, self._path / file.name)


def _upload(file: epath.Path, target: epath.Path) -> None:
  """Copies a file to an object store and reads it back.

  Raises:
    ConvertError: what lies there is not what was sent.
  """
  file.copy(target, overwrite=True)
  if _sha256(target) != _sha256(file):
    raise ConvertError(f'{target} reads back other than it was uploaded; give the command again.')


def _sha256(path: epath.Path) -> str:
  with open_regular(path) as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def tokenizer_files(folder: os.PathLike | str) -> list[pathlib.Path]:
  """Files of a tokenizer in a folder: regular files of known names, that lie there themselves.

  Raises:
    ConvertError: there are none, one is a link that leads out of the folder, or one names code that
      whoever loads the folder would run.
  """
  root = pathlib.Path(folder)
  if not root.is_dir():
    raise ConvertError(f'--tokenizer={folder} is no folder; give the one with the tokenizer files.')
  found = [root / name for name in _TOKENIZER if os.path.lexists(root / name)]
  if not found:
    raise ConvertError(f'--tokenizer={folder} has no tokenizer files: {", ".join(_TOKENIZER)}.')
  for file in found:
    # An export is made to be published, and a link may lead to what is not.
    if not file.resolve().is_relative_to(root.resolve()):
      raise ConvertError(
        f'--tokenizer: {file} is a link that leads out of {folder}; put a copy in its place if it '
        'is to be published.'
      )
    if not (file.exists() and stat.S_ISREG(file.stat().st_mode)):
      raise ConvertError(f'--tokenizer: {file} is no file.')
    if file.name == 'tokenizer_config.json':
      try:
        code = safe_json.read(file).get('auto_map')
      except (OSError, Unreadable) as error:
        raise ConvertError(f'--tokenizer: {error}') from error
      if code is not None:
        raise ConvertError(
          f'--tokenizer: {file} has auto_map={code!r:.80}, code of somebody that runs where the '
          'export is loaded; remove that field, or give a tokenizer without code.'
        )
  return found


def is_hf(path: epath.Path) -> bool:
  return (path / 'config.json').exists()
