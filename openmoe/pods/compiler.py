"""Has steps compiled in processes of their own, and keeps what came out by the request's digest.

libtpu never comes into this process: where it is installed, every jax process beside it would look
for a TPU. It lies in a folder of its own, which only the compiling process is told of.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from openmoe.checkpoint import fields, safe_json
from openmoe.checkpoint.paths import write_whole
from openmoe.config import ConfigError
from openmoe.pods.request import LIBTPU, Request

LIBRARY = 'TPU_LIBRARY_PATH'
FOLDER = '.libtpu'  # beside the packages openmoe and scripts
_ROOT = pathlib.Path(__file__).parent.parent.parent
# Without them libtpu asks a metadata server, takes a lock file, and writes to standard error.
_QUIET = {
  'JAX_PLATFORMS': 'cpu',
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_MIN_LOG_LEVEL': '3',
  'TPU_STDERR_LOG_LEVEL': '3',
  'TF_CPP_MIN_LOG_LEVEL': '3',
}
MOST_TEXT = 1 << 30  # bytes of a program


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What a compiler made of a step.

  Attributes:
    request: what was compiled.
    facts: memory, overflow, mesh, coordinates, seconds: see worker.compile_step.
    text: the program, '' where it was refused.
    wall_seconds: that compiling took, start of the process included.
    cached: whether it was there already.
  """

  request: Request
  facts: Mapping[str, Any]
  text: str
  wall_seconds: float
  cached: bool

  @property
  def fits(self) -> bool:
    return self.facts['overflow'] is None


def find_library() -> pathlib.Path:
  """The libtpu.so to compile with.

  Raises:
    ConfigError: there is none.
  """
  given = os.environ.get(LIBRARY)
  places = [pathlib.Path(given)] if given else [_ROOT / FOLDER / 'libtpu' / 'libtpu.so']
  for place in places:
    if place.is_file():
      return place
  raise ConfigError(
    f'{places[0]}: there is no libtpu, whose compiler makes the plans; install it into a folder '
    f'of its own: pip install --no-deps --target {_ROOT / FOLDER} libtpu=={LIBTPU}'
    + (f' (or unset {LIBRARY}).' if given else f', or set {LIBRARY}.')
  )


def cache_folder() -> pathlib.Path:
  """Where compiled steps are kept."""
  base = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(base) / 'openmoe' / 'plans'


def compiled(request: Request, folder: pathlib.Path | None = None) -> Compiled:
  """The step compiled for the request's machine, from the cache where it has been before.

  Args:
    folder: the cache; None takes cache_folder().

  Raises:
    ConfigError: there is no libtpu, or the compiler refuses for another reason than memory.
  """
  folder = cache_folder() if folder is None else folder
  kept = folder / request.digest
  if (kept / 'facts.json').is_file():
    return _read(request, kept, cached=True)
  library = find_library()
  folder.mkdir(parents=True, exist_ok=True)
  work = pathlib.Path(tempfile.mkdtemp(prefix='.compiling-', dir=folder))
  try:
    write_whole(work / 'request.json', json.dumps(fields.plain(request)).encode())
    _run(work, library)
    if kept.exists():  # another process was faster, or one was killed
      shutil.rmtree(kept)
    work.rename(kept)
  finally:
    shutil.rmtree(work, ignore_errors=True)
  return _read(request, kept, cached=False)


def _run(work: pathlib.Path, library: pathlib.Path) -> None:
  inherited = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  # Its temporary files would outlive a kill in the system's folder.
  environment = inherited | _QUIET | {LIBRARY: os.fspath(library), 'TMPDIR': os.fspath(work)}
  environment['PYTHONPATH'] = os.pathsep.join(
    [os.fspath(_ROOT), *filter(None, [inherited.get('PYTHONPATH')])]
  )
  begun = time.monotonic()
  command = [sys.executable, '-P', '-m', 'openmoe.pods.worker', os.fspath(work)]
  done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
  if done.returncode:
    said = done.stderr.decode(errors='replace').strip()
    if done.returncode == ConfigError.exit_code:
      raise ConfigError(said.splitlines()[-1])
    raise ConfigError(
      f'The compiling process ended with {done.returncode}: {said[-1500:] or "it said nothing"}; '
      'where it was killed, memory may be short: give --effort=fast, or a machine with more.'
    )
  facts = safe_json.read(work / 'facts.json')
  facts['wall_seconds'] = time.monotonic() - begun
  write_whole(work / 'facts.json', json.dumps(facts).encode())


def _read(request: Request, kept: pathlib.Path, cached: bool) -> Compiled:
  facts = safe_json.read(kept / 'facts.json')
  text, program = '', kept / 'program.txt.gz'
  if program.is_file():
    with gzip.open(program) as file:
      text = file.read(MOST_TEXT).decode()
  return Compiled(request, facts, text, facts['wall_seconds'], cached)
