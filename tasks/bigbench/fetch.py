"""Getting the task files of BIG-bench-Lite, from the package index by pip or a local archive."""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile

from openmoe.config import ConfigError
from tasks.bigbench import files

ARCHIVE = 'bigbench-1.0.0.tar.gz'
SIZE = 358_249_635
SHA256 = '1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2'
_INSIDE = 'bigbench-1.0.0/bigbench/benchmark_tasks/'
_SPARE = 1 << 20


def _pip() -> list[str]:
  # An environment that uv made has no pip of its own.
  for pip in ([sys.executable, '-m', 'pip'], [shutil.which('pip3') or shutil.which('pip')]):
    if (
      pip[0]
      and subprocess.run([*pip, '--version'], capture_output=True, check=False).returncode == 0
    ):
      return pip
  raise ConfigError(f'There is no pip to fetch {ARCHIVE} with: install it, or give --archive FILE.')


def download(place: pathlib.Path, index_url: str | None = None) -> pathlib.Path:
  """Lets pip put the archive into a directory, from whichever index pip is set up to use.

  Args:
    place: directory; the archive appears in it when it is whole and the published one.
    index_url: an index in place of pip's.

  Raises:
    ConfigError: pip cannot get it; with pip's own last words.
  """
  place.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=place, prefix='.partial-') as partial:
    wanted = pathlib.Path(partial) / 'requirements.txt'
    wanted.write_text(f'bigbench==1.0.0 --hash=sha256:{SHA256}\n', encoding='utf-8')
    # pip asks an archive for its dependencies by its setup.py, after the digest was found right.
    command = [*_pip(), '--disable-pip-version-check', '--no-input', 'download', '--no-deps']
    command += ['--no-cache-dir', '--no-binary', 'bigbench', '--dest', partial, '-r', str(wanted)]
    command += ['--index-url', index_url] if index_url else []
    # pip takes what a server sends, however much: no file may be larger than the archive.
    most = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (SIZE + _SPARE,) * 2)
    environment = dict(os.environ, TMPDIR=partial)
    done = subprocess.run(
      command,
      env=environment,
      preexec_fn=most,
      stderr=subprocess.PIPE,
      text=True,
      encoding='utf-8',
      errors='replace',
      check=False,
    )
    found = pathlib.Path(partial) / ARCHIVE
    if done.returncode or not found.is_file():
      said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), '')
      raise ConfigError(
        f'pip could not fetch {ARCHIVE} ({said.strip() or f"exit code {done.returncode}"}). Check '
        'the connection, name an index with --index_url, or give a copy with --archive.'
      )
    return found.replace(place / ARCHIVE)


def check_archive(path: pathlib.Path) -> None:
  """Raises ConfigError unless the file is the published archive, bit for bit."""
  if not path.is_file():
    raise ConfigError(f'{path} is not a file; --archive takes a copy of {ARCHIVE}.')
  size = path.stat().st_size
  if size != SIZE:
    raise ConfigError(f'{path} has {size:,} bytes, {ARCHIVE} has {SIZE:,}; delete and fetch again.')
  with path.open('rb') as file:
    found = hashlib.file_digest(file, 'sha256').hexdigest()
  if found != SHA256:
    raise ConfigError(f'{path} has sha256 {found}, not {SHA256}; delete it and fetch again.')


def extract(archive: pathlib.Path, out: pathlib.Path) -> None:
  """Puts the 24 folders into `out`, each under its name only when whole.

  Raises:
    ConfigError: something is missing in the archive, or what came out is not what it should be.
  """
  out.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=out, prefix='.partial-') as place:
    place = pathlib.Path(place)
    with tarfile.open(archive, 'r|gz') as tar:
      for member in tar:
        name = member.name.removeprefix(_INSIDE)
        if name != member.name and member.isfile() and name.split('/')[0] in files.TASKS:
          member.name = name
          tar.extract(member, place, filter='data')
    found = files.digest(place)
    if found != files.DIGEST:
      raise ConfigError(f'{archive} gives task files with digest {found}, not {files.DIGEST}.')
    for name in files.TASKS:
      if (out / name).exists():
        shutil.rmtree(out / name)
      (place / name).replace(out / name)


def fetch(
  out: pathlib.Path,
  archive: pathlib.Path | None = None,
  index_url: str | None = None,
  keep: bool = False,
) -> bool:
  """Puts the task files into `out`.

  Args:
    archive: a copy that is here already.
    index_url: see download().
    keep: leaves a fetched archive in `out`.

  Returns:
    Whether there was anything to do.

  Raises:
    ConfigError: the archive cannot be had or is not the published one.
  """
  if files.is_complete(out):
    return False
  local = archive or out / ARCHIVE
  if archive is None and not local.exists():
    download(out, index_url)
  check_archive(local)
  extract(local, out)
  if archive is None and not keep:
    local.unlink()
  return True
