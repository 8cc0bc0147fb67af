"""Proves that a run survives kills: python -m scripts.drill --gin_file=... [--kills 10]

  python -m scripts.drill --gin_file=gin/models/openmoe_tiny.gin \\
    --gin_file=gin/runs/pretrain.gin --gin_file=gin/experiments/demo.gin

Trains a tiny twin of the configuration once undisturbed, then again under SIGKILL and SIGTERM at
random moments (import, data, restore, compile, step, evaluation, save, write, rename, switch of
stages), each time started anew by the same command. Parameters, optimizer, every batch and every
metric must be the same bit for bit; on other meshes or numbers of processes the
numbers may differ by rounding, and it is told by how much. A control, in which one bit of a
checkpoint is altered, must be found to differ. Writes resume_proof.json.

Exit codes: 0 survived, 65 not, 64 it cannot be run as configured.
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import os
import pathlib
import sys
import time

from scripts import quiet

quiet.import_tensorflow()

import gin
import jax
from absl import flags

from openmoe.config import ConfigError, MeshConfig
from openmoe.drill.run import drill
from openmoe.drill.starts import Shape, Starts
from openmoe.drill.twin import fitting
from scripts import configuration, gin_flags

_KILLS = flags.DEFINE_integer('kills', 10, 'How often the run is killed.')
_HOSTS = flags.DEFINE_list('hosts', ['1'], 'Numbers of processes on which the starts take turns.')
_MESHES = flags.DEFINE_list(
  'meshes', [], 'Expert x model partitions on which they take turns, as 4x1,2x2; default: the '
  'configured one, as far as it fits.',
)  # fmt: skip
_SEED = flags.DEFINE_integer('seed', 0, 'Of the moments.')
_DIRECTORY = flags.DEFINE_string('directory', None, 'New; default: runs/drill_<time>.')
_OWN = ('kills', 'hosts', 'meshes', 'seed', 'directory')


def shapes(mesh: MeshConfig, devices: int) -> list[Shape]:
  """What --hosts and --meshes say.

  Raises:
    ConfigError: they say no such thing.
  """
  if not all(text.isdigit() and int(text) for text in _HOSTS.value):
    raise ConfigError(f'--hosts={",".join(_HOSTS.value)} must be numbers, as 1,2.')
  pairs = [text.split('x') for text in _MESHES.value]
  if not all(len(pair) == 2 and all(p.isdigit() and int(p) for p in pair) for pair in pairs):
    raise ConfigError(f'--meshes={",".join(_MESHES.value)} must be EXPERTxMODEL, as 4x1,2x2.')
  if max(map(int, _HOSTS.value)) > 1 and os.environ.get('JAX_PLATFORMS') != 'cpu':
    raise ConfigError('--hosts above 1 simulates them on the CPU; set JAX_PLATFORMS=cpu.')
  meshes = [MeshConfig(int(e), int(m), mesh.fsdp) for e, m in pairs] or [fitting(mesh, devices)]
  return [Shape(int(hosts), devices, one) for one in meshes for hosts in _HOSTS.value]


def child_arguments(argv: list[str]) -> list[str]:
  """The arguments of this command that scripts.train has too."""
  kept, skip = [], False
  for arg in argv:
    name, given, _ = arg.lstrip('-').partition('=')
    mine = arg.startswith('-') and name in _OWN
    if not skip and not mine:
      kept.append(arg)
    skip = mine and not given
  return kept


def main() -> int:
  where = pathlib.Path(_DIRECTORY.value or time.strftime('runs/drill_%Y%m%d_%H%M%S'))
  flags.FLAGS.gin_bindings = [*flags.FLAGS.gin_bindings, f'MODEL_DIR={str(where)!r}']
  arguments = configuration.configure(tiny=True)
  environment = {'JAX_COMPILATION_CACHE_DIR': str(where.absolute()) + '_compiled'} | os.environ
  environment.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
  given = ['-m', 'scripts.train', '--tiny', *child_arguments(sys.argv[1:])]
  survived = drill(
    arguments,
    Starts(given, environment),
    shapes(arguments['mesh'], jax.device_count()),
    where.absolute(),
    _KILLS.value,
    _SEED.value,
    gin.config_str(),
  )
  return 0 if survived else command.DAMAGED


if __name__ == '__main__':
  gin_flags.run(main)
