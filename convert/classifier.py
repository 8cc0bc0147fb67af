"""Classifiers in folders: written whole or not at all, opened, and converted.

A folder of ours is a run directory with checkpoint_0, whose description tells model, vocabulary and
rows, and classifier.json beside it with the labels. The labels are part of what the checkpoint
agrees on, so weights and labels cannot be mixed up. Folders of transformers'
JetMoeForSequenceClassification are opened too, and written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from convert import sizes
from convert.core.names import classifier_table, to_hf
from convert.core.tensors import ConvertError, write_synced
from convert.formats import hf_config
from convert.formats.hf import HfForm
from convert.formats.safetensor import SafetensorsFile
from convert.load import load_classifier
from convert.open import described_tokenizer
from openmoe.checkpoint import description, safe_json
from openmoe.checkpoint.checkpointer import Checkpointer
from openmoe.checkpoint.paths import PARTIAL, Unreadable, is_remote, write_whole
from openmoe.classification.classifier import Classifier
from openmoe.classification.examples import Label, is_label
from openmoe.classification.step import abstract_classifier
from openmoe.config import ConfigError
from openmoe.inference.tokenizer import TextTokenizer
from openmoe.train_step import TrainState

FILE = 'classifier.json'
PUBLISHED = 'JetMoeForSequenceClassification'
LONGEST = 1 << 20  # tokens of a row


def check_free(out: str) -> None:
  """Raises ConfigError where a classifier cannot be written to `out`, before work is done."""
  if is_remote(out):
    raise ConfigError(f'{out} is remote; give a local folder, and copy it when it is whole.')
  if os.path.lexists(out):
    raise ConfigError(f'{out} exists already; give a new folder.')


def check_length(tokens: int) -> None:
  """Raises ConfigError where rows cannot be that long."""
  if not 2 <= tokens <= LONGEST:
    raise ConfigError(f'max_length={tokens} must be in 2..{LONGEST}; --max_length sets it.')


@contextlib.contextmanager
def _whole_or_absent(out: str) -> Iterator[epath.Path]:
  """A folder to write in, which has its name when all of it is there."""
  check_free(out)
  final = os.path.abspath(out)
  place = epath.Path(f'{final}.{os.getpid()}{PARTIAL}')
  try:
    place.mkdir(parents=True)
    yield place
    os.rename(place, final)
  except BaseException:
    shutil.rmtree(place, ignore_errors=True)
    raise


def save(classifier: Classifier, out: str) -> None:
  """Writes a folder that open_classifier() opens; it has its name when all of it is there.

  Raises:
    ConfigError: `out` exists or is remote.
    CheckpointError, OSError: it cannot be written; then nothing is left.
  """
  words = classifier.vocabulary
  kind, content, extra_ids = words.source
  record = description.vocabulary_record(kind, '', extra_ids, content, words.added)
  told = description.Description(
    classifier.config,
    vocabulary=record,
    row_length=classifier.max_length,
    start_id=classifier.start_id,
    eos_ids=(int(words.eos_id),),
  )
  facts = {'labels': list(classifier.labels)}
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), classifier.params)
  state = TrainState(jnp.zeros((), jnp.int32), params, ())
  who = description.identity(classifier.config) | {'labels': list(classifier.labels)}
  with _whole_or_absent(out) as place:
    description.keep_vocabulary(place, record, content)
    write_whole(place / FILE, json.dumps(facts, indent=1).encode())
    with contextlib.closing(Checkpointer(place, 1, who)) as writer:
      writer.save(0, state, {}, {description.KEY: told.plain()})
      writer.wait()


def open_classifier(
  path: str, *, vocabulary: str | None = None, dtype: str = 'float32'
) -> Classifier:
  """A classifier from a folder of save(), or of transformers' JetMoeForSequenceClassification.

  Args:
    vocabulary: a file or folder in place of the folder's own.
    dtype: of activations.

  Raises:
    ConfigError, ConvertError: it is no such folder.
    Unreadable, CheckpointError: it is damaged.
  """
  folder = epath.Path(path)
  if (folder / FILE).exists():
    return _open_ours(folder, vocabulary, dtype)
  if (folder / 'config.json').exists():
    return _open_published(folder, vocabulary, dtype)
  raise ConfigError(
    f'{path} is no classifier: it has neither {FILE} nor config.json. '
    '`python -m scripts.classify train` makes one.'
  )


def _open_ours(folder: epath.Path, vocabulary: str | None, dtype: str) -> Classifier:
  where = str(folder / FILE)
  facts = safe_json.read(folder / FILE)
  labels = _checked(safe_json.field(facts, 'labels', list, where), where)
  with contextlib.closing(Checkpointer(folder, 1, None, read_only=True)) as reader:
    step = reader.latest_step()
    told = None if step is None else reader.describe(step)
    if told is None:
      raise Unreadable(f'{folder} has no whole checkpoint beside {FILE}; copy the folder again.')
    kept = reader.identity(step).get('labels')
    if kept != list(labels):
      raise Unreadable(
        f'{where}: labels are {list(labels)}, but the weights are of {kept}; copy the folder again.'
      )
    length = told.row_length or 0
    if not 2 <= length <= LONGEST:
      raise Unreadable(f'{folder}: row_length {length} must be in 2..{LONGEST}.')
    shapes, _ = abstract_classifier(told.model, len(labels))
    params = reader.restore_params(step, shapes)
  words = described_tokenizer(folder, told, vocabulary)
  config = dataclasses.replace(told.model, dtype=dtype)
  return Classifier(config, params, labels, words, told.start_id, length)


def _checked(labels: list[Any], where: str) -> tuple[Label, ...]:
  kinds = {type(label) for label in labels}
  if len(labels) < 2 or len(kinds) > 1 or not all(map(is_label, labels)):
    raise Unreadable(f'{where}: labels must be two or more texts, or two or more whole numbers.')
  if len(set(labels)) < len(labels):
    raise Unreadable(f'{where}: a label is there more than once.')
  return tuple(labels)


# --- transformers


def _open_published(folder: epath.Path, vocabulary: str | None, dtype: str) -> Classifier:
  form = HfForm(folder)
  facts, where = form.config, f'{folder}/config.json'
  kinds = safe_json.field(facts, 'architectures', list, where, default=[])
  if PUBLISHED not in kinds:
    raise ConfigError(
      f'{folder} is a model of {kinds}, no {PUBLISHED}: train a head on it, '
      '`python -m scripts.classify train`.'
    )
  head = form.tensors().get('score.weight')
  if head is None or len(head.shape) != 2:
    raise ConvertError(f'{folder} has no matrix score.weight, the head; copy it again.')
  labels = _published_labels(facts, head.shape[0], where)
  config = dataclasses.replace(sizes.of_form(form, None), dtype=dtype)
  params = load_classifier(form, config, len(labels), np.dtype(np.float32))
  told = form.describe(config)
  length = told.row_length or 4096
  if not 2 <= length <= LONGEST:
    raise Unreadable(f'{where}: max_position_embeddings={length} must be in 2..{LONGEST}.')
  words = TextTokenizer.open(vocabulary or str(folder), told.eos_ids[0])
  return Classifier(config, jax.tree.map(jnp.asarray, params), labels, words, told.start_id, length)


def _published_labels(facts: Mapping[str, Any], count: int, where: str) -> tuple[Label, ...]:
  """The texts of id2label; numbers where they are transformers' own LABEL_0, LABEL_1, ..."""
  unnamed = {str(i): f'LABEL_{i}' for i in range(count)}
  names = safe_json.field(facts, 'id2label', dict, where, default=unnamed)
  if set(names) != set(unnamed):
    raise Unreadable(
      f'{where}: id2label names {sorted(names)[:8]}; the head has the classes 0..{count - 1}.'
    )
  if names == unnamed:
    return tuple(range(count))
  return _checked([names[key] for key in unnamed], f'{where} (id2label)')


