"""Hugging Face folders: config.json, weights in .safetensors or .bin shards, tokenizer files.

Written folders of OpenMoE hold our own PyTorch model beside the weights, so they load with
trust_remote_code=True and nothing else; see convert/torch/. JetMoE is transformers' own model.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from convert.core.forms import Form, Sink
from convert.core.names import Row, hf_names, name_problems, name_table
from convert.core.tensors import ConvertError, Stored, Writable, write_synced
from convert.formats import hf_config
from convert.formats.pickled import read_bin
from convert.formats.safetensor import SafetensorsFile, read_safetensors
from openmoe.config import ModelConfig

TORCH_SOURCES = pathlib.Path(__file__).parents[1] / 'torch'
INDEX = 'model.safetensors.index.json'
_READERS = {'.safetensors': read_safetensors, '.bin': read_bin}
_STEMS = (('model', '.safetensors'), ('pytorch_model', '.bin'))
MAX_SHARD = 5_000_000_000
_TOKENIZER = ('tokenizer', 'special_tokens', 'sentencepiece', 'spiece', 'added_tokens', 'chat_temp')


class HfForm(Form):
  """Reads a Hugging Face folder.

  Raises:
    ConvertError: config.json or a shard cannot be read, or there are no weights.
  """

  kind = 'hf'

  def __init__(self, path: os.PathLike | str):
    self.path = epath.Path(path)
    try:
      self.config = json.loads((self.path / 'config.json').read_text())
    except (OSError, ValueError) as error:
      raise ConvertError(f'{self.path}/config.json cannot be read: {error}') from error
    self.step = self.config.get('openmoe_step')
    self.kept_fields = hf_config.kept(self.config)
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
      index = self.path / f'{stem}{suffix}.index.json'
      if index.exists():
        try:
          where = json.loads(index.read_text())['weight_map']
        except (ValueError, KeyError) as error:
          raise ConvertError(f'{index} cannot be read: {error!r}') from error
        if any(os.path.basename(name) != name for name in where.values()):
          raise ConvertError(f'{index} names files outside its folder.')
        return sorted(set(where.values())), where
      if (self.path / f'{stem}{suffix}').exists():
        return [f'{stem}{suffix}'], {}
    raise ConvertError(
      f'{self.path} has neither model.safetensors nor pytorch_model.bin nor an index of shards.'
    )

  def tensors(self) -> dict[str, Stored]:
    return dict(self._tensors)

  def parameter(self, row: Row) -> Stored:
    stored = self._tensors[row.hf]
    if row.part == (0, 1) or stored.rows % row.part[1]:
      return stored  # of a shape that is refused, where it does not divide
    return _part(stored, row)

  def check_names(self, rows: Sequence[Row]) -> list[str]:
    aliases = {alias for row in rows for alias in row.hf_aliases}
    found = [name for name in self._tensors if name not in aliases]
    return name_problems([*found, *self._doubled], hf_names(rows))

  def sizes(self) -> dict[str, Any]:
    return hf_config.sizes(self.config)

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
        if there is not None and there.sha256() != self.parameter(row).sha256():
          yield f'{alias} differs from {row.hf}, to which it is tied'


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
    path: local directory that becomes the folder, or gs:// or s3://: there, shards are made in
      `staging` and uploaded whole when all are done.
    step: noted in config.json.
    max_shard: bytes of a weight file, unless one tensor is larger.
    extra_files: tokenizer files to copy along.
    kept_fields: of the config.json that the weights once came with.
  """

  kind = 'hf'

  def __init__(
    self,
    path: epath.Path,
    step: int | None,
    max_shard: int = MAX_SHARD,
    extra_files: Sequence[pathlib.Path] = (),
    staging: pathlib.Path | None = None,
    kept_fields: Mapping[str, Any] | None = None,
  ):
    self._path, self._step, self._max_shard = path, step, max_shard
    self.local = epath.Path(staging) if staging else path
    self._extra, self._kept = list(extra_files), dict(kept_fields or {})
    self._files: dict[str, SafetensorsFile] = {}
    self._where: dict[str, str] = {}

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
    self.local.mkdir(parents=True, exist_ok=True)
    for i, tensors in enumerate(shards, 1):
      name = f'model-{i:05}-of-{len(shards):05}.safetensors'
      name = name if len(shards) > 1 else 'model.safetensors'
      file = SafetensorsFile(self.local / name, tensors)
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
      self.local / name, (json.dumps(value, indent=2) + '\n').encode()
    )
    if len(self._files) > 1:
      write(INDEX, {'metadata': {'total_size': self._total}, 'weight_map': self._where})
    write('config.json', hf_config.to_hf(self._config, self._dtype.name, self._step, self._kept))
    write('generation_config.json', hf_config.generation(self._kept))
    for name in hf_config.sources(self._config):
      shutil.copyfile(TORCH_SOURCES / name, self.local / name)
    for file in self._extra:
      shutil.copyfile(file, self.local / file.name)
    write_synced(self.local / 'README.md', hf_config.card(self._config, self._dtype.name).encode())
    if self.local != self._path:
      for file in self.local.iterdir():
        file.copy(self._path / file.name, overwrite=True)


def tokenizer_files(folder: os.PathLike | str) -> list[pathlib.Path]:
  """Files of a tokenizer in a folder.

  Raises:
    ConvertError: there are none.
  """
  found = sorted(p for p in pathlib.Path(folder).iterdir() if p.name.startswith(_TOKENIZER))
  if not found:
    raise ConvertError(
      f'--tokenizer={folder} has no tokenizer files (tokenizer*, spiece.model...).'
    )
  return found


def is_hf(path: epath.Path) -> bool:
  return (path / 'config.json').exists()
