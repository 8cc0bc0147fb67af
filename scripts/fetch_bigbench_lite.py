"""Gets the task files of BIG-bench-Lite: python -m scripts.fetch_bigbench_lite [--out DIR]

They are taken from the source archive of bigbench 1.0.0 on the package index that pip is set up to
use (PIP_INDEX_URL, pip's configuration, or pypi.org); nothing of the package is executed. The
archive, 358 MB, is read once: 71 MB of it, the 24 folders, are kept. A download that was
interrupted is taken up where the server allows it. With everything in place, nothing is done.

  --archive FILE     a copy of the archive that is already here
  --keep_archive     leave the archive in DIR
"""

from __future__ import annotations

import argparse
import hashlib
import html.parser
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable

from rich.console import Console
from rich.progress import (
  BarColumn,
  DownloadColumn,
  Progress,
  TimeRemainingColumn,
  TransferSpeedColumn,
)

from openmoe.config import ConfigError
from tasks.bigbench import files

ARCHIVE = 'bigbench-1.0.0.tar.gz'
SIZE = 358_249_635
SHA256 = '1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2'
_INSIDE = 'bigbench-1.0.0/bigbench/benchmark_tasks/'
_CHUNK = 1 << 20
_PYPI = 'https://pypi.org/simple'


def index_url() -> str:
  """Address of the package index as pip would take it."""
  if os.environ.get('PIP_INDEX_URL'):
    return os.environ['PIP_INDEX_URL'].rstrip('/')
  # An environment that uv made has no pip of its own; pip's files then speak through another one.
  for pip in ([sys.executable, '-m', 'pip'], [shutil.which('pip3') or shutil.which('pip')]):
    if pip[0] is None:
      continue
    done = subprocess.run(
      [*pip, 'config', 'get', 'global.index-url'],
      capture_output=True,
      text=True,
      check=False,  # a value that is not set is an error
    )
    if done.returncode == 0 and done.stdout.strip():
      return done.stdout.strip().rstrip('/')
  return _PYPI


class _Links(html.parser.HTMLParser):
  """Addresses of all links of a page."""

  def __init__(self):
    super().__init__()
    self.found: list[str] = []

  def handle_starttag(self, tag, attrs):
    if tag == 'a':
      self.found += [value for name, value in attrs if name == 'href' and value]


def archive_url(index: str) -> str:
  """Address of the archive, from the index's page of the project (JSON or HTML form).

  Raises:
    ConfigError: the index cannot be read or does not list the archive.
  """
  page = f'{index}/bigbench/'
  kinds = 'application/vnd.pypi.simple.v1+json, text/html;q=0.5'
  try:
    with urllib.request.urlopen(_request(page, Accept=kinds), timeout=60) as answer:
      text, kind = answer.read().decode(), answer.headers.get('content-type', '')
  except (urllib.error.URLError, TimeoutError) as error:
    raise ConfigError(
      f'{page} cannot be read ({error}). Check the connection, name an index with --index_url, or '
      f'give a copy of {ARCHIVE} with --archive.'
    ) from error
  if 'json' in kind or text.lstrip().startswith('{'):
    links = [file['url'] for file in json.loads(text)['files']]
  else:
    parser = _Links()
    parser.feed(text)
    links = parser.found
  for link in links:
    address = urllib.parse.urljoin(page, link).partition('#')[0]
    if address.rpartition('/')[2] == ARCHIVE:
      return address
  raise ConfigError(
    f'{page} lists {len(links)} files and {ARCHIVE} is not among them; name an index that mirrors '
    'pypi.org with --index_url, or give the file with --archive.'
  )


def _request(address: str, **headers: str) -> urllib.request.Request:
  return urllib.request.Request(address, headers={'User-Agent': 'openmoe', **headers})


def download(address: str, path: pathlib.Path, size: int, show: Callable[[int], None]) -> None:
  """Streams a file to `path`.part and renames it when all of it is there.

  Args:
    address: where from; a partial file is continued if the server honours Range.
    path: final name.
    size: bytes expected.
    show: called with the bytes that are there so far.

  Raises:
    ConfigError: the server fails or sends another number of bytes.
  """
  part = path.with_name(f'{path.name}.part')
  begin = part.stat().st_size if part.exists() else 0
  if begin > size:
    begin = 0
  if begin < size:
    headers = {'Range': f'bytes={begin}-'} if begin else {}
    try:
      with urllib.request.urlopen(_request(address, **headers), timeout=60) as answer:
        begin = begin if answer.status == 206 else 0  # a server without Range sends all of it
        with part.open('ab' if begin else 'wb') as file:
          while chunk := answer.read(_CHUNK):
            file.write(chunk)
            begin += len(chunk)
            show(begin)
    except (OSError, TimeoutError) as error:
      raise ConfigError(
        f'{address} broke off after {begin:,} of {size:,} bytes ({error}). The same command takes '
        'it up from there.'
      ) from error
  if part.stat().st_size != size:
    raise ConfigError(
      f'{address} ended after {part.stat().st_size:,} of {size:,} bytes. The same command takes it '
      'up from there.'
    )
  part.replace(path)


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


def fetch(out: pathlib.Path, archive: pathlib.Path | None, index: str | None, keep: bool) -> bool:
  """Puts the task files into `out`; see the module's docstring.

  Returns:
    Whether there was anything to do.
  """
  console = Console(stderr=True)
  if files.is_complete(out):
    return False
  out.mkdir(parents=True, exist_ok=True)
  local = archive or out / ARCHIVE
  if archive is None and not local.exists():
    address = archive_url(index or index_url())
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console.print(f'{address}\n  -> {out}', highlight=False)
    with Progress(*columns, console=console) as progress:
      task = progress.add_task('', total=SIZE)
      download(address, local, SIZE, lambda done: progress.update(task, completed=done))
  check_archive(local)
  extract(local, out)
  if archive is None and not keep:
    local.unlink()
  return True


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path(files.DEFAULT_DIR))
  parser.add_argument('--archive', type=pathlib.Path, help=f'a local copy of {ARCHIVE}')
  parser.add_argument('--index_url', help='package index (default: the one pip is set up to use)')
  parser.add_argument('--keep_archive', action='store_true')
  args = parser.parse_args(argv)
  try:
    changed = fetch(args.out, args.archive, args.index_url, args.keep_archive)
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 64
  print(f'{len(files.TASKS)} tasks in {args.out}{"" if changed else " (already there)"}')
  return 0


if __name__ == '__main__':
  raise SystemExit(main())
