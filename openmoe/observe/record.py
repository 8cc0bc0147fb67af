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
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from openmoe.checkpoint.paths import write_whole

CONFIG = 'config.gin'
STARTS = 'run.json'
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
      ['git', '-C', root, *args], capture_output=True, text=True, check=True, timeout=10
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
  extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Writes config.gin, and adds this start to the list in run.json.

  When a resumed run has another configuration, the former one is kept as
  config_until_<start_step>.gin, or with a number behind if that is there.

  Args:
    model_dir: run directory.
    gin_config: the operative configuration.
    start_step: step that this start continues from.
    extra: further JSON-able facts, such as the data seed.

  Returns:
    The record of this start: describe_run() and what was given. Processes other than 0 write
    nothing.
  """
  record = {'start_step': start_step} | describe_run() | dict(extra or {})
  if jax.process_index() != 0:
    return record
  directory = epath.Path(model_dir)
  directory.mkdir(parents=True, exist_ok=True)
  config, starts = directory / CONFIG, directory / STARTS
  if config.exists() and config.read_text() != gin_config:
    write_whole(_free(directory / f'config_until_{start_step}.gin'), config.read_bytes())
  write_whole(config, gin_config.encode())
  before = json.loads(starts.read_text()) if starts.exists() else []
  write_whole(starts, json.dumps([*before, record], indent=1).encode())
  return record
