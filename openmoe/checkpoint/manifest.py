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

from openmoe.checkpoint import safe_json
from openmoe.checkpoint.paths import Unreadable, is_inside, is_remote, open_regular, write_whole

NAME = 'manifest.json'
VERSION = 1
# The commit protocol of orbax rewrites these after the manifest is made.
_WRITTEN_LATER = frozenset({'_CHECKPOINT_METADATA', 'commit_success.txt', NAME})
_OWN = 'ocdbt.process_'  # begins the folder where orbax puts what one process wrote of an item
_DIGESTS = 'digests.process_'  # begins the file where that process describes it, for a while
_BLOCK = 1 << 22  # bytes hashed at a time
_LARGEST = 128 << 20  # bytes of a manifest: some 700,000 files


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
  with open_regular(path) as file:
    while block := file.read(_BLOCK):
      digest.update(block)
  return digest.hexdigest()


def _describe(path: epath.Path) -> dict[str, Any]:
  # Of remote files only sizes: hashing would read the checkpoint back over the network, and the
  # store has a checksum of its own.
  return {'size': path.stat().length, 'sha256': None if is_remote(path) else _sha256(path)}


def _in_threads(fn, items: list) -> list:
  # hashlib releases the interpreter lock on large blocks, so threads do use the cores.
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    return list(pool.map(fn, items))


def describe_own(item: epath.Path, process: int) -> None:
  """Describes the arrays that a process wrote for an item of a checkpoint, for write() to take.

  Raises:
    OSError: if a file cannot be read or the description cannot be written.
  """
  place = item / f'{_OWN}{process}'
  if is_remote(item) or not place.is_dir():
    return
  own = {f'{place.name}/{name}': path for name, path in _files(place).items()}
  entries = dict(zip(own, _in_threads(_describe, list(own.values())), strict=True))
  write_whole(item / f'{_DIGESTS}{process}', json.dumps(entries).encode())


def _take_own(directory: epath.Path, files: dict[str, epath.Path]) -> dict[str, Any]:
  """What the processes described of their files; their descriptions are removed."""
  described = {}
  for name in [n for n in files if n.rpartition('/')[2].startswith(_DIGESTS)]:
    path, item = files.pop(name), name.rpartition('/')[0]
    described |= {f'{item}/{k}': v for k, v in safe_json.read(path, limit=_LARGEST).items()}
    path.unlink()
  for name, entry in described.items():
    there = files[name].stat().length if name in files else 'no'
    if there != entry['size']:
      raise OSError(f'{directory / name} has {there} bytes; {entry["size"]} were written.')
  return described


def write(directory: epath.Path, step: int) -> None:
  """Describes every file of a finished checkpoint directory in its manifest.

  Reads only what no process has described.

  Raises:
    OSError: if a file cannot be read or the manifest cannot be written.
  """
  files = _files(directory)
  entries = _take_own(directory, files)
  others = sorted(files.keys() - entries.keys())
  entries |= zip(others, _in_threads(_describe, [files[n] for n in others]), strict=True)
  content = {'version': VERSION, 'step': step, 'files': dict(sorted(entries.items()))}
  write_whole(directory / NAME, json.dumps(content, indent=1).encode(), sync=True)


def _problem_of(path: epath.Path, size: int, sha256: str | None) -> str | None:
  try:
    if not path.exists():
      return 'is missing'
    there = path.stat().length
    if there != size:
      return f'has {there} bytes, not {size}'
    if sha256 is not None and _sha256(path) != sha256:
      return 'has another SHA-256 than when it was written'
  except (OSError, Unreadable) as error:
    return f'cannot be read ({error})'
  return None


def _entries(content: Mapping[str, Any]) -> dict[str, tuple[int, str | None]]:
  """{name: (size, SHA-256 or None)}.

  Raises:
    Unreadable: an entry is of another form, or names a file outside the checkpoint.
  """
  entries = {}
  for name, entry in safe_json.field(content, 'files', dict, 'it').items():
    where = f'its entry {name}'
    if not is_inside(name):
      raise Unreadable(f'{where} lies outside the checkpoint')
    if not isinstance(entry, dict):
      raise Unreadable(f'{where} is {entry!r:.40}')
    sha256 = entry.get('sha256')
    if not isinstance(sha256, str | None):
      raise Unreadable(f'{where}: sha256 is {sha256!r:.40}')
    entries[name] = safe_json.field(entry, 'size', int, where), sha256
  return entries


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
    content = safe_json.read(path, limit=_LARGEST)
    version = content.get('version')
    if version == VERSION:
      entries = _entries(content)
  except (OSError, Unreadable) as error:
    return f'has an unreadable {NAME} ({error})'
  if version != VERSION:
    return f'has a {NAME} of version {version}; this program reads version {VERSION}'
  if content.get('step') != step:
    return f'has the {NAME} of step {content.get("step")}'
  names = sorted(entries)[share::of]
  problems = _in_threads(lambda name: _problem_of(directory / name, *entries[name]), names)
  for name, problem in zip(names, problems, strict=True):
    if problem:
      return f'is damaged: {name} {problem}'
  return None
