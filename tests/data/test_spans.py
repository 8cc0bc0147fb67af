"""Lengths and masks of span corruption, against the published tables and a naive reading."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from openmoe.data import spans
from tests.data import case

# The released pipeline's lengths: (raw, inputs, targets returned, spans) by (mean span, density).
RELEASED = {
  512: [(568, 512, 114, 28), (588, 512, 100, 11), (766, 512, 512, 128), (908, 512, 512, 57),
        (1006, 512, 512, 8)],
  1024: [(1137, 1024, 229, 57), (1178, 1024, 200, 22), (1534, 1024, 1024, 256),
         (1818, 1024, 1024, 114), (2014, 1024, 1024, 16)],
  2048: [(2274, 2048, 456, 114), (2357, 2048, 399, 44), (3070, 2048, 2048, 512),
         (3638, 2047, 2048, 227), (4030, 2047, 2048, 31)],
}  # fmt: skip
KINDS = [(3, 0.15), (8, 0.15), (3, 0.5), (8, 0.5), (64, 0.5)]


@pytest.mark.parametrize('length', RELEASED)
def test_released_lengths_equal_the_published_table(length):
  found = [spans.released_lengths(length, *kind) for kind in KINDS]
  assert [(f.raw, f.inputs, f.targets, f.spans) for f in found] == RELEASED[length]


def naive_counts(length: int, mean_span: float, density: float) -> tuple[int, int]:
  size = max(length, 2)
  noise = min(max(int(np.round(np.float32(size) * np.float32(density))), 1), size - 1)
  return noise, max(int(np.round(np.float32(noise) / np.float32(mean_span))), 1)


@settings(max_examples=60, deadline=None)
@given(
  kind=st.sampled_from(KINDS),
  raw=st.sampled_from([2, 7, 64, 333]),
  shares=st.lists(st.floats(0, 1), min_size=1, max_size=5),
  seed=st.integers(0, 2**31 - 1),
)
def test_masks_have_exact_counts_and_alternate(kind, raw, shares, seed):
  lengths = [max(1, round(share * raw)) for share in shares]
  seeds = ((seed, 1), (seed, 2))
  kinds = [[value] * len(lengths) for value in kind]
  noise_start, text_start = spans.noise_starts(tf.constant(lengths), raw, *kinds, seeds)
  masks = spans.noise_mask(noise_start, text_start).numpy()
  for mask, starts, length in zip(masks, noise_start.numpy(), lengths, strict=True):
    noise, count = naive_counts(length, *kind)
    if length == 1:
      assert not mask[:1].any()
      continue
    assert mask[:length].sum() == noise
    assert starts[:length].sum() == count
    assert not mask[0] and mask[length - 1]
    runs = int(mask[0]) + int((np.diff(mask[:length].astype(int)) == 1).sum())
    assert runs == count


@settings(max_examples=60, deadline=None)
@given(
  kinds=st.lists(st.sampled_from(KINDS), min_size=4, max_size=4),
  sizes=st.lists(st.integers(1, 200), min_size=4, max_size=4),
  seed=st.integers(0, 2**31 - 1),
)
def test_corrupted_spans_rebuild_the_text(kinds, sizes, seed):
  raw = max(sizes)
  docs = case.documents(sizes, seed)
  rows = np.stack([np.pad(d, (0, raw - len(d))) for d in docs])
  inputs, targets = spans.corrupt_spans(
    tf.constant(rows), tf.constant(sizes), *zip(*kinds, strict=True), ((seed, 1), (seed, 2)),
    case.FIRST_SENTINEL, prefixes=[(7, 8), (9,), (), (7, 8)], eos_id=case.EOS,
  )  # fmt: skip
  pairs = zip(inputs.to_list(), targets.to_list(), strict=True)
  for kind, doc, prefix, (left, right) in zip(
    kinds, docs, ([7, 8], [9], [], [7, 8]), pairs, strict=True
  ):
    assert left[: len(prefix)] == prefix and left[-1] == case.EOS and right[-1] == case.EOS
    left, right = left[len(prefix) : -1], right[:-1]
    if len(doc) == 1:
      assert left == doc.tolist() and right == [case.FIRST_SENTINEL]
      continue
    assert case.rebuild(left, right) == doc.tolist()
    _, count = naive_counts(len(doc), *kind)
    expected = [case.FIRST_SENTINEL - k for k in range(count)]
    assert [t for t in left if case.is_sentinel(t)] == expected
    assert [t for t in right if case.is_sentinel(t)] == expected
    assert right[0] == case.FIRST_SENTINEL and not case.is_sentinel(right[-1])


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5), seed=st.integers(0, 10**6))
def test_prefix_splits_rebuild_the_text(sizes, seed):
  raw = max(sizes)
  docs = case.documents(sizes, seed)
  rows = np.stack([np.pad(d, (0, raw - len(d))) for d in docs])
  inputs, targets = spans.split_prefix(tf.constant(rows), tf.constant(sizes), (seed, 1))
  for doc, left, right in zip(docs, inputs.to_list(), targets.to_list(), strict=True):
    assert left + right == doc.tolist()
    assert right
    assert len(left) >= 1 or len(doc) == 1


def test_prefix_split_is_uniform():
  rows = tf.tile(tf.range(3, 8)[None], [4000, 1])
  inputs, _ = spans.split_prefix(rows, tf.fill([4000], 5), (3, 4))
  counts = np.bincount(inputs.row_lengths().numpy(), minlength=6)
  assert counts[0] == counts[5] == 0
  # 4 outcomes of 1000 +- 27 (one standard deviation).
  np.testing.assert_allclose(counts[1:5], 1000, atol=4 * 27.4)


def test_span_partition_is_uniform():
  """Every split of 5 items in 3 runs is equally likely (6 of them)."""
  draws = 6000
  starts = spans._partition_starts(tf.fill([draws], 5), tf.fill([draws], 3), 5, 3, (1, 2)).numpy()
  _, counts = np.unique(starts, axis=0, return_counts=True)
  assert len(counts) == 6
  np.testing.assert_allclose(counts, 1000, atol=4 * 28.9)
