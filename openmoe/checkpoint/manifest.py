"""What a complete checkpoint consists of: every file with its size and SHA-256.

The manifest is written last, before a checkpoint gets its final name, so a directory without one
was never finished. It finds truncated, missing, changed and mixed-up files; it does not protect
against someone who can rewrite the manifest as well.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

NAME = 'manifest.json'
VERSION = 1
# The commit protocol of orbax rewrites these after the manifest is made.
_WRITTEN_LATER = frozenset({'_CHECKPOINT_METADATA', 'commit_success.txt', NAME})
_BLOCK = 1 << 22  # bytes hashed at a time


def is_remote(path: os.PathLike | str) -> bool:
  """Whether a path lies in an object store such as gs://.

  Objects there appear whole or not at all and carry the store's own checksum, so only their sizes
  are recorded: hashing would read the checkpoint back over the network.
  """
  return '://' in os.fspath(path)


def _files(directory: epath.Path) -> dict[str, epath.Path]:
  """Relative name -> path of every file that belongs in the manifest."""
  found, folders = {}, [('', directory)]
  while folders:
    prefix, folder = folders.pop()
    for path in folder.iterdir():
      if path.is_dir():
        folders.append((f'{prefix}{path.name}/', path))
      elif prefix or path.name not in _WRITTEN_LATER:
        found[prefix + path.name] = path
  return found


def _sha256(path: epath.Path) -> str:
  digest = hashlib.sha256()
  with path.open('rb') as file:
    while block := file.read(_BLOCK):
      digest.update(block)
  return digest.hexdigest()


def _describe(path: epath.Path) -> dict[str, Any]:
  return {'size': path.stat().length, 'sha256': None if is_remote(path) else _sha256(path)}


def _in_threads(fn, items: list) -> list:
  # hashlib releases the interpreter lock on large blocks, so threads do use the cores.
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    return list(pool.map(fn, items))


def write(directory: epath.Path, step: int) -> None:
  """Describes every file of a finished checkpoint directory in its manifest.

  Raises:
    OSError: if a file cannot be read or the manifest cannot be written.
  """
  files = _files(directory)
  entries = dict(zip(files, _in_threads(_describe, list(files.values())), strict=True))
  content = {'version': VERSION, 'step': step, 'files': dict(sorted(entries.items()))}
  (directory / NAME).write_text(json.dumps(content, indent=1))


def _problem_of(path: epath.Path, entry: Mapping[str, Any]) -> str | None:
  if not path.exists():
    return 'is missing'
  size = path.stat().length
  if size != entry['size']:
    return f'has {size} bytes, not {entry["size"]}'
  if entry['sha256'] is not None and _sha256(path) != entry['sha256']:
    return 'has another SHA-256 than when it was written'
  return None


def find_problem(directory: epath.Path, step: int, share: int = 0, of: int = 1) -> str | None:
  """The first thing wrong with a checkpoint, or None if it is whole.

  Args:
    directory: of the checkpoint.
    step: that it should be of.
    share, of: check only every `of`-th file from number `share` on, so that processes can divide
      the reading of a large checkpoint among them.

  Returns:
    A phrase that names the file, fit to follow the checkpoint's name in a message.
  """
  path = directory / NAME
  if not path.exists():
    return f'has no {NAME}: it was never finished'
  try:
    content = json.loads(path.read_text())
    version, files = content['version'], content['files']
    names = sorted(files)[share::of]
  except (ValueError, KeyError, TypeError) as error:
    return f'has an unreadable {NAME} ({error})'
  if version != VERSION:
    return f'has a {NAME} of version {version}; this program reads version {VERSION}'
  if content.get('step') != step:
    return f'has the {NAME} of step {content.get("step")}'
  for name, problem in zip(
    names, _in_threads(lambda n: _problem_of(directory / n, files[n]), names), strict=True
  ):
    if problem:
      return f'is damaged: {name} {problem}'
  return None
