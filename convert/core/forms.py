"""What every checkpoint form offers: its parameters by row of the name table, its step, its facts.

The forms are t5x (convert/t5x.py), Hugging Face (convert/hf.py) and ours (convert/ours.py). Each
has a reader, a `Form`, and a writer, a `Sink`; conversion, verification and the rest know only
these two.
"""

from __future__ import annotations

import abc
import json
import os
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from convert.core.names import Row
from convert.core.tensors import Stored, Writable, digest
from openmoe.config import ModelConfig

RECEIPT = 'conversion_receipt.json'
_SMALL = 1 << 20  # files up to this size count into a fingerprint with their content


class Form(abc.ABC):
  """A checkpoint that is being read.

  Attributes:
    kind: 't5x', 'hf' or 'ours'.
    path: of the checkpoint itself.
    step: optimizer steps, None if the form does not say.
    kept_fields: what the config.json of a Hugging Face folder told beyond the model's sizes.
  """

  kind: str
  path: epath.Path
  step: int | None = None
  kept_fields: Mapping[str, Any] = types.MappingProxyType({})

  @abc.abstractmethod
  def tensors(self) -> dict[str, Stored]:
    """Every tensor that is there, by the form's own name; parameters and the rest."""

  @abc.abstractmethod
  def parameter(self, row: Row) -> Stored:
    """The tensor of a row, in this form's layout."""

  @abc.abstractmethod
  def check_names(self, rows: Sequence[Row]) -> list[str]:
    """One phrase per parameter of a model that is missing, unknown or doubled."""

  @abc.abstractmethod
  def sizes(self) -> dict[str, Any]:
    """Fields of ModelConfig that the form itself tells, empty where it tells nothing."""

  def problems(self) -> Iterator[str]:
    """What is wrong with the files themselves, beyond names and values."""
    return iter(())

  def alias_problems(self, rows: Iterable[Row]) -> Iterator[str]:
    """One phrase per tensor that is stored twice and differs from itself."""
    del rows
    return iter(())

  def receipt(self) -> Mapping[str, Any] | None:
    path = self.path / RECEIPT
    return json.loads(path.read_text()) if path.exists() else None

  def transposed(self, row: Row) -> bool:
    """Whether this form's layout of a row is the transposed one."""
    return row.transposed and self.kind == 'hf'

  def pieces(self, row: Row) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of a parameter in the common layout, t5x's."""
    stored = self.parameter(row)
    if not self.transposed(row):
      yield from stored.pieces()
    elif len(stored.shape) > 2:
      for start, x in stored.pieces():
        yield start, x.swapaxes(-1, -2)
    else:
      yield 0, stored.whole().T

  def load(self, row: Row) -> np.ndarray:
    """A whole parameter in the common layout."""
    x = self.parameter(row).whole()
    return x.swapaxes(-1, -2) if self.transposed(row) else x

  def load_expert(self, row: Row, expert: int) -> np.ndarray:
    """One expert of a parameter whose first axis counts experts, in the common layout."""
    x = self.parameter(row).read(expert, expert + 1)[0]
    return x.T if self.transposed(row) else x

  def fingerprint(self) -> str:
    """Digest of all file names and sizes, and of the content of small files."""
    entries, folders = [], [self.path]
    while folders:
      for path in folders.pop().iterdir():
        if path.is_dir():
          folders.append(path)
          continue
        if path.name == RECEIPT:
          continue
        size = path.stat().length
        # The contents of chunk files are covered by the tensors' own digests.
        described = path.suffix in ('.json', '.py') or path.name in ('checkpoint', '_METADATA')
        content = path.read_bytes().hex() if described and size <= _SMALL else ''
        entries.append([os.path.relpath(path, self.path), size, content])
    return digest(sorted(entries))


class Sink(abc.ABC):
  """A checkpoint that is being written, in a directory that is not yet its final one."""

  kind: str

  @abc.abstractmethod
  def prepare(self, config: ModelConfig, sources: Mapping[str, Stored], dtype) -> None:
    """Lays out files for every row.

    Args:
      sources: stored source tensor by row.name: shapes in the common layout and units of reading.
      dtype: of the floating tensors to write.
    """

  @abc.abstractmethod
  def parameter(self, row: Row) -> Writable:
    """Where a row goes."""

  @abc.abstractmethod
  def finish(self) -> None:
    """Writes what is left, after all tensors are in place."""
