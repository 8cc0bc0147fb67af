"""Where a document was trained on, and which documents of a step a model finds hardest."""

import dataclasses
import pathlib
import types

import numpy as np
import pytest

from openmoe.config import ConfigError, DataConfig
from openmoe.data import inspection, occurrences
from openmoe.data.sources import TextFiles
from openmoe.data.stages import StagedStream, saved
from openmoe.data.stream import ShardedStream
from openmoe.programme import Programme, Stage
from tests.data import case

TEXTS = [f'word{i} ' * (5 + 7 * i % 23) for i in range(40)]
WANTED = 13


@pytest.fixture(scope='module')
def config(tmp_path_factory) -> DataConfig:
  folder = tmp_path_factory.mktemp('occurrences')
  case.write_jsonl(folder / 'texts.jsonl', TEXTS)
  source = TextFiles({'train': str(folder / 'texts.jsonl')})
  case.chains.add_corpus('found', source, case.VOCABULARY)
  return DataConfig('found_full_lm', {'targets': 64}, 4, num_shards=1, seed=3)


def write_positions(checkpoint: pathlib.Path, state: dict[str, bytes]) -> None:
  (checkpoint / 'data').mkdir(parents=True)
  for name, position in state.items():
    (checkpoint / 'data' / f'{name}.position').write_bytes(position)


def text_of(example) -> str:
  ids = [int(t) for t in [*example.inputs, *example.targets]]
  return case.VOCABULARY.decode([i for i in ids if 2 < i <= case.LAST_TEXT_ID])


def by_reading(config: DataConfig, steps: int, first: int = 0) -> list[tuple[int, int, int]]:
  """Places whose text has a token of the document, from the text alone."""
  found = []
  with ShardedStream(config, range(config.num_shards)) as stream:
    for step in range(first, first + steps):
      next(stream)
      for number, row in enumerate(stream.last_rows):
        for segment, example in enumerate(row, start=1):
          if f'word{WANTED} ' in text_of(example):
            found.append((step, number, segment))
  return found


def places(*args, **kwargs) -> list[tuple[int, int, int]]:
  return [(p.step, p.row, p.segment) for p in occurrences.in_batches(*args, **kwargs)]


def test_every_place_of_a_document_is_found(config):
  expected = by_reading(config, 40)
  assert len({step for step, *_ in expected}) > 3  # several epochs, several chunks
  found = places(config, f'texts.jsonl:{WANTED + 1}', 40)
  # A chunk may hold no more of the document than the last letters of a word.
  assert set(expected) <= set(found)
  assert len(found) - len(expected) <= len(found) // 2
  assert places(config, str(WANTED), 40) == found


def test_chunks_with_noise_are_found_wherever_the_document_lies_in_them(config):
  ul2 = dataclasses.replace(
    config, mixture_or_task_name='found_ul2', task_feature_lengths={'inputs': 200, 'targets': 200}
  )
  expected = by_reading(ul2, 6)
  assert expected
  found = list(occurrences.in_batches(ul2, WANTED, 6))
  assert set(expected) <= {(p.step, p.row, p.segment) for p in found}
  lengths = {len(p.example.inputs) + len(p.example.targets) for p in found}
  assert max(lengths) > 2 * len(TEXTS[WANTED])  # it need not be the first or last of a chunk


def test_a_run_is_read_as_it_was_trained(config, tmp_path):
  later = dataclasses.replace(config, seed=5)
  programme = Programme((Stage('a', 6 * 4 * 64, config), Stage('b', 30 * 4 * 64, later)))
  with StagedStream(programme, lambda data: range(data.num_shards)) as stream:
    for step in range(1, 31):
      next(stream)
      if step in (6, 20, 30):
        write_positions(tmp_path / f'checkpoint_{step}', stream.state())
  first, second = occurrences.stages_of(tmp_path)
  assert (first.stage, first.first, first.step, first.ends) == ('a', 0, 6, True)
  assert (second.stage, second.first, second.step, second.ends) == ('b', 6, 30, False)
  found = places(second.data, WANTED, 24, second.first, ends_at=second)
  assert set(by_reading(later, 24, 6)) <= set(found)
  lines = list(occurrences.of_run(tmp_path, WANTED))
  assert sum(line.startswith('step ') for line in lines) >= len(found)
  assert [line for line in lines if ': in ' in line][1].endswith('of the steps 6 to 29')
  begun_elsewhere = dataclasses.replace(second, first=5)
  with pytest.raises(ConfigError, match='began elsewhere'):
    places(second.data, WANTED, 25, 5, ends_at=begun_elsewhere)


def test_a_document_that_nobody_has_is_refused(config):
  reference = dataclasses.replace(config, mixture_or_task_name='found_full_lm_reference')
  for data, name, message in (
    (config, 'other.jsonl:3', r"no document 'other.jsonl:3'; corpora .*: found\. Name it"),
    (config, 'texts.jsonl', "no document 'texts.jsonl'"),
    (reference, 3, 'the reference tasks do not'),
  ):
    with pytest.raises(ConfigError, match=message):
      places(data, name, 1)


def test_the_hardest_documents_come_first(config):
  with ShardedStream(config, range(1)) as stream:
    next(stream)
    rows = stream.last_rows
  # A model that finds every token as hard as its number.
  score = lambda requests: [
    types.SimpleNamespace(token_log_probs=tuple(-float(t) for t in targets))
    for _, targets in requests
  ]
  ranked = occurrences.ranked(types.SimpleNamespace(score=score), rows, 0)
  assert len(ranked) == sum(map(len, rows))
  for loss, place in ranked:
    assert loss == pytest.approx(np.mean(place.example.targets))
    assert rows[place.row][place.segment - 1] is place.example
  assert [loss for loss, _ in ranked] == sorted((loss for loss, _ in ranked), reverse=True)
  assert 'texts.jsonl:' in inspection.documents_of(ranked[0][1].example, config)


def test_the_hardest_documents_of_a_run_are_told(config, tmp_path):
  programme = Programme((Stage('only', 8 * 4 * 64, config),))
  with StagedStream(programme, lambda data: range(data.num_shards)) as stream:
    next(stream)
    write_positions(tmp_path / 'checkpoint_1', stream.state())
    batch = [next(stream) for _ in range(2)][1]
  loss = lambda requests: [types.SimpleNamespace(token_log_probs=[-1.0]) for _ in requests]
  opened = []
  load = lambda path: opened.append(path) or types.SimpleNamespace(score=loss)
  lines = list(occurrences.hardest(tmp_path, 2, load))
  assert opened == [str(tmp_path / 'checkpoint_1')]
  assert lines[0] == 'step 2, losses of checkpoint_1, nats a target token'
  assert len(lines) - 1 == int(batch.segment_ids.max(axis=1).sum())
  assert ' 1.0000  row 0 segment 1: found | ' in lines[1] and 'texts.jsonl:' in lines[1]


def test_a_position_says_what_comes(config):
  programme = Programme((Stage('only', 8 * 4 * 64, config),))
  with StagedStream(programme, lambda data: range(data.num_shards)) as stream:
    next(stream)
    told = saved(stream.state())
  assert (told.stage, told.step, told.first, told.ends, told.data) == ('only', 1, 0, False, config)
