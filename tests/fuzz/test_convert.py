"""Mutated checkpoints of every form: refused with errors of ours or read, and nothing worse."""

import json
import pathlib
import random
import shutil
import struct
import zipfile

import pytest

from convert import checks, sizes
from convert.core.names import NamesError
from convert.core.source import find_form
from convert.core.tensors import ConvertError
from openmoe.config import ConfigError
from tests.convert import case
from tests.convert.test_hostile import pickled, tensors_of
from tests.fuzz import loop, mutate


def _hf(place):
  return case.run_convert(case.write_ours(place / 'run'), 'hf', place / 'hf', logits=False)


def _sharded(place):
  run = case.write_ours(place / 'run')
  return case.run_convert(run, 'hf', place / 'hf', logits=False, max_shard=60_000)


def _bin(place):
  folder = _hf(place)
  weights = tensors_of(folder)
  (folder / 'model.safetensors').unlink()
  pickle, storages = pickled(weights=weights)
  with zipfile.ZipFile(folder / 'pytorch_model.bin', 'w') as archive:
    for key, content in enumerate(storages):
      archive.writestr(f'archive/data/{key}', content)
    archive.writestr('archive/data.pkl', pickle)
  return folder


def _ours(place):
  return case.write_ours(place / 'run') / f'checkpoint_{case.STEP}'


def _t5x(place):
  return case.run_convert(case.write_ours(place / 'run'), 't5x', place / 't5x', logits=False)


# What is mutated: how the checkpoint is made, the file in it, mutations in the default run.
TARGETS = {
  'config': (_hf, 'config.json', 30),
  'safetensors': (_hf, 'model.safetensors', 60),
  'index': (_sharded, 'model.safetensors.index.json', 40),
  'bin': (_bin, 'pytorch_model.bin', 60),
  'pickle': (_bin, 'archive/data.pkl', 60),
  't5x': (_t5x, 'checkpoint', 30),
  'zarr': (_ours, 'params/token_embedder.embedding/.zarray', 60),
  'zarr_stack': (_ours, 'params/decoder.sparse.moe.experts.wo.kernel/.zarray', 60),
  'zarr_compressed': (_t5x, 'target.decoder.layers_1.mlp.expert.wo.kernel/.zarray', 30),
  'chunk_compressed': (_t5x, 'target.decoder.layers_1.mlp.expert.wo.kernel/0.0.0', 12),
  'metadata': (_ours, 'metadata/metadata', 30),
  'manifest': (_ours, 'manifest.json', 25),
  'receipt': (_hf, 'conversion_receipt.json', 40),
}


def _header_apart(content: bytes, dice: random.Random) -> bytes:
  """A mutation of a safetensors file that keeps the length of its header right."""
  (length,) = struct.unpack('<Q', content[:8])
  header = mutate.of_file(content[8 : 8 + length], dice)
  return struct.pack('<Q', len(header)) + header + content[8 + length :]


def _inside_archive(path: pathlib.Path, name: str, dice: random.Random) -> bytes:
  """A mutation of one entry of an archive whose own lists and sums stay right."""
  other = path.with_suffix('.other')
  with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, 'w') as new:
    for entry in old.namelist():
      content = old.read(entry)
      new.writestr(entry, mutate.of_bytes(content, dice) if entry == name else content)
  content = other.read_bytes()
  other.unlink()
  return content


def _use(folder: pathlib.Path, model: str | None) -> list[str]:
  """What commands do with a checkpoint before, and while, they read its tensors: its problems."""
  form = find_form(folder)
  config = sizes.of_form(form, model)
  return checks.fsck(form, config)


def fuzz(target: str, times: int, place: pathlib.Path) -> None:
  """Mutates a file so often.

  Raises:
    AssertionError: a mutation took too long or too much memory, or left something behind.
  """
  make, name, _ = TARGETS[target]
  folder = make(place)
  model = case.model_file(place / 'model.json') if make is _t5x else None
  assert not _use(folder, model), 'as it is, it is sound'
  path = folder / ('pytorch_model.bin' if target == 'pickle' else name)
  shutil.copy(path, place / 'original')

  def mutation(original: bytes, dice: random.Random, number: int) -> bytes:
    if target == 'pickle':
      return _inside_archive(place / 'original', name, dice)
    if target == 'safetensors' and number % 2:
      return _header_apart(original, dice)
    return mutate.of_file(original, dice)

  use = lambda: _use(folder, model)
  errors = (ConvertError, NamesError, ConfigError)
  loop.fuzz(path, use, times, target, place, errors=errors, mutation=mutation)


@pytest.mark.parametrize('target', TARGETS)
def test_mutations_of_a_checkpoint_are_refused_or_read(target, tmp_path):
  fuzz(target, TARGETS[target][2], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('target', TARGETS)
def test_many_mutations_of_a_checkpoint_are_refused_or_read(target, tmp_path):
  fuzz(target, loop.LONGER * TARGETS[target][2], tmp_path)


def test_mutations_differ_and_are_the_same_for_a_seed():
  content = json.dumps({'a': [1, 2, {'b': 'text'}], 'c': 3}).encode()
  first, second = ([mutate.of_file(content, random.Random(i)) for i in range(50)] for _ in range(2))
  assert first == second
  assert len(set(first)) > 30
