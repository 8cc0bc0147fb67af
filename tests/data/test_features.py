"""Packing and the Batch fields, against seqio's own converter and by their rules."""

from __future__ import annotations

import numpy as np
import pytest
import seqio
import tensorflow as tf

from openmoe.data import features
from openmoe.data.features import Example, Packer
from openmoe.data.statistics import unigram_entropy
from openmoe.types import Batch
from tests.data import case

LENGTHS = {'inputs': 16, 'targets': 16}


def random_examples(count: int, seed: int = 0, with_inputs: bool = True) -> list[Example]:
  rng = np.random.default_rng(seed)
  found = []
  for _ in range(count):
    size = int(rng.integers(0, 16)) if with_inputs else 0
    inputs = rng.integers(2, 100, size).astype(np.int32)
    found.append(Example(inputs, rng.integers(2, 100, int(rng.integers(1, 16))).astype(np.int32)))
  return found


def pack(examples, row_length: int, open_rows: int):
  packer = Packer(row_length, open_rows)
  rows = [row for example in examples for row in packer.add(example)]
  return rows + packer.flush()


def test_the_published_example():
  example = Example(np.array([9, 4, 6, 1], np.int32), np.array([3, 9, 1], np.int32))
  batch = features.batch_rows([(example,)], {'inputs': 4, 'targets': 4})
  assert batch.targets.tolist() == [[9, 4, 6, 1, 3, 9, 1, 0]]
  assert batch.inputs.tolist() == [[0, 9, 4, 6, 1, 3, 9, 0]]
  assert batch.loss_weights.tolist() == [[0, 0, 0, 0, 1, 1, 1, 0]]
  assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 1, 1, 1, 0]]
  assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0]]


@pytest.mark.parametrize('with_inputs', [True, False])
def test_one_open_row_is_seqios_packing(with_inputs):
  lengths = LENGTHS if with_inputs else {'targets': 32}
  # seqio packs as many examples as a row has tokens at a time, and rows do not cross.
  examples = random_examples(32, with_inputs=with_inputs)

  def generate():
    for example in examples:
      yield {'inputs': example.inputs, 'targets': example.targets}

  spec = tf.TensorSpec([None], tf.int32)
  dataset = tf.data.Dataset.from_generator(
    generate, output_signature={'inputs': spec, 'targets': spec}
  )
  if not with_inputs:
    dataset = dataset.map(lambda e: {'targets': e['targets']})
  converted = seqio.DecoderFeatureConverter(pack=True)(dataset, lengths)
  theirs = list(converted.as_numpy_iterator())
  mine = features.batch_rows(pack(examples, 32, open_rows=1), lengths)
  names = {
    'decoder_target_tokens': mine.targets,
    'decoder_input_tokens': mine.inputs,
    'decoder_loss_weights': mine.loss_weights,
    'decoder_segment_ids': mine.segment_ids,
    'decoder_positions': mine.positions,
  }
  for name, values in names.items():
    np.testing.assert_array_equal(values, np.stack([row[name] for row in theirs]), err_msg=name)


@pytest.mark.parametrize('open_rows', [0, 1, 8])
def test_every_example_is_in_exactly_one_row_that_holds_it(open_rows):
  examples = random_examples(200, seed=1)
  rows = pack(examples, 32, open_rows)
  assert sorted(id(e) for row in rows for e in row) == sorted(map(id, examples))
  assert all(sum(e.size for e in row) <= 32 for row in rows)
  if open_rows == 0:
    assert all(len(row) == 1 for row in rows)


def test_halves_and_wholes_leave_nothing_empty():
  rng = np.random.default_rng(0)
  sizes = rng.choice([16, 32], 400)
  ones = [Example(np.ones(s // 2, np.int32), np.ones(s // 2, np.int32)) for s in sizes]
  rows = pack(ones, 32, features.OPEN_ROWS)
  assert sum(sum(e.size for e in row) < 32 for row in rows) <= 1


def test_an_oversized_example_is_refused():
  with pytest.raises(ValueError, match='does not fit a row of 4'):
    Packer(4).add(Example(np.ones(3, np.int32), np.ones(2, np.int32)))


def test_examples_survive_saving():
  examples = [
    *random_examples(5),
    Example(np.zeros(0, np.int32), np.ones(1, np.int32), 's', (4, 5), 2),
  ]
  again = features.unpack_examples(features.pack_examples(examples))
  for old, new in zip(examples, again, strict=True):
    np.testing.assert_array_equal(old.inputs, new.inputs)
    np.testing.assert_array_equal(old.targets, new.targets)
    assert (old.source, old.documents, old.objective) == (new.source, new.documents, new.objective)
  assert features.unpack_examples(features.pack_examples([])) == []


def test_unigram_entropy_counts_tokens_that_carry_loss():
  targets = np.array([[5, 5, 7, 7, 9, 0]])
  weights = np.array([[0, 1, 1, 1, 1, 0]], np.float32)
  batch = Batch(targets, targets, weights, targets, targets)
  expected = -(0.25 * np.log(0.25) * 2 + 0.5 * np.log(0.5))
  assert unigram_entropy([batch, batch]) == pytest.approx(expected)
  with pytest.raises(ValueError, match='carries loss'):
    unigram_entropy([])


def test_vocabulary_has_room_for_the_shortest_prefix():
  assert max(map(len, case.PREFIXES)) == 6