def convert(source: str, out: str) -> str:
  """Makes transformers' folder of ours, or ours of transformers'; every tensor is read back.

  The whole classifier is in memory, twice while it is compared.

  Returns:
    A line that says what was made.

  Raises:
    NamesError: transformers has no classifier of this architecture.
    ConfigError, ConvertError: `source` is no classifier, or what was written reads back otherwise.
  """
  classifier = open_classifier(source)
  ours = (epath.Path(source) / FILE).exists()
  if ours:
    _export(classifier, out)
  else:
    save(classifier, out)
  made = open_classifier(out)
  if made.labels != classifier.labels:
    raise ConvertError(f'{out}: labels read back as {made.labels}, not {classifier.labels}.')
  before, after = (flax.traverse_util.flatten_dict(c.params, sep='/') for c in (classifier, made))
  for name, value in before.items():
    if not np.array_equal(value, after[name], equal_nan=True):
      raise ConvertError(f'{out}: {name} reads back other than it was written; remove {out}.')
  kind = PUBLISHED if ours else 'a classifier of scripts.classify'
  return f'{out}: {kind}, {len(made.labels)} labels, {len(before)} arrays read back'


def _export(classifier: Classifier, out: str) -> None:
  """Writes a folder of transformers' JetMoeForSequenceClassification."""
  flat = flax.traverse_util.flatten_dict(classifier.params, sep='/')
  rows = list(classifier_table(classifier.config))
  tensors = to_hf(rows, {name: np.asarray(value) for name, value in flat.items()})
  words, labels = classifier.vocabulary, classifier.labels
  if words.source.extra_ids or words.added:
    raise ConvertError(f'{out}: the vocabulary has tokens beside its file, which no file holds.')
  told = description.Description(
    classifier.config,
    start_id=classifier.start_id,
    eos_ids=(int(words.eos_id),),
    row_length=classifier.max_length,
  )
  # Numbers 0, 1, ... are transformers' own names, LABEL_0 and so on.
  numbered = labels == tuple(range(len(labels)))
  if not numbered and not all(isinstance(label, str) for label in labels):
    raise ConvertError(
      f'{out}: labels {list(labels)[:8]} are numbers other than 0, 1, ..., which id2label cannot '
      'tell from texts; train with texts.'
    )
  names = {str(i): f'LABEL_{i}' if numbered else label for i, label in enumerate(labels)}
  facts = hf_config.to_hf(told, 'float32', None) | {
    'architectures': [PUBLISHED],
    'id2label': names,
    'label2id': {name: int(i) for i, name in names.items()},
  }
  with _whole_or_absent(out) as place:
    layout = [(name, value.shape, value.dtype) for name, value in tensors.items()]
    file = SafetensorsFile(place / 'model.safetensors', layout)
    for name, value in tensors.items():
      target = file.writable(name)
      target.write(0, np.ascontiguousarray(value))
      target.sync()
    write_synced(place / 'config.json', (json.dumps(facts, indent=2) + '\n').encode())
    name = 'tokenizer.json' if words.source.kind == 'tokenizer.json' else 'tokenizer.model'
    write_synced(place / name, words.source.content)
