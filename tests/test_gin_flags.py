"""t5x's command line: includes, search paths, misspelt names, values that gin cannot read."""

from __future__ import annotations

import pathlib

import pytest
from absl import flags

from openmoe.config import ConfigError
from scripts import gin_flags, processes, train
from scripts.gin_flags import files, hints

ROOT = pathlib.Path(__file__).parent.parent
FILES = tuple(
  f'--gin_file=gin/{name}.gin'
  for name in ('models/openmoe_tiny', 'runs/pretrain', 'experiments/demo')
)
NAMED = (*FILES, "--gin.MODEL_DIR='x'")


def configure(*args) -> dict:
  flags.FLAGS(['train', *gin_flags.rewrite(args)])
  return train.configure()


def refused(*args) -> str:
  with pytest.raises(ConfigError) as error:
    configure(*args)
  return str(error.value)


def test_included_files_count(tmp_path):
  (tmp_path / 'all.gin').write_text(
    "\ufeffinclude 'gin/models/openmoe_tiny.gin'\ninclude 'gin/runs/pretrain.gin'\n"
    'include "gin/experiments/demo.gin"  # a comment\nMODEL_DIR = \'é\'\nTRAIN_STEPS = 31\n',
    encoding='utf-8',
  )
  found = configure(f'--gin_file={tmp_path}/all.gin', '--gin.EVAL_PERIOD=7')['run']
  assert (found.model_dir, found.total_steps, found.eval_period) == ('é', 31, 7)


def test_an_include_overrides_what_stands_above_it_and_nothing_below(tmp_path):
  (tmp_path / 'in.gin').write_text('TRAIN_STEPS = 5\nEVAL_STEPS = 6\n')
  (tmp_path / 'out.gin').write_text(
    f"TRAIN_STEPS = 1\ninclude '{tmp_path}/in.gin'\nEVAL_STEPS = 2\n"
  )
  found = configure(*NAMED, f'--gin_file={tmp_path}/out.gin')['run']
  assert (found.total_steps, found.eval_steps) == (5, 2)


def test_includes_that_are_missing_or_go_round_are_refused(tmp_path):
  (tmp_path / 'a.gin').write_text(f"include '{tmp_path}/b.gin'\n")
  (tmp_path / 'b.gin').write_text(f"\ninclude '{tmp_path}/a.gin'\n")
  assert 'includes itself' in refused(f'--gin_file={tmp_path}/a.gin')
  (tmp_path / 'b.gin').write_text("\ninclude 'gin/models/openmoe_tni.gin'\n")
  said = refused(f'--gin_file={tmp_path}/a.gin')
  assert 'b.gin line 2' in said and 'gin/models/openmoe_tiny.gin' in said


def test_search_paths_come_first(tmp_path):
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs' / 'pretrain.gin').write_text('raise')
  said = refused('--gin_file=runs/pretrain.gin', f'--gin_search_paths={tmp_path}')
  assert str(tmp_path) in said


def test_a_misspelt_macro_in_a_file_of_ones_own_is_refused(tmp_path):
  (tmp_path / 'mine.gin').write_text('TRAIN_STPES = 30\n')
  said = refused(*NAMED, f'--gin_file={tmp_path}/mine.gin')
  assert f'{tmp_path}/mine.gin: TRAIN_STPES' in said and 'TRAIN_STEPS' in said


