"""Figures of batches that need no model."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from openmoe.types import Batch


def unigram_entropy(batches: Iterable[Batch]) -> float:
  """Entropy, in nats, of the target tokens that carry loss.

  The cross-entropy of the best model that ignores the context: what a trained one must beat.

  Raises:
    ValueError: if no token carries loss.
  """
  counts = np.zeros(0, np.int64)
  for batch in batches:
    tokens = np.asarray(batch.targets)[np.asarray(batch.loss_weights) > 0]
    found = np.bincount(tokens, minlength=len(counts)).astype(np.int64)
    found[: len(counts)] += counts
    counts = found
  if not counts.sum():
    raise ValueError('No token of the batches carries loss.')
  shares = counts[counts > 0] / counts.sum()
  return float(-np.sum(shares * np.log(shares)))
