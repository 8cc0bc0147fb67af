"""What is needed to tell later what a run was: configuration, versions, commit, machine.

Written when a run starts or resumes; nothing here is read back by training.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath

from openmoe.checkpoint import safe_json
from openmoe.checkpoint.paths import Unreadable, read_small, write_whole
from openmoe.observe.notes import Note, set_aside

CONFIG = 'config.gin'
STARTS = 'run.json'
_LIMIT = 32 << 20  # bytes of a configuration
_PACKAGES = (
  'clu', 'flax', 'gin-config', 'jax', 'jaxlib', 'jax-cuda12-plugin', 'libtpu', 'numpy', 'optax',
  'orbax-checkpoint', 'sentencepiece', 'seqio', 'tensorflow', 'tensorflow-datasets', 'tensorstore',
)  # fmt: skip


def package_versions() -> dict[str, str]:
  """Versions of the packages that decide what a run computes; those that are installed."""
  versions = {}
  for name in _PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return versions


def git_commit() -> str | None:
  """Commit of this source tree, with '-dirty' if files differ; None outside a git checkout."""
  root = pathlib.Path(__file__).parents[2]

  def git(*args: str) -> str:
    done = subprocess.run(
      ['git', '-C', root, *args], capture_output=True, encoding='utf-8', check=True, timeout=10
    )
    return done.stdout.strip()

  try:
    # Installed as a package inside somebody else's checkout, that commit would say nothing of us.
    if pathlib.Path(git('rev-parse', '--show-toplevel')) != root.resolve():
      return None
    return git('rev-parse', 'HEAD') + ('-dirty' if git('status', '--porcelain') else '')
  except (OSError, subprocess.SubprocessError):
    return None


def describe_run() -> dict[str, Any]:
  """Facts about this process and machine, JSON-able; goes beside the checkpoints as well."""
  devices = jax.devices()
  return {
    'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'command': shlex.join(sys.orig_argv),
    'git_commit': git_commit(),
    'host': platform.node(),
    'platform': platform.platform(),
    'python': platform.python_version(),
    'packages': package_versions(),
    'devices': {
      'kind': devices[0].device_kind,
      'count': len(devices),
      'processes': jax.process_count(),
    },
    'XLA_FLAGS': os.environ.get('XLA_FLAGS', ''),
  }


def _free(path: epath.Path) -> epath.Path:
  """The path itself, or the first of NAME_2.gin, NAME_3.gin... that no file has."""
  place, number = path, 1
  while place.exists():
    number += 1
    place = path.with_name(f'{path.stem}_{number}{path.suffix}')
  return place


def write_run_record(
  model_dir: str | os.PathLike,
  gin_config: str,
  start_step: int = 0,
  note: Note = logging.warning,
  stages: Sequence[tuple[str, int]] = (),
) -> dict[str, Any]:
  """Writes config.gin, and adds this start to the list in run.json.

  When a resumed run has another configuration, the former one is kept as
  config_until_<start_step>.gin, or with a number behind if that is there. Neither file is read by
  a program again, so one that is damaged is kept aside and one that cannot be written is noted.

  Args:
    model_dir: run directory.
    gin_config: the operative configuration.
    start_step: step that this start continues from.
    note: receives what went wrong, as one line of text each.
    stages: name and steps of each.

  Returns:
    The record of this start, describe_run() and the step. Processes other than 0 write nothing.
  """
  record = {'start_step': start_step, 'stages': [list(s) for s in stages]} | describe_run()
  if jax.process_index() == 0:
    directory = epath.Path(model_dir)
    try:
      directory.mkdir(parents=True, exist_ok=True)
      _write_config(directory, gin_config.encode(), start_step, note)
      _add_start(directory / STARTS, record, note)
    except (OSError, Unreadable) as error:
      note(f'What this run is could not be written down ({error}); training goes on.')
  return record


def _write_config(directory: epath.Path, content: bytes, start_step: int, note: Note) -> None:
  path = directory / CONFIG
  if path.exists() and (former := read_small(path, _LIMIT)) != content:
    kept = _free(directory / f'config_until_{start_step}.gin')
    write_whole(kept, former)
    if new := _new_lines(former, content):
      note(f'Configured otherwise than the start before ({kept.name}): {"; ".join(new)}.')
  write_whole(path, content)


def _new_lines(former: bytes, content: bytes) -> list[str]:
  """Settings that a configuration has and the former one has not; none of a damaged one."""
  plain = lambda text: [' '.join(line.split()) for line in text.decode('utf-8').split('\n')]
  try:
    known = set(plain(former))
  except UnicodeDecodeError:
    return []
  new = [line for line in plain(content) if line not in known and '=' in line]
  return new[:8] + ([f'and {len(new) - 8} more'] if len(new) > 8 else [])


def _add_start(path: epath.Path, record: Mapping[str, Any], note: Note) -> None:
  before = []
  if path.exists():
    try:
      before = safe_json.read(path, list)
    except Unreadable as error:
      set_aside(path, error, note)
  write_whole(path, json.dumps([*before, record], indent=1).encode())
