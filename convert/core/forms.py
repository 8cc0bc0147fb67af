"""What every checkpoint form offers: its parameters by row of the name table, its step, its facts.

The forms are t5x, Hugging Face and ours (convert/formats/). Each has a reader, a `Form`, and a
writer, a `Sink`; conversion, verification and the rest know only these two.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import enum
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from etils import epath

from convert.core.names import NamesError, Row
from convert.core.tensors import ConvertError, Stored, Writable, cast, digest, transpose_into
from openmoe.checkpoint import fields, paths, safe_json
from openmoe.checkpoint.description import Description
from openmoe.config import Architecture, ConfigError, ModelConfig

RECEIPT = 'conversion_receipt.json'
MAX_SHARD = 5_000_000_000
_LARGEST_RECEIPT = 256 << 20
_SMALL = 1 << 20  # files up to this size count into a fingerprint with their content
# What files of wrong types, sizes and nesting raise in code that is written for right ones.
_DAMAGE = (
  OSError,
  ValueError,
  TypeError,
  KeyError,
  AttributeError,
  IndexError,
  ArithmeticError,
  RecursionError,
  MemoryError,
)


class Layout(enum.Enum):
  """How kernels lie: [in, out], or [out, in] as PyTorch's Linear has them."""

  COMMON = 'common'
  TORCH = 'torch'


@contextlib.contextmanager
def reading(path: os.PathLike | str) -> Iterator[None]:
  """What reading a checkpoint raises becomes a ConvertError that names it: the edge of the files.

  Readers check what they expect and say it better; this is for all that nobody thought of.
  """
  try:
    yield
  except (ConvertError, NamesError, ConfigError):
    raise
  except _DAMAGE as error:
    told = isinstance(error, (paths.Unreadable, OSError))
    reason = str(error) if told else f'{type(error).__name__}: {error}'
    raise ConvertError(f'{os.fspath(path)} cannot be read: {reason[:500]}') from error


def read_model(told: object, where: str) -> ModelConfig:
  """A configuration that a file holds.

  Raises:
    ConvertError: it is damaged.
  """
  try:
    return fields.read(ModelConfig, told, where)
  except ConfigError as error:
    raise ConvertError(str(error)) from error


class Form(abc.ABC):
  """A checkpoint that is being read.

  Attributes:
    kind: 't5x', 'hf' or 'ours'.
    layout: of the kernels.
    separator: between the parts of a tensor's name.
    path: of the checkpoint itself.
    step: optimizer steps, None if the form does not say.
  """

  kind: ClassVar[str]
  layout: ClassVar[Layout] = Layout.COMMON
  separator: ClassVar[str] = '/'
  path: epath.Path
  step: int | None = None

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

  @property
  def has_optimizer(self) -> bool:
    """Whether Adafactor's state is there."""
    return False

  def slots(self, row: Row) -> dict[str, Stored]:
    """Adafactor's slots of a parameter that are in use, by name, in t5x's shape."""
    del row
    return {}

  def problems(self) -> Iterator[str]:
    """What is wrong with the files themselves, beyond names and values."""
    return iter(())

  def alias_problems(self, rows: Iterable[Row]) -> Iterator[str]:
    """One phrase per tensor that is stored twice and differs from itself."""
    del rows
    return iter(())

  def model(self) -> ModelConfig | None:
    """The whole configuration where the checkpoint has it, None where it tells sizes alone.

    Raises:
      ConvertError: what is there is damaged.
    """
    return None

  def told(self) -> dict[str, Any]:
    """What --model is compared with."""
    return self.sizes()

  def base(self) -> ModelConfig | None:
    """What sizes() leaves out, where the form has that."""
    return None

  def describe(self, config: ModelConfig) -> Description:
    """What a checkpoint made of this one says of itself."""
    jetmoe = config.architecture is Architecture.JETMOE
    tokens = {'start_id': 1, 'eos_ids': (2,)} if jetmoe and config.vocab_size > 2 else {}
    return Description(config, **tokens)

  def vocabulary_content(self) -> bytes:
    """The file of describe().vocabulary, empty where there is none at hand."""
    return b''

  def receipt(self) -> Mapping[str, Any] | None:
    path = self.path / RECEIPT
    return safe_json.read(path, limit=_LARGEST_RECEIPT) if path.exists() else None

  def transposed(self, row: Row) -> bool:
    """Whether this form's layout of a row is the transposed one."""
    return row.transposed and self.layout is Layout.TORCH

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
        small = described and size <= _SMALL
        content = paths.read_small(path, _SMALL).hex() if small else ''
        entries.append([os.path.relpath(path, self.path), size, content])
    return digest(sorted(entries))


