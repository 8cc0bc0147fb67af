"""Documents that are left out: all of them, no other is moved, and the list may change."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from openmoe.config import ConfigError, DataConfig
from openmoe.data import exclusion
from openmoe.data.sources import TextFiles
from openmoe.data.stream import ShardedStream
from openmoe.running.facts import facts_of
from tests.data import case
from tests.run_case import arguments

VOCABULARY = case.VOCABULARY
TEXTS = [f'<{i}> ' + f'word{i} ' * (5 + 7 * i % 23) for i in range(60)]
EXCLUDED = (7, 20, 41)


@pytest.fixture(scope='module')
def config(tmp_path_factory) -> DataConfig:
  folder = tmp_path_factory.mktemp('exclusion')
  case.write_jsonl(folder / 'texts.jsonl', TEXTS)
  source = TextFiles({'train': str(folder / 'texts.jsonl')})
  case.chains.add_corpus('excluded', source, VOCABULARY)
  return DataConfig('excluded_full_lm', {'targets': 64}, 2, num_shards=1, seed=3, num_epochs=1)


def listed(folder: pathlib.Path, *names, version=1, corpus='excluded') -> str:
  path = folder / 'list.json'
  path.write_text(json.dumps({'version': version, 'exclude': {corpus: list(names)}}))
  return str(path)


def chunks(config: DataConfig, positions=None, take=None, state_after=None):
  """The tokens of all examples in their order, and the position after some batches."""
  found, state = [], None
  with ShardedStream(config, [0]) as stream:
    if positions:
      stream.restore(positions)
    for number, _ in enumerate(stream, start=1):
      found += [bytes(np.asarray(e.targets)) for row in stream.last_rows for e in row]
      if number == state_after:
        state = stream.state()
      if number == take:
        break
  return found, state


def texts(found) -> str:
  """What the chunks say; decode() would end at the end of a document."""
  ids = [int(t) for chunk in found for t in np.frombuffer(chunk, np.int32) if t > 2]
  return VOCABULARY.decode(ids)


def test_no_token_of_them_is_trained_on_and_no_other_block_moves(config, tmp_path):
  whole, _ = chunks(config)
  path = listed(tmp_path, *(f'texts.jsonl:{i + 1}' for i in EXCLUDED))
  left, _ = chunks(dataclasses.replace(config, exclude=path))
  assert all(f'word{i} ' in texts(whole) for i in range(60))
  for i in EXCLUDED:
    assert f'word{i} ' not in texts(left)
  gone = [
    c for c in whole if any(f'word{i} ' in texts([c]) or f'<{i}>' in texts([c]) for i in EXCLUDED)
  ]
  kept = [c for c in whole if c not in gone]
  assert set(left) <= set(kept)
  # Only the chunks that a listed document touches, its end included, are missing.
  assert len(kept) - len(left) <= len(EXCLUDED)
  order = [whole.index(c) for c in left]
  assert len(order) > 20
  assert sorted(order) == order


def test_numbers_name_documents_too(config, tmp_path):
  names, _ = chunks(dataclasses.replace(config, exclude=listed(tmp_path, 'texts.jsonl:8')))
  numbers, _ = chunks(dataclasses.replace(config, exclude=listed(tmp_path, 7)))
  assert names == numbers
  assert len(names) < len(chunks(config)[0])


def test_ul2_leaves_them_out(config, tmp_path):
  ul2 = dataclasses.replace(
    config, mixture_or_task_name='excluded_ul2', task_feature_lengths={'inputs': 64, 'targets': 64}
  )
  ul2 = dataclasses.replace(ul2, mixture_or_task_name='excluded_ul2', shuffle=False)
  whole, _ = chunks(ul2)
  left, _ = chunks(dataclasses.replace(ul2, exclude=listed(tmp_path, 7)))
  assert 0 < len(left) < len(whole), (len(left), len(whole))
  assert set(left) <= set(whole)  # the same noise in all others


def test_a_run_goes_on_with_a_longer_list(config, tmp_path):
  # Without a shuffle buffer, and in rows of several chunks, little is read ahead.
  endless = dataclasses.replace(config, num_epochs=None, shuffle=False)
  _, state = chunks(endless, state_after=2, take=2)
  path = listed(tmp_path, *EXCLUDED, version=2)
  longer = dataclasses.replace(endless, exclude=path)
  left, _ = chunks(longer, positions=state, take=110)
  later = texts(left[-100:])  # what was read ahead is past, more than one pass follows
  assert 'word8 ' in later
  for i in EXCLUDED:
    assert f'word{i} ' not in later
  again, _ = chunks(endless, positions=chunks(longer, state_after=2, take=3)[1], take=5)
  assert again


def test_a_checkpoint_and_the_roll_call_know_the_list(config, tmp_path):
  path = listed(tmp_path, 1, 2, version=5)
  found = exclusion.load(path)
  assert found.plain() == {'version': 5, 'digest': found.digest, 'documents': 2}
  given = arguments(tmp_path, None) | {'sources': (), 'eval_data': None}
  given['data'] = dataclasses.replace(config, exclude=path)
  before = facts_of(given)['excluded documents of train']
  assert before == found.digest
  listed(tmp_path, 1, 2, 3, version=6)
  assert facts_of(given)['excluded documents of train'] != before


WRONG = [
  ('{', 'cannot be read'),
  ('{"version": 1}', 'exclude'),
  ('{"version": 1, "exclude": {"excluded": 5}}', 'must be a list'),
  ('{"version": 1, "exclude": {"excluded": ["texts.jsonl:0"]}}', 'FILE:RECORD'),
  ('{"version": 1, "exclude": {"excluded": ["other.jsonl:1"]}}', 'names 0 documents'),
  ('{"version": 1, "exclude": {"unknown": [1]}}', 'Documents of unknown are to be excluded'),
  ('{"version": 1, "exclude": {"unknown": ["a:1"]}}', 'of no text file'),
]


@pytest.mark.parametrize(('content', 'message'), WRONG)
def test_a_wrong_list_is_refused(config, tmp_path, content, message):
  path = tmp_path / 'list.json'
  path.write_text(content)
  with pytest.raises(ConfigError, match=message):
    ShardedStream(dataclasses.replace(config, exclude=str(path)), [0])


def test_a_missing_list_and_tasks_that_know_no_documents_are_refused(config, tmp_path):
  missing = dataclasses.replace(config, exclude=str(tmp_path / 'no.json'))
  with pytest.raises(ConfigError, match='No such file'):
    ShardedStream(missing, [0])
  reference = dataclasses.replace(
    config, mixture_or_task_name='excluded_full_lm_reference', exclude=listed(tmp_path, 1)
  )
  with pytest.raises(ConfigError, match='the reference tasks do not'):
    ShardedStream(reference, [0])
