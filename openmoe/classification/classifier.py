"""A classifier of texts: parameters on a device, a vocabulary, its labels; and its scores."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from openmoe.classification.examples import Label
from openmoe.config import ConfigError, ModelConfig
from openmoe.inference.decode import bucket, inference_config
from openmoe.inference.model import TextVocabulary
from openmoe.models.classifier import SequenceClassifier
from openmoe.types import Batch, PyTree


@dataclasses.dataclass(frozen=True)
class Classifier:
  """Classifies texts; nothing is dropped, so texts of one batch do not depend on each other.

  Attributes:
    config: of the backbone.
    params: as of models.classifier, float32.
    labels: one a class.
    vocabulary: of texts.
    start_id: token that begins every row.
    max_length: tokens of a row; what is beyond is cut off.
  """

  config: ModelConfig
  params: PyTree
  labels: tuple[Label, ...]
  vocabulary: TextVocabulary
  start_id: int
  max_length: int

  @functools.cached_property
  def model(self) -> SequenceClassifier:
    return SequenceClassifier(inference_config(self.config), len(self.labels))

  def encode(self, text: str) -> list[int]:
    """The tokens of a row.

    Raises:
      ConfigError: the vocabulary has a token that the model has not.
    """
    row = [self.start_id, *map(int, self.vocabulary.encode(text))][: self.max_length]
    if max(row) >= self.config.vocab_size:
      raise ConfigError(
        f'The vocabulary gives token {max(row)}, but {self.config.name} has '
        f'{self.config.vocab_size}; give the vocabulary of the model.'
      )
    return row

  @functools.cached_property
  def _run(self):
    return jax.jit(lambda params, batch: self.model.apply({'params': params}, batch, False))

  def logits(self, texts: Sequence[str], batch_rows: int = 16) -> np.ndarray:
    """float32 [texts, classes].

    Raises:
      ConfigError: batch_rows is less than 1, a token is not the model's, or the model gives no
        numbers, of which the first class would always be the largest.
    """
    if batch_rows < 1:
      raise ConfigError(f'batch_size={batch_rows} must be at least 1; --batch_size sets it.')
    rows = [self.encode(text) for text in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    logits = np.zeros((len(rows), len(self.labels)), np.float32)
    for start in range(0, len(rows), batch_rows):
      chosen = order[start : start + batch_rows]
      batch = make_batch([rows[i] for i in chosen], batch_rows, self.max_length)
      logits[chosen] = self._run(self.params, batch).logits_bY[: len(chosen)]
    if not np.isfinite(logits).all():
      wrong = int(np.argmin(np.isfinite(logits).all(axis=1)))
      raise ConfigError(
        f'{self.config.name} gives text {wrong + 1} logits that are not finite: its weights are '
        'not those of a model that works; train it again, or copy it again.'
      )
    return logits

  def probabilities(self, texts: Sequence[str], batch_rows: int = 16) -> np.ndarray:
    """float64 [texts, classes]; every row sums to 1."""
    logits = self.logits(texts, batch_rows).astype(np.float64)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def make_batch(rows: Sequence[Sequence[int]], count: int, max_length: int) -> Batch:
  """A batch of `count` rows, the last ones empty, in one of few lengths."""
  length = bucket(max(map(len, rows)), max_length)
  inputs = np.zeros((count, length), np.int32)
  segments = np.zeros_like(inputs)
  for place, row in enumerate(rows):
    inputs[place, : len(row)], segments[place, : len(row)] = row, 1
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), inputs.shape)
  # Targets only say which positions are real.
  return Batch(*map(jnp.asarray, (inputs, segments, segments * 1.0, segments, positions)))


@dataclasses.dataclass(frozen=True)
class Scores:
  """Attributes:
  accuracy: share of records whose likeliest class is theirs.
  macro_f1: mean F1 of the classes that are there or were guessed.
  """

  accuracy: float
  macro_f1: float


def score(classes: Sequence[int], guesses: Sequence[int]) -> Scores:
  """Compares guessed classes with those of the records.

  >>> score([0, 0, 1, 1], [0, 1, 1, 1])
  Scores(accuracy=0.75, macro_f1=0.7333333333333334)
  """
  true, guessed = np.asarray(classes), np.asarray(guesses)
  found = []
  for name in np.union1d(true, guessed):
    both = np.sum((true == name) & (guessed == name))
    found.append(2 * both / (np.sum(true == name) + np.sum(guessed == name)))
  return Scores(float(np.mean(true == guessed)), float(np.mean(found)))
