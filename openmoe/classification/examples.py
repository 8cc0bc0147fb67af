"""Records of a classification: lines of JSON with a `text` and a `label`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from openmoe.config import ConfigError
from openmoe.data import files
from openmoe.data.files import DamagedFile

Label = str | int


@dataclasses.dataclass(frozen=True)
class Example:
  """Attributes:
  where: file and line, for errors.
  text: what is classified.
  label: a text or a whole number; None where it was not read.
  """

  where: str
  text: str
  label: Label | None


def read(path: str | os.PathLike, *, labelled: bool = True) -> list[Example]:
  """The records of a .jsonl file, plain, .gz or .zst.

  Args:
    labelled: every record needs a label; else labels are not looked at.

  Raises:
    ConfigError: the file is absent.
    DamagedFile: it has no records, or one is wrong; naming file and line.
  """
  found = [_example(value, where, labelled) for where, value in files.json_lines(path)]
  if not found:
    raise DamagedFile(f'{path} has no records; give lines such as {{"text": "...", "label": 1}}.')
  for example in found:
    if type(example.label) is not type(found[0].label):
      raise DamagedFile(
        f'{example.where}: label {example.label!r} and label {found[0].label!r} of '
        f'{found[0].where} are of two kinds; write all as texts or all as whole numbers.'
      )
  return found


def _example(value: Any, where: str, labelled: bool) -> Example:
  if not isinstance(value, dict):
    raise DamagedFile(
      f'{where}: the record is no JSON object; write {{"text": "...", "label": 1}}.'
    )
  needed = ('text', 'label') if labelled else ('text',)
  if missing := [name for name in needed if name not in value]:
    raise DamagedFile(f'{where}: the record has no {" and no ".join(missing)}; add it.')
  text, label = value['text'], value['label'] if labelled else None
  if not isinstance(text, str):
    raise DamagedFile(f'{where}: text is {_shown(text)}; a text in quotes belongs there.')
  if labelled and not is_label(label):
    raise DamagedFile(
      f'{where}: label is {_shown(label)}; a text that is not empty or a whole number belongs '
      'there.'
    )
  label = files.without_surrogates(label) if isinstance(label, str) else label
  return Example(where, files.without_surrogates(text), label)


def is_label(value: Any) -> bool:
  """Whether a value of JSON can be a label."""
  return isinstance(value, (str, int)) and not isinstance(value, bool) and value != ''


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f'{text[:77]}...'


def labels_of(examples: Sequence[Example]) -> tuple[Label, ...]:
  """The distinct labels in order.

  Raises:
    ConfigError: there is one only.
  """
  labels = tuple(sorted({example.label for example in examples}))
  if len(labels) < 2:
    raise ConfigError(
      f'All {len(examples)} records have the label {labels[0]!r}; a classifier needs two labels.'
    )
  return labels


def classes(examples: Sequence[Example], labels: Sequence[Label]) -> list[int]:
  """The place of every label in the list of a classifier.

  Raises:
    DamagedFile: a label is not in the list; naming file and line.
  """
  places = {label: place for place, label in enumerate(labels)}
  for example in examples:
    if example.label not in places:
      listed = ', '.join(map(repr, labels[:8])) + (', ...' if len(labels) > 8 else '')
      raise DamagedFile(
        f'{example.where}: label {example.label!r} is none of the {len(labels)} that the '
        f'classifier knows ({listed}); correct it, or train with it.'
      )
  return [places[example.label] for example in examples]