def fill(target: np.ndarray, form: Form, row: Row) -> np.ndarray:
  """Reads a row of the table into an array of the common layout, piece by piece; returns it.

  Raises:
    ConvertError: a value overflows the array's dtype, or a file is damaged.
  """
  turned, stored = form.transposed(row), form.parameter(row)
  for start, x in stored.pieces():
    x = cast(x, target.dtype, stored.name)
    if not turned:
      target[start : start + len(x)] = x
    elif x.ndim > 2:
      transpose_into(target[start : start + len(x)], x)
    else:
      transpose_into(target[:, start : start + len(x)], x)
  return target


@dataclasses.dataclass(frozen=True)
class Options:
  """How to convert.

  Attributes:
    dtype: 'float32', 'bfloat16', or None to keep the source's.
    optimizer: carry Adafactor's state along, between t5x and ours.
    max_shard: bytes of a Hugging Face weight file.
    codec: of t5x chunks, 'zstd' or 'gzip'.
    orbax: writes t5x checkpoints as t5x's present default does, with zstd.
    tokenizer: files to put into a Hugging Face folder.
    logits: compare logits of source and target on seeded tokens at the end.
  """

  dtype: str | None = None
  optimizer: bool = False
  max_shard: int = MAX_SHARD
  codec: str = 'zstd'
  orbax: bool = False
  tokenizer: Sequence[pathlib.Path] = ()
  logits: bool = True


class Sink(abc.ABC):
  """A checkpoint that is being written, in a directory that is not yet its final one."""

  kind: ClassVar[str]
  layout: ClassVar[Layout] = Layout.COMMON
  holds_optimizer: ClassVar[bool] = True
  keeps_vocabulary: ClassVar[bool] = True  # its file goes into the run directory

  @classmethod
  @abc.abstractmethod
  def begin(cls, place: epath.Path, source: Form, described: Description, options: Options) -> Self:
    """A sink for what is in `source`.

    Args:
      place: becomes the checkpoint, or is a remote one.
      described: what it is to say of itself.
    """

  @classmethod
  def final_path(cls, out: os.PathLike | str, step: int) -> epath.Path:
    """Where a conversion ends up: in `checkpoint_<step>` of a run directory.

    Raises:
      ConvertError: `out` is named for another step.
    """
    root = paths.absolute(out)
    named = paths.step_of(root)
    if named not in (None, step):
      raise ConvertError(f'{root} is named for step {named}; the weights are of step {step}.')
    return root / paths.checkpoint_name(step) if named is None else root

  @classmethod
  def check_model(cls, config: ModelConfig) -> None:
    """Refuses a model that this form cannot hold.

    Raises:
      ConvertError: it has no names there.
    """
    del config

  @abc.abstractmethod
  def prepare(self, config: ModelConfig, sources: Mapping[str, Stored], dtype: np.dtype) -> None:
    """Lays out files for every row.

    Args:
      sources: stored source tensor by row.name: shapes in the common layout and units of reading.
      dtype: of the floating tensors to write.
    """

  def prepare_slots(self, slots: Mapping[str, Mapping[str, Stored]]) -> None:
    """Lays out Adafactor's slots in use, by t5x path of the parameter and name of the slot."""
    raise NotImplementedError(f'{type(self).__name__} holds no optimizer state')

  @abc.abstractmethod
  def parameter(self, row: Row) -> Writable:
    """Where a row goes."""

  def slot(self, row: Row, name: str) -> Writable:
    """Where a slot of a row goes."""
    raise NotImplementedError(f'{type(self).__name__} holds no optimizer state')

  @abc.abstractmethod
  def finish(self) -> None:
    """Writes what is left, after all tensors are in place."""

  def close(self) -> None:  # noqa: B027 (most have nothing to remove)
    """Removes what lies outside the checkpoint; whether it was finished or not."""
