"""A checkpoint as a source: opening it whatever its form, and what it must satisfy."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

import flax.traverse_util
from etils import epath

from convert.core.forms import Form, reading
from convert.core.names import Row, expected_shapes, listed, name_table, refuse_names
from convert.core.tensors import ConvertError, is_float
from convert.formats.hf import HfForm, is_hf
from convert.formats.ours import OursForm, is_ours
from convert.formats.t5x import T5xForm, is_t5x
from openmoe.checkpoint.paths import step_of
from openmoe.config import ModelConfig
from openmoe.models import abstract_params

# Kind -> what reads it, how its directory is told, and what that looks for.
_KINDS = {
  't5x': (T5xForm, is_t5x, 'a file `checkpoint`'),
  'hf': (HfForm, is_hf, 'config.json'),
  'ours': (OursForm, is_ours, 'metadata/metadata'),
}


def find_form(path: str | os.PathLike, kind: str | None = None) -> Form:
  """Opens a checkpoint of any form; of a run directory, its newest checkpoint.

  Raises:
    ConvertError: there is no checkpoint of that kind, or it cannot be read.
  """
  root = epath.Path(path)
  with reading(root):
    if not root.exists():
      raise ConvertError(f'{root} does not exist.')
    if not root.is_dir():
      raise ConvertError(f"{root} is a file; give the checkpoint's directory.")
    steps = [(step, p) for p in root.iterdir() if (step := step_of(p)) is not None]
    for place in [root, *(p for _, p in sorted(steps, reverse=True))]:
      for name, (_, is_kind, _) in _KINDS.items():
        if kind in (None, name) and is_kind(place):
          return open_form(name, place)
  needed = _KINDS[kind][2] if kind else ' or '.join(wanted for _, _, wanted in _KINDS.values())
  raise ConvertError(
    f'{root} holds no {kind or ""} checkpoint: neither it nor a checkpoint_<step> '
    f'inside has {needed}.'
  )


def open_form(kind: str, path: epath.Path) -> Form:
  """The checkpoint of a kind that lies at `path` itself.

  Raises:
    ConvertError: it cannot be read.
  """
  with reading(path):
    return _KINDS[kind][0](path)


@functools.cache
def model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Shape of every row in the common layout, by its name; from the model itself.

  Raises:
    ConvertError: there are no arrays of such sizes.
  """
  try:
    shapes = flax.traverse_util.flatten_dict(abstract_params(config)[0], sep='/')
  except (OverflowError, ValueError, TypeError, ZeroDivisionError) as error:
    raise ConvertError(f'{config.name} is no model of possible sizes: {error}.') from error
  ours = {path: leaf.shape for path, leaf in shapes.items()}
  return expected_shapes(name_table(config), ours)


def shape_problems(
  form: Form, rows: Iterable[Row], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[Row, str]]:
  """(row, phrase) for every parameter whose shape is not the model's."""
  for row in rows:
    stored, expected = form.parameter(row), shapes[row.name]
    if form.transposed(row):
      expected = (*expected[:-2], expected[-1], expected[-2])
    if tuple(stored.shape) != tuple(expected):
      yield row, f'{stored.name} has shape {list(stored.shape)}, not {list(expected)}'
    elif not is_float(stored.dtype):
      yield row, f'{stored.name} is of {stored.dtype.name}, no type of weights: save it as float32'


def model_problems(
  form: Form, rows: Sequence[Row], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
  """One phrase per name, or else per shape, that is not the model's."""
  with reading(form.path):
    return form.check_names(rows) or [p for _, p in shape_problems(form, rows, shapes)]


def check_source(form: Form, rows: Sequence[Row], shapes: Mapping[str, tuple[int, ...]]) -> None:
  """Refuses a source whose names or shapes are not the model's.

  Raises:
    NamesError, ConvertError: naming the tensors at fault.
  """
  with reading(form.path):
    refuse_names(form.path, form.check_names(rows))
    problems = [p for _, p in shape_problems(form, rows, shapes)]
    if problems := problems or list(form.alias_problems(rows)):
      raise ConvertError(f'{form.path}: {listed(problems)}. Is --model the right one?')
