"""A family of checkpoints of one run, converted side by side, each under a name that tells its age.

`stepN-tokensMB`, as revisions of published models are called: N optimizer steps, M billions of
tokens. Every one is a conversion of its own with its own receipt; what is finished already is left
as it is, so the same command goes on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from etils import epath

from convert.core.forms import Form, Options
from convert.core.source import find_form
from convert.core.tensors import ConvertError
from convert.run import Result, convert
from openmoe.checkpoint.paths import step_of

_NAME = re.compile(r'step(\d{1,18})-tokens([\d.]{1,18})B')


def revision_name(step: int, tokens: int) -> str:
  """'step500000-tokens1100B'.

  >>> revision_name(200, 819200), revision_name(500_000, 1_100_000_000_000)
  ('step200-tokens0.0008B', 'step500000-tokens1100B')
  """
  billions = tokens / 1e9
  text = f'{billions:.0f}' if billions >= 10 else f'{billions:.4f}'.rstrip('0').rstrip('.')
  return f'step{step}-tokens{text}B'


def checkpoints(source: str | os.PathLike) -> list[epath.Path]:
  """The checkpoints of a source by step: those of a run directory or a series, or itself."""
  root = epath.Path(source)
  if not root.is_dir():
    return [root]
  found = []
  for path in root.iterdir():
    named = _NAME.fullmatch(path.name)
    step = int(named[1]) if named else step_of(path)
    if step is not None and path.is_dir():
      found.append((step, path))
  return [path for _, path in sorted(found)] or [root]


def tokens_of(form: Form, tokens_per_step: int | None) -> int:
  """Tokens of training of a checkpoint.

  Raises:
    ConvertError: it does not tell, and nobody says how many a step has.
  """
  told = getattr(form, 'description', None)
  if told is not None and told.tokens_seen is not None:
    return told.tokens_seen
  if tokens_per_step is None or form.step is None:
    raise ConvertError(
      f'{form.path} does not tell its tokens: give --tokens_per_step, tokens of a batch '
      '(BATCH_SIZE times the length of its rows).'
    )
  return form.step * tokens_per_step


def convert_series(
  sources: Sequence[str],
  kind: str,
  out: str,
  model: str | None,
  options: Options,
  tokens_per_step: int | None = None,
) -> Iterator[tuple[str, Result]]:
  """Converts every checkpoint of the sources to OUT/stepN-tokensMB.

  Args:
    sources: run directories, single checkpoints, Hugging Face folders, series.
    kind: of the targets, 'hf' or 't5x'.

  Raises:
    ConvertError: one does not tell its step, or two are of the same; before anything is written.
  """
  forms, names = [], {}
  for source in sources:
    for path in checkpoints(source):
      form = find_form(path)
      if form.step is None:
        raise ConvertError(f'{path} does not tell its step; a series is of checkpoints that do.')
      name = revision_name(form.step, tokens_of(form, tokens_per_step))
      if name in names:
        raise ConvertError(f'{path} and {names[name]} would both be {name}; give one of them.')
      names[name] = path
      forms.append((name, form))
  for name, form in sorted(forms, key=lambda pair: pair[1].step):
    yield name, convert(form, kind, os.path.join(out, name), model, options)
