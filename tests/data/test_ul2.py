"""The objective over datasets: what every example is, its shares, and the released quirks."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import seqio
from hypothesis import given, settings
from hypothesis import strategies as st

from openmoe.config import ConfigError
from openmoe.data import concat, ul2
from openmoe.data.language_model import full_lm
from tests.data import case

LENGTHS = {'inputs': 64, 'targets': 64}
PREFIX = len(case.PREFIXES[0])
KINDS = ((3, 0.15), (8, 0.15), (3, 0.5), (8, 0.5), (64, 0.5))


def run(docs, mode='fixed', lengths=LENGTHS, seed=0, take=None, **kwargs):
  with seqio.utils.map_seed_manager(seed):
    examples = ul2.ul2_objective(case.dataset(docs), lengths, case.FEATURES, mode=mode, **kwargs)
  return list(examples.take(take).as_numpy_iterator() if take else examples.as_numpy_iterator())


def joined(docs) -> list[int]:
  return [int(t) for doc in docs if len(doc) for t in [*doc, case.EOS]]


def text_of(example) -> list[int]:
  """The chunk of the stream an example was made of."""
  inputs, targets = example['inputs'].tolist(), example['targets'].tolist()
  assert inputs[-1] == targets[-1] == case.EOS
  kind = example['objective']
  prefix = case.PREFIXES[kind]
  assert inputs[: len(prefix)] == prefix
  inputs, targets = inputs[len(prefix) : -1], targets[:-1]
  if ul2.DENOISERS[kind].mean_span is None:
    return inputs + targets
  return inputs if targets == [case.FIRST_SENTINEL] else case.rebuild(inputs, targets)


@settings(max_examples=4, deadline=None)
@given(sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=12), seed=st.integers(0, 10**6))
def test_fixed_examples_rebuild_the_whole_stream_in_order(sizes, seed):
  docs = case.documents(sizes, seed)
  text = [token for example in run(docs, seed=seed) for token in text_of(example)]
  # A last chunk of one token is the only thing left out, and that token is an EOS.
  assert text in (joined(docs), joined(docs)[:-1])


def test_fixed_examples_fit_and_know_their_documents():
  docs = case.documents([500, 2000, 90, 40000], 1)
  owner = [n for n, doc in enumerate(docs) for _ in range(len(doc) + 1)]
  at = 0
  for example in run(docs):
    assert len(example['inputs']) <= LENGTHS['inputs']
    assert len(example['targets']) <= LENGTHS['targets']
    size = len(text_of(example))
    assert example['document_ids'].tolist() == [owner[at], owner[at + size - 1]]
    at += size
  assert at >= len(owner) - 1


def test_denoiser_shares():
  """Exact in every block of the fixed mode, so equal epochs; in random order."""
  examples = run(case.documents([30000] * 2))
  kinds = [int(e['objective']) for e in examples]
  share = np.bincount(kinds, minlength=6) / len(kinds)
  np.testing.assert_allclose(share, [0.1] * 5 + [0.5], atol=0.02)
  assert len(set(map(tuple, np.array_split(kinds[:60], 6)))) == 6


@pytest.fixture(scope='module')
def reference_examples():
  return run(case.documents([900] * 2600, 3), 'reference', take=1000)


def mode_of(example) -> str:
  return bytes(int(t) - 3 for t in example['inputs'][:PREFIX]).decode()


def test_reference_shares_within_sampling_error(reference_examples):
  counts = collections.Counter(map(mode_of, reference_examples))
  for name, share in {'[NLU] ': 0.2, '[NLG] ': 0.3, '[S2S] ': 0.5}.items():
    error = (share * (1 - share) / 1000) ** 0.5
    assert abs(counts[name] / 1000 - share) < 4 * error, (name, counts)


def test_reference_chunks_have_the_released_lengths_and_no_separator(reference_examples):
  sizes = collections.defaultdict(set)
  for example in reference_examples:
    assert case.EOS not in example['inputs'] and case.EOS not in example['targets']
    if mode_of(example) == '[S2S] ':
      sizes['[S2S] '].add(len(example['inputs']) - PREFIX + len(example['targets']))
    else:
      text = case.rebuild(example['inputs'][PREFIX:], example['targets'])
      sizes[mode_of(example)].add(len(text))
  released = {k: ul2.spans.released_lengths(64, *k).raw for k in KINDS}
  whole = {'[NLU] ': set(list(released.values())[:2]), '[NLG] ': set(list(released.values())[2:])}
  whole['[S2S] '] = {63}
  for name, expected in whole.items():
    # The last chunk of a group of 128 documents is shorter.
    assert expected <= sizes[name]
    assert max(sizes[name]) == max(expected)


@pytest.mark.parametrize('length', [64, 128, 512, 1024])
def test_fixed_lengths_fill_rows(length):
  lengths = {'inputs': length, 'targets': length}
  for denoiser in ul2.DENOISERS:
    found = ul2.fixed_lengths(denoiser, lengths, PREFIX)
    total = found.inputs + found.targets
    part = 1 if total > length else 2
    assert total * part <= 2 * length
    assert total * part >= 2 * length * (1 - 12 / length)


def test_fixed_mode_loses_no_sentinel_and_reference_does():
  docs = case.documents([9000] * 4, 5)
  for example in run(docs):
    left = [t for t in example['inputs'] if case.is_sentinel(t)]
    right = [t for t in example['targets'] if case.is_sentinel(t)]
    assert left == right
  lost = 0
  for example in seqio.preprocessors.append_eos_after_trim(
    _reference(docs), sequence_length=LENGTHS, output_features=case.FEATURES
  ).as_numpy_iterator():
    left = {int(t) for t in example['inputs'] if case.is_sentinel(t)}
    right = {int(t) for t in example['targets'] if case.is_sentinel(t)}
    lost += bool(right - left)
    assert len(example['inputs']) <= 64 and len(example['targets']) <= 64
  assert lost > 20


def _reference(docs):
  with seqio.utils.map_seed_manager(0):
    return ul2.ul2_objective(case.dataset(docs), LENGTHS, case.FEATURES, mode='reference')


def test_noprefix_is_the_same_function_with_a_flag():
  for example in run(case.documents([30000]), mode_prefixes=False, take=20):
    assert example['inputs'][:PREFIX].tolist() not in case.PREFIXES


def test_more_spans_than_sentinels_is_refused():
  features = {k: seqio.Feature(seqio.ByteVocabulary(extra_ids=10)) for k in ('inputs', 'targets')}
  with pytest.raises(ConfigError, match='sentinels.*10 extra ids'):
    ul2.ul2_objective(case.dataset([]), {'inputs': 512, 'targets': 512}, features)


def test_targets_shorter_than_the_reference_needs_are_refused():
  with pytest.raises(ConfigError, match='raise targets'):
    run([], 'reference', lengths={'inputs': 64, 'targets': 32})


def test_lengths_without_room_are_refused():
  with pytest.raises(ConfigError, match='lengthen'):
    run([], lengths={'inputs': 8, 'targets': 8})


def test_unknown_mode_names_the_nearest():
  with pytest.raises(ConfigError, match="Did you mean 'reference'"):
    run([], mode='referense')


def test_language_model_keeps_every_token():
  docs = case.documents([1, 0, 700, 63, 64, 65])
  chunks = full_lm(case.dataset(docs), {'targets': 64}, case.FEATURES)
  chunks = [c['targets'] for c in chunks.as_numpy_iterator()]
  assert np.concatenate(chunks).tolist() == joined(docs)
  assert all(len(c) == 64 for c in chunks[:-1])


def test_released_language_model_overwrites_the_last_token():
  docs = case.documents([200])
  raw = full_lm(case.dataset(docs), {'targets': 64}, case.FEATURES, mode='reference')
  trimmed = seqio.preprocessors.append_eos_after_trim(
    raw, sequence_length={'targets': 64}, output_features=case.FEATURES
  )
  chunks = [c['targets'].tolist() for c in trimmed.as_numpy_iterator()]
  stream = joined(docs)
  assert chunks[0] == [*stream[:63], case.EOS] and chunks[1] == [*stream[64:127], case.EOS]
  assert chunks[3] == [*stream[192:], case.EOS]  # a false EOS after the document's own


def test_language_model_refuses_inputs():
  with pytest.raises(ConfigError, match="give {'targets': n} only"):
    full_lm(case.dataset([]), LENGTHS, case.FEATURES)


def test_long_documents_stay_whole_in_the_fixed_mode_only():
  docs = case.documents([70000])
  assert sum(len(text_of(e)) for e in run(docs)) >= 70000
  kept = concat.released_random_chunk(case.dataset(docs)).as_numpy_iterator()
  assert len(next(iter(kept))['targets']) in (65536, 70000 - 65536)
