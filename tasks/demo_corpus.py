"""Builds the demo's two corpora from the running interpreter's own standard library.

Prose is the language reference that pydoc carries and the docstrings; code is the source files.
Documents are shuffled by a hash of their name, one in sixteen is held out for validation, and a
vocabulary is trained on the rest. The content depends on the Python version: fine for a demo, not
for golden values.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import shutil
import sysconfig
import tokenize
from collections.abc import Iterator

from openmoe.config import ConfigError
from openmoe.data import files
from openmoe.data.vocabulary import train_vocabulary

# Pieces and sentinels: 2048 rows in all; 128 sentinels are enough for lengths up to 512.
PIECES = 1920
EXTRA_IDS = 128

CORPORA = ('prose', 'code')
TRAIN_FILES = 4
_HELD_OUT_EVERY = 16
_FORMAT = 1
_LEAST_CHARACTERS = 200
# Neither the tests nor generated tables are text worth learning from.
_SKIPPED_FOLDERS = {
  'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__', 'encodings',
  'lib2to3', 'pydoc_data', 'turtledemo', 'config', 'ensurepip',
}  # fmt: skip


def _sources() -> Iterator[tuple[str, str]]:
  """(module path, source) of the standard library's Python files, sorted."""
  root = sysconfig.get_path('stdlib')
  for folder, folders, names in os.walk(root):
    folders[:] = sorted(f for f in folders if f not in _SKIPPED_FOLDERS)
    for name in sorted(names):
      if name.endswith('.py'):
        path = os.path.join(folder, name)
        with tokenize.open(path) as f:
          yield os.path.relpath(path, root), f.read()


def _docstrings(source: str) -> str:
  """All docstrings of a module, in order."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
      text = ast.get_docstring(node)
      if text:
        found.append(text)
  return '\n\n'.join(found)


def documents() -> dict[str, dict[str, str]]:
  """{'prose' | 'code': {name: text}} of this interpreter."""
  import pydoc_data.topics

  prose = {f'topic/{name}': text for name, text in pydoc_data.topics.topics.items()}
  code = {}
  for name, source in _sources():
    code[name] = source
    prose[f'docstrings/{name}'] = _docstrings(source)
  return {
    corpus: {n: t for n, t in texts.items() if len(t) >= _LEAST_CHARACTERS}
    for corpus, texts in (('prose', prose), ('code', code))
  }


def _order(name: str) -> int:
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], 'little')


def _write_jsonl(path: str, texts: dict[str, str]) -> None:
  with open(path, 'w', encoding='utf-8') as f:
    for name, text in texts.items():
      f.write(json.dumps({'text': text, 'name': name}, ensure_ascii=False) + '\n')


def _write_corpus(folder: str, corpus: str, texts: dict[str, str]) -> list[str]:
  """Writes a corpus's files and returns its training texts."""
  names = sorted(texts, key=_order)
  held_out = [n for n in names if _order(n) % _HELD_OUT_EVERY == 0]
  train = [n for n in names if _order(n) % _HELD_OUT_EVERY]
  for index in range(TRAIN_FILES):
    path = os.path.join(folder, f'{corpus}-train-{index:05d}-of-{TRAIN_FILES:05d}.jsonl')
    _write_jsonl(path, {n: texts[n] for n in train[index::TRAIN_FILES]})
  _write_jsonl(os.path.join(folder, f'{corpus}-validation.jsonl'), {n: texts[n] for n in held_out})
  return [texts[n] for n in train]


def is_complete(directory: str) -> bool:
  """Whether prepare() has finished there."""
  path = os.path.join(directory, 'manifest.json')
  if not os.path.exists(path):
    return False
  manifest = files.read_json(path)
  return isinstance(manifest, dict) and manifest.get('format') == _FORMAT


def prepare(directory: str) -> dict[str, object]:
  """Builds corpora and vocabulary in `directory`, all or nothing; a no-op when complete.

  Args:
    directory: a local folder, made if need be.

  Returns:
    The manifest.

  Raises:
    ConfigError: if the folder holds something else.
  """
  directory = os.path.abspath(directory)
  manifest_path = os.path.join(directory, 'manifest.json')
  if is_complete(directory):
    return files.read_json(manifest_path)
  if os.path.isdir(directory) and os.listdir(directory):
    raise ConfigError(
      f'{directory} holds files but no complete demo data; remove it or choose another folder.'
    )
  os.makedirs(os.path.dirname(directory), exist_ok=True)
  building = f'{directory}.tmp{os.getpid()}'
  os.mkdir(building)
  try:
    manifest = _build(building)
    if os.path.isdir(directory):
      os.rmdir(directory)
    os.rename(building, directory)
  finally:
    shutil.rmtree(building, ignore_errors=True)
  return manifest


def _build(folder: str) -> dict[str, object]:
  found = documents()
  training = []
  for corpus in CORPORA:
    training += _write_corpus(folder, corpus, found[corpus])
  lines = [line for text in training for line in text.splitlines() if line.strip()]
  train_vocabulary(os.path.join(folder, 'vocabulary.model'), lines, PIECES)
  manifest = {
    'format': _FORMAT,
    'python': platform.python_version(),
    'documents': {c: len(found[c]) for c in CORPORA},
    'characters': {c: sum(map(len, found[c].values())) for c in CORPORA},
    'pieces': PIECES,
    'extra_ids': EXTRA_IDS,
  }
  with open(os.path.join(folder, 'manifest.json'), 'w', encoding='utf-8') as f:
    json.dump(manifest, f, indent=2)
  return manifest