@pytest.mark.parametrize(
  ('binding', 'words'),
  [
    ('MIXTURE_OR_TASK_NAME=demo_ul2', ['--gin.MIXTURE_OR_TASK_NAME="\'demo_ul2\'"', 'quotes']),
    ('TRAIN_STEPS=10steps', ['--gin.TRAIN_STEPS=10steps', 'quotes']),
    ('TRAIN_STEPS=', ['--gin.TRAIN_STEPS has no value']),
    ('TRAIN_STEPS', ['--gin.TRAIN_STEPS has no value']),
    ('TRAIN_STEPS=10steps', ['without units', '--gin.TRAIN_STEPS=10; text needs quotes']),
    ('TRAIN_STEPS=007', ['zeros in front: --gin.TRAIN_STEPS=7;']),
    ('MODEL_DIR=8b', ['--gin.MODEL_DIR=8; text needs quotes: --gin.MODEL_DIR="\'8b\'"']),
    ('EVAL_PERIOD=None', ['EVAL_PERIOD=None']),
    ('TRAIN_STEPS=%NOTHING', ['NOTHING']),
    ('config.MoEConfig.num_expert=3', ['--gin.config.MoEConfig.num_expert=3', 'num_experts']),
    ('train/utils.DatasetConfig.pack=False', ['always packed']),
    ('trainer.Trainer.num_microbatches=2', ['NUM_MICROBATCHES']),
    ('train.eval_period=7', ['EVAL_PERIOD']),
    ('utils.SaveCheckpointConfig.period=10', ['CHECKPOINT_PERIOD']),
    ('TrainConfig.eval_period=7', ['TrainConfig', 'config.TrainConfig.eval_period']),
    ('nobody.Knows.this=1', ['nobody']),
  ],
)
def test_a_wrong_binding_is_named_with_a_way_out(binding, words):
  said = refused(*NAMED, f'--gin.{binding}')
  assert all(word in said for word in words), said
  assert '<ast' not in said


@pytest.mark.parametrize('name', hints.MACROS)
def test_macros_of_t5x_are_told_their_counterpart(name):
  assert hints.MACROS[name] in refused(*NAMED, f'--gin.{name}=1')


@pytest.mark.parametrize('start', hints.BINDINGS)
def test_bindings_of_t5x_are_told_their_counterpart(start):
  name = (
    start.rstrip('.') if start.count('.') > 1 or start == 'train.' else f'{start.rstrip(".")}.x'
  )
  assert hints.BINDINGS[start] in refused(*NAMED, f'--gin.{name}=1')


def test_counterparts_exist():
  read = files.macros_read([p.read_text(encoding='utf-8') for p in (ROOT / 'gin').rglob('*.gin')])
  for text in (*hints.MACROS.values(), *hints.BINDINGS.values()):
    for word in text.replace(';', ' ').replace(',', ' ').split():
      if word.isupper() and '_' in word:
        assert word in read, text
      if word.startswith(('config.', 'train/config.')):
        assert word.removeprefix('train/') in {'config.DataConfig', *hints._known_names()} | {
          f'config.{name}' for name in hints._known_names()
        }, text


def test_the_originals_run_files_are_known():
  assert 'gin/experiments/openmoe_8b.gin' in refused('--gin_file=t5x/examples/openmoe_large.gin')
  for ours in hints.RUN_FILES.values():
    assert (ROOT / f'gin/experiments/{ours}.gin').is_file()


def test_bindings_may_name_what_a_gin_file_imports(tmp_path):
  found = configure(
    *NAMED,
    '--gin_file=gin/mixtures/text_files.gin',
    "--gin.TEXT_FILES='a.jsonl'",
    "--gin.text_files.UserFiles.vocabulary='mine.model'",
  )
  assert found['sources'][0].vocabulary == 'mine.model'


@pytest.mark.parametrize('flag', ['coordinator_address=a:1', 'process_count=2', 'process_index=0'])
def test_flags_of_processes_need_multiprocess(flag):
  flags.FLAGS(['train', f'--{flag}'])
  alone = processes.joined(dict, 'runs/x')
  with pytest.raises(ConfigError, match='needs --multiprocess'), alone:
    pass


def test_t5xs_flags_are_taken(tmp_path):
  configure(
    *NAMED,
    f'--seqio_additional_cache_dirs={tmp_path}',
    '--initialization_timeout=30',
    '--nomultiprocess_gpu',
    '--jax_default_matmul_precision=highest',
  )
