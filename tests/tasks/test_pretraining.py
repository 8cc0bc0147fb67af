"""The published tables, and what happens when something of them is missing."""

from __future__ import annotations

import copy

import pytest
import seqio

from openmoe.config import ConfigError, DataConfig
from openmoe.data.shard import rates
from openmoe.data.stream import ShardedStream
from tasks import locations, pretraining, sft

# mixture: sum of rates, share of code (GitHub and The Stack), objective
PUBLISHED = {
  'mix_ul2': (200, 52.25, 'ul2'),
  'mix_full_lm': (200, 52.25, 'full_lm'),
  'mix_ul2_noprefix': (200, 52.25, 'ul2_noprefix'),
  'mix_lesscode_ul2': (100, 4.5, 'ul2'),
  'mix_ul2_stage2': (100, 15, 'ul2'),
  'mix_full_lm_stage2': (100, 15, 'full_lm'),
  'mix_ul2_v2': (100, 35, 'ul2'),
  'mix_full_lm_v2': (100, 35, 'full_lm'),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_rates_as_published(name):
  total, code, objective = PUBLISHED[name]
  found = rates(seqio.get_mixture_or_task(name))
  assert sum(found.values()) == total
  coded = sum(r for task, r in found.items() if 'github' in task or 'stack_dedup' in task)
  assert 100 * coded / total == pytest.approx(code)
  assert all(task.endswith(f'_{objective}') for task in found)


def test_nine_corpora_have_their_tasks():
  assert len(pretraining.CORPORA) == 9
  for corpus in pretraining.CORPORA:
    for objective in ('ul2', 'ul2_noprefix', 'full_lm'):
      for suffix in ('', '_reference'):
        assert f'{corpus}_{objective}{suffix}' in seqio.TaskRegistry.names()
  for mixture in pretraining.MIXTURES:
    assert f'{mixture}_reference' in seqio.MixtureRegistry.names()


def test_the_released_noprefix_mixture_has_prefixes():
  found = rates(seqio.get_mixture_or_task('mix_ul2_noprefix_reference'))
  assert all(task.endswith('_ul2_reference') for task in found)


def test_missing_data_and_vocabulary_are_named(tmp_path, monkeypatch):
  config = DataConfig('redpajama_book_full_lm', {'targets': 8}, 1, num_shards=1)
  monkeypatch.delenv('OPENMOE_VOCABULARY', raising=False)
  with pytest.raises(ConfigError, match='OPENMOE_VOCABULARY.*umt5-small'):
    ShardedStream(config, [0])
  monkeypatch.setenv('OPENMOE_VOCABULARY', str(tmp_path / 'none.model'))
  with pytest.raises(ConfigError, match='no SentencePiece model at'):
    ShardedStream(config, [0])


def test_a_missing_data_set_is_named(tmp_path):
  # A copy: seqio's loaders remember the directory they were first used with.
  source = copy.deepcopy(seqio.TaskRegistry.get('redpajama_book_full_lm').source)
  seqio.set_tfds_data_dir_override(str(tmp_path))
  try:
    with pytest.raises(
      ConfigError, match=f'no TFDS data set redpajama_book:1.0.0 in {tmp_path}.*no '
    ):
      source.get_dataset('train')
  finally:
    seqio.set_tfds_data_dir_override(None)


def test_rates_renormalise_only_when_asked():
  name = pretraining.Without('mix_ul2_v2', ('redpajama_book',)).register()
  assert name == 'mix_ul2_v2_without_redpajama_book'
  found = rates(seqio.get_mixture_or_task(name))
  assert sum(found.values()) == 95.5 and len(found) == 8
  with pytest.raises(ConfigError, match='must be some, not all'):
    pretraining.Without('mix_ul2', ('wikipedia',)).register()
  with pytest.raises(ConfigError, match='is not one of'):
    pretraining.Without('mix', ('wikipedia',)).register()


def test_jetmoe_phases_sum_to_100_and_need_every_source():
  assert sum(pretraining.JETMOE_PHASE_1.values()) == 100
  assert sum(pretraining.JETMOE_PHASE_2.values()) == 100
  tasks = dict.fromkeys(pretraining.JETMOE_PHASE_1, 'redpajama_c4_full_lm')
  assert pretraining.JetMoEPhase(1, tasks).register() == 'jetmoe_phase1'
  with pytest.raises(ConfigError, match=r"no task for \['code_sft'"):
    pretraining.JetMoEPhase(2, tasks).register()
  with pytest.raises(ConfigError, match="'nothing', which is not registered"):
    pretraining.JetMoEPhase(1, dict.fromkeys(tasks, 'nothing')).register()


def test_a_source_of_rate_zero_is_left_out():
  mixture = pretraining.MappedMixture(
    'half', {'a': 1, 'b': 0}, {'a': 'redpajama_c4_full_lm'}
  ).register()
  assert list(rates(seqio.get_mixture_or_task(mixture))) == ['redpajama_c4_full_lm']


def test_locations_come_from_gin_too(monkeypatch):
  monkeypatch.setenv('OPENMOE_VOCABULARY', 'old')
  locations.Locations(vocabulary='new').register()
  assert locations.vocabulary_path() == 'new'


def test_fine_tuning_holds_validation_out_and_reference_does_not():
  for name in sft._TASKS:
    mine = seqio.TaskRegistry.get(name).source._split_map
    assert mine['train'].endswith(mine['validation'][6:-2] + ']')
    assert seqio.TaskRegistry.get(f'{name}_reference').source._split_map['train'] == 'train'
