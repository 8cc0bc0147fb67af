"""The bytes of a shard's saved position: an archive of its iterator, examples and a header.

A position may come from anybody: reading one executes nothing and writes to memory alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf

from openmoe.checkpoint import npz, safe_json
from openmoe.config import ConfigError
from openmoe.data.features import Example, Row

# The names that tf.train.Checkpoint gives its files. A position that somebody sent may hold others.
_ITERATOR_FILE = re.compile(r'position\.(index|data-\d{5}-of-\d{5})')
_HEADER = {'signature': dict, 'shard': int, 'row_sizes': list, 'open_sizes': list, 'ended': bool}


def read(state: bytes, name: str) -> tuple[dict[str, np.ndarray], dict]:
  """(arrays, header) of a saved position, which may come from anybody.

  Raises:
    ConfigError: it is damaged, or names files other than an iterator's.
  """
  try:
    arrays = npz.parse(state, 'it')
    header = safe_json.loads(str(arrays['header']))
  except (ValueError, KeyError) as e:
    raise ConfigError(f'The saved data position of {name} is damaged ({e}).') from e
  wrong = [
    key
    for key in arrays
    if key.startswith('file:') and not _ITERATOR_FILE.fullmatch(key.removeprefix('file:'))
  ]
  if wrong:
    raise ConfigError(
      f'The saved data position of {name} holds a file named {wrong[0][5:]!r}; only files of a '
      'TensorFlow iterator (position.index, position.data-...) belong there. Nothing was written.'
    )
  for key, kind in _HEADER.items():
    if not isinstance(header, dict) or not isinstance(header.get(key), kind):
      raise ConfigError(f'The saved data position of {name} is damaged: no {key} in its header.')
  skip = header.get('skip', 0)
  if not isinstance(skip, int) or skip < 0:
    raise ConfigError(f'The saved data position of {name} is damaged: skip is {skip!r:.40}.')
  return arrays, header


def pack(arrays: Mapping[str, np.ndarray], header: Mapping[str, object]) -> bytes:
  """The position that read() gives back as (arrays, header)."""
  out = io.BytesIO()
  text = np.array(json.dumps(header, sort_keys=True))
  np.savez_compressed(out, **{**arrays, 'header': text})
  return out.getvalue()


def take_rows(examples: Iterator[Example], sizes: Sequence[int]) -> list[Row]:
  """The next examples, as rows of these sizes."""
  return [tuple(next(examples) for _ in range(size)) for size in sizes]


@contextlib.contextmanager
def _folder_in_memory() -> Iterator[str]:
  """A folder of TensorFlow's that needs no disk: the run's own may be full, or TMPDIR."""
  folder = f'ram://openmoe-data-{uuid.uuid4().hex}'
  tf.io.gfile.makedirs(folder)
  try:
    yield folder
  finally:
    tf.io.gfile.rmtree(folder)


def save_iterator(iterator) -> dict[str, bytes]:
  """The files of tf.train.Checkpoint(iterator), by name."""
  with _folder_in_memory() as folder:
    tf.train.Checkpoint(iterator=iterator).write(f'{folder}/position')
    contents = {}
    for name in sorted(tf.io.gfile.listdir(folder)):
      with tf.io.gfile.GFile(f'{folder}/{name}', 'rb') as f:
        contents[name] = f.read()
    return contents


def load_iterator(iterator, contents: Mapping[str, bytes], name: str) -> None:
  """Puts an iterator where save_iterator() was called.

  Raises:
    ConfigError: the files are of another pipeline, or damaged.
  """
  with _folder_in_memory() as folder:
    for file, content in contents.items():
      with tf.io.gfile.GFile(f'{folder}/{file}', 'wb') as f:
        f.write(content)
    checkpoint = tf.train.Checkpoint(iterator=iterator)
    try:
      checkpoint.read(f'{folder}/position').assert_consumed()
    except (AssertionError, tf.errors.OpError, ValueError) as error:
      raise ConfigError(
        f'The saved data position of {name} does not fit this data pipeline (another version of '
        'the code or of TensorFlow made it, or it is damaged). Continue with that version, or set '
        'ALLOW_DATA_CHANGE=True to begin the data anew.'
      ) from error
