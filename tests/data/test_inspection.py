"""What the inspector prints of a row."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from openmoe.config import ConfigError, DataConfig
from openmoe.data import inspection
from openmoe.data.features import Example
from openmoe.data.stages import StagedStream
from openmoe.data.stream import ShardedStream
from openmoe.programme import Programme, Stage
from tests.data import case


def text_ids(text: str, *more: int) -> np.ndarray:
  return np.array([*case.VOCABULARY.encode(text), *more], np.int32)


def test_tokens_show_sentinels_eos_and_newlines():
  shown = inspection.show_tokens(
    text_ids('a\nb', case.FIRST_SENTINEL, case.EOS), case.VOCABULARY, loss=True, color=False
  )
  assert shown == 'a\\nb<0><eos>'
  colored = inspection.show_tokens(text_ids('a'), case.VOCABULARY, loss=True, color=True)
  assert colored == '\033[32ma\033[0m'


def test_what_a_terminal_would_obey_is_written_out():
  shown = inspection.show_tokens(text_ids('a\x1b]52;c;x\x07\r'), case.VOCABULARY, True, color=False)
  assert shown == 'a\\x1b]52;c;x\\x07\\r'


def test_objectives_have_names():
  tokens = text_ids('a')
  name = inspection.objective_name
  assert name(Example(tokens, tokens, objective=2)) == '[NLG] spans of 3, 50%'
  assert name(Example(tokens, tokens, objective=5)) == '[S2S] prefix LM'
  assert name(Example(tokens[:0], tokens)) == 'next token'
  assert name(Example(tokens, tokens)) == 'inputs to targets'


def test_a_row_tells_where_its_segments_come_from(tmp_path):
  case.make_corpus(tmp_path, 'inspected')
  config = DataConfig('inspected_ul2', {'inputs': 64, 'targets': 64}, 2, num_shards=1)
  row = (Example(text_ids('in'), text_ids('out', 1), 'inspected', (2**32 + 4, 2**32 + 4), 0),)
  shown = inspection.show_row(row, case.VOCABULARY, color=False, config=config)
  assert (
    f'inspected | {tmp_path}/inspected-1.jsonl:5 | [NLU] spans of 3, 15% | 2 + 4 tokens' in shown
  )
  assert 'context: in' in shown and 'loss: out<eos>' in shown


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory) -> pathlib.Path:
  """The data positions of a run after steps 2 and 5 of 6, the fourth of which begins a stage."""
  folder = tmp_path_factory.mktemp('run')
  case.make_corpus(folder, 'seek')
  first = DataConfig('seek_full_lm', {'targets': 96}, 2, num_shards=2)
  second = DataConfig('seek_ul2', {'inputs': 64, 'targets': 64}, 4, num_shards=2, seed=3)
  programme = Programme((Stage('a', 3 * 2 * 96, first), Stage('b', 3 * 4 * 128, second)))
  with StagedStream(programme, lambda data: range(data.num_shards)) as stream:
    for step in range(1, 7):
      batch = next(stream)
      data = folder / f'checkpoint_{step}' / 'data'
      if step in (2, 3, 5):
        data.mkdir(parents=True)
        for name, position in stream.state().items():
          (data / f'{name}.position').write_bytes(position)
  np.save(folder / 'last.npy', batch.targets)
  return folder


def test_a_late_step_is_found_from_the_nearest_checkpoint(run_dir):
  found = inspection.position_of_run(str(run_dir), 5)
  config = found.data
  assert (found.step, config.mixture_or_task_name, config.batch_size, config.seed) == (
    5,
    'seek_ul2',
    4,
    3,
  )
  with ShardedStream(config, range(config.num_shards)) as stream:
    stream.restore(found.positions)
    np.testing.assert_array_equal(next(stream).targets, np.load(run_dir / 'last.npy'))
  assert inspection.position_of_run(str(run_dir), 2).step == 2


def test_steps_that_no_checkpoint_leads_to_are_refused(run_dir, tmp_path):
  with pytest.raises(ConfigError, match="at the end of stage 'a', after step 3"):
    inspection.position_of_run(str(run_dir), 4)
  with pytest.raises(ConfigError, match='before the oldest checkpoint that .* keeps, 2'):
    inspection.position_of_run(str(run_dir), 1)
  with pytest.raises(ConfigError, match='holds no checkpoint_STEP'):
    inspection.position_of_run(str(tmp_path / 'none'), 1)
