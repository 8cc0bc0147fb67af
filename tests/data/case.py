"""Small corpora, byte vocabularies and tasks for the data tests."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import seqio
import tensorflow as tf

from openmoe.data.sources import TextFiles
from openmoe.data.ul2 import DENOISERS
from tasks import chains

# 3 specials, 256 bytes, 300 sentinels: every character is a token and every prefix 6 tokens.
VOCABULARY = seqio.ByteVocabulary(extra_ids=300)
FIRST_SENTINEL = VOCABULARY.vocab_size - 1
LAST_TEXT_ID = 258
EOS = 1
FEATURES = chains.output_features(VOCABULARY)
PREFIXES = [list(VOCABULARY.encode(d.prefix)) for d in DENOISERS]


def documents(sizes, seed=0) -> list[np.ndarray]:
  """Documents of random text tokens."""
  rng = np.random.default_rng(seed)
  return [rng.integers(3, LAST_TEXT_ID + 1, size).astype(np.int32) for size in sizes]


def dataset(docs) -> tf.data.Dataset:
  """The tokenised documents, numbered."""

  def generate():
    for number, doc in enumerate(docs):
      yield {'targets': doc, 'document_id': number}

  return tf.data.Dataset.from_generator(
    generate,
    output_signature={
      'targets': tf.TensorSpec([None], tf.int32),
      'document_id': tf.TensorSpec([], tf.int64),
    },
  )


def is_sentinel(token: int) -> bool:
  return token > LAST_TEXT_ID


def rebuild(inputs, targets) -> list[int]:
  """The text of a span corruption: targets' spans put in place of the inputs' sentinels."""
  spans: dict[int, list[int]] = {}
  current: list[int] = []
  for token in targets:
    if is_sentinel(token):
      current = spans.setdefault(int(token), [])
    else:
      current.append(int(token))
  text = []
  for token in inputs:
    text.extend(spans.pop(int(token)) if is_sentinel(token) else [int(token)])
  assert not spans, f'sentinels {sorted(spans)} stand in targets only'
  return text


def write_jsonl(path: pathlib.Path, texts) -> str:
  path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts), encoding='utf-8')
  return str(path)


def words(count: int, seed: int) -> str:
  """Random lower-case words, `count` of them."""
  rng = np.random.default_rng(seed)
  return ' '.join(''.join(rng.choice(list('abcdefghij'), 4)) for _ in range(count))


def write_corpus(folder: pathlib.Path, name: str, files: int = 3, documents: int = 20) -> None:
  """Files of random words, name-0.jsonl and so on."""
  for number in range(files):
    texts = [words(60 + 7 * i, seed=1000 * number + i) for i in range(documents)]
    write_jsonl(folder / f'{name}-{number}.jsonl', texts)


def add_corpus(folder: pathlib.Path, name: str) -> list[str]:
  """Registers the tasks over what write_corpus wrote; returns their names."""
  source = TextFiles({'train': str(folder / f'{name}-*.jsonl')}, held_out_every=10)
  return chains.add_corpus(name, source, VOCABULARY)


def make_corpus(folder: pathlib.Path, name: str) -> list[str]:
  """A registered corpus of random words; returns its task names."""
  write_corpus(folder, name)
  return add_corpus(folder, name)
