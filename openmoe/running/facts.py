"""What all processes of a run must have in common, as names and values to compare."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from openmoe.data import exclusion
from openmoe.data.fingerprint import data_files
from openmoe.data.vocabulary import vocabulary_file
from openmoe.observe.record import package_versions
from openmoe.programme import as_programme

ROOT = pathlib.Path(__file__).parents[2]
_CODE = ('openmoe', 'tasks', 'scripts', 'convert')


def facts_of(arguments: Mapping[str, Any]) -> dict[str, str]:
  """Name -> value of what decides what a process computes: configuration, code and data.

  Args:
    arguments: of openmoe.train.train; its sources are registered.
  """
  for source in arguments.get('sources') or ():
    source.register()
  found = {f'version of {name}': version for name, version in package_versions().items()}
  for name, value in arguments.items():
    found |= flat(name, value)
  return found | code_facts() | _data_facts(arguments)


def flat(name: str, value: Any) -> dict[str, str]:
  """Fields of configurations, down to plain values; of other objects only their kind."""
  if isinstance(value, enum.Enum):
    return {name: repr(value.value)}
  if dataclasses.is_dataclass(value):
    parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
  elif isinstance(value, Mapping):
    parts = {str(key): part for key, part in sorted(value.items(), key=lambda item: str(item[0]))}
  elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
    parts = {str(i): part for i, part in enumerate(value)}
  elif value is None or isinstance(value, str | bytes | int | float):
    return {name: repr(value)[:200]}
  else:
    return {name: type(value).__qualname__}
  found: dict[str, str] = {}
  for key, part in parts.items():
    found |= flat(f'{name}.{key}', part)
  return found


def code_facts(root: pathlib.Path = ROOT) -> dict[str, str]:
  """Digest of every source file of ours under `root`."""
  paths = (path for name in _CODE for path in (root / name).rglob('*.py'))
  digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()[:12]
  return {f'code of {path.relative_to(root)}': digest(path) for path in paths}


def _data_facts(arguments: Mapping[str, Any]) -> dict[str, str]:
  """Size and digest of every local file that is read, and digest of every vocabulary."""
  found: dict[str, str] = {}
  stages = as_programme(arguments['data'], arguments['run'].total_steps).stages
  configs = [stage.data for stage in stages]
  if arguments.get('eval_data') is not None and arguments['run'].eval_period:
    configs.append(arguments['eval_data'])
  for config in configs:
    for path, told in data_files(config).items():
      # Hosts may mount a folder at places of their own; the name is what they share.
      name = f'data file {pathlib.PurePath(path).name}'
      parts = {*found.get(name, '').split(), told or 'remote'}
      found[name] = ' '.join(sorted(parts))
    if config.exclude:
      found[f'excluded documents of {config.split}'] = exclusion.load(config.exclude).digest
    if file := vocabulary_file(config.mixture_or_task_name):
      found['vocabulary'] = hashlib.sha256(file.content).hexdigest()[:16]
  return found
