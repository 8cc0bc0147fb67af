"""Every flag and macro of t5x's command line: taken with t5x's meaning, or answered with ours."""

from __future__ import annotations

import gin
import jax
import pytest
import seqio
from absl import flags

from openmoe import partitioning
from openmoe.config import ConfigError, MeshConfig
from openmoe.running import rollcall
from scripts import gin_flags, processes
from scripts.gin_flags import files, hints
from tests.test_gin_flags import FILES, NAMED, configure, refused

UMT5 = (*NAMED, '--gin_file=gin/mixtures/umt5.gin')


def bound(*args):
  return configure(*NAMED, *args)


# flag or macro, what is given, what comes of it
TAKEN = {
  'gin_file': (['--gin_file=gin/experiments/demo_full_lm.gin'], 'demo_full_lm', 'data', None),
  'gin.NAME': (['--gin.TRAIN_STEPS=31'], 31, 'run', 'total_steps'),
  'gin_bindings': (['--gin_bindings=TRAIN_STEPS=31'], 31, 'run', 'total_steps'),
  'jax_*': (['--jax_default_matmul_precision=highest'], 200, 'run', 'total_steps'),
  'MODEL_DIR': (["--gin.MODEL_DIR='y'"], 'y', 'run', 'model_dir'),
  'MIXTURE_OR_TASK_NAME': (["--gin.MIXTURE_OR_TASK_NAME='m'"], 'm', 'data', None),
  'TASK_FEATURE_LENGTHS': (
    ["--gin.TASK_FEATURE_LENGTHS={'targets': 8}"], {'targets': 8}, 'data', 'task_feature_lengths',
  ),
  'TRAIN_STEPS': (['--gin.TRAIN_STEPS=3'], 3, 'run', 'total_steps'),
  'TRAIN_STEPS_RELATIVE': (
    ['--gin.TRAIN_STEPS_RELATIVE=3', "--gin.INITIAL_CHECKPOINT='a/checkpoint_7'"],
    10, 'run', 'total_steps',
  ),
  'DROPOUT_RATE': (['--gin.DROPOUT_RATE=0.5'], 0.5, 'model', 'dropout_rate'),
  'BATCH_SIZE': (['--gin.BATCH_SIZE=128'], 128, 'data', 'batch_size'),
  'EVAL_PERIOD': (['--gin.EVAL_PERIOD=1000'], 1000, 'run', 'eval_period'),
  'EVAL_STEPS': (['--gin.EVAL_STEPS=20'], 20, 'run', 'eval_steps'),
  'NUM_MODEL_PARTITIONS': (['--gin.NUM_MODEL_PARTITIONS=2'], 2, 'mesh', 'num_model_partitions'),
  'NUM_EXPERT_PARTITIONS': (['--gin.NUM_EXPERT_PARTITIONS=2'], 2, 'mesh', 'num_expert_partitions'),
}  # fmt: skip


@pytest.mark.parametrize('name', TAKEN)
def test_taken_as_t5x_means_it(name):
  args, value, part, field = TAKEN[name]
  assert getattr(bound(*args)[part], field or 'mixture_or_task_name') == value


# macro or binding, and a name of ours that the answer must hold
REFUSED = {
  'MODEL_PARALLEL_SUBMESH': 'NUM_MODEL_PARTITIONS',
  'RANDOM_SEED': 'SEED',
  'USE_HARDWARE_RNG': 'same on every device',
  'USE_CACHED_TASKS': 'train/config.DataConfig.use_cached',
  'SHUFFLE_TRAIN_EXAMPLES': 'train/config.DataConfig.shuffle',
  'MIXTURE_OR_TASK_MODULE': 'import in a gin file',
  'INITIAL_CHECKPOINT_PATH': 'INITIAL_CHECKPOINT',
  'NUM_EXPERTS': 'config.MoEConfig.num_experts',
  'NUM_SELECTED_EXPERTS': 'config.MoEConfig.top_k',
  'NUM_DECODER_LAYERS': 'config.ModelConfig.num_layers',
  'NUM_DECODER_SPARSE_LAYERS': 'config.ModelConfig.num_sparse_layers',
  'EMBED_DIM': 'config.ModelConfig.embed_dim',
  'MLP_DIM': 'config.ModelConfig.mlp_dim',
  'EXPERT_MLP_DIM': 'config.ModelConfig.mlp_dim',
  'NUM_HEADS': 'config.ModelConfig.num_heads',
  'HEAD_DIM': 'config.ModelConfig.head_dim',
  'NUM_EMBEDDINGS': 'config.ModelConfig.vocab_size',
  'SCALE': 'config.ModelConfig.init_scale',
  'ACTIVATION_DTYPE': 'config.ModelConfig.dtype',
  'GROUP_SIZE': 'config.MoEConfig.group_size',
  'TRAIN_EXPERT_CAPACITY_FACTOR': 'config.MoEConfig.capacity_factor',
  'EVAL_EXPERT_CAPACITY_FACTOR': 'config.MoEConfig.eval_capacity_factor',
  'JITTER_NOISE': 'config.MoEConfig.jitter_noise',
  'AUX_LOSS_FACTOR': 'config.MoEConfig.load_balance_weight',
  'ROUTER_Z_LOSS_FACTOR': 'config.MoEConfig.router_z_weight',
  'Z_LOSS': 'config.ModelConfig.logit_z_weight',
  'LABEL_SMOOTHING': 'fixed here at 0',
  'LOSS_NORMALIZING_FACTOR': 'real tokens',
  'VOCABULARY': 'gin/mixtures/umt5.gin',
  'CHECKPOINT_PATH': 'CHECKPOINT',
  'EVAL_OUTPUT_DIR': 'OUT_DIR',
  'train.eval_period': 'EVAL_PERIOD',
  'train_script.train.eval_period': 'EVAL_PERIOD',
  'train.random_seed': 'SEED',
  'trainer.Trainer.num_microbatches': 'NUM_MICROBATCHES',
  'moe_trainer.MoeTrainer.num_microbatches': 'NUM_MICROBATCHES',
  'utils.SaveCheckpointConfig.period': 'CHECKPOINT_PERIOD',
  'utils.SaveCheckpointConfig.keep': 'KEEP_CHECKPOINTS',
  'utils.RestoreCheckpointConfig.path': 'INITIAL_CHECKPOINT',
  'utils.create_learning_rate_scheduler.base_learning_rate': 'config.OptimizerConfig',
  'train/utils.DatasetConfig.seed': 'DATA_SEED',
  'train/utils.DatasetConfig.shuffle': 'config.DataConfig',
  'moe_partitioning.MoePjitPartitioner.num_partitions': 'config.MeshConfig',
}


@pytest.mark.parametrize('name', REFUSED)
def test_refused_with_our_name_for_it(name):
  assert REFUSED[name] in refused(*NAMED, f'--gin.{name}=1')


def test_a_vocabulary_is_a_path_and_no_reference():
  assert configure(*UMT5, "--gin.VOCABULARY='spiece.model'")['sources'][0].vocabulary
  gin.clear_config()
  said = refused(*UMT5, '--gin.VOCABULARY=@seqio.SentencePieceVocabulary()')
  assert 'seqio' in said


def test_experts_are_divided_as_asked_or_not_at_all():
  """t5x takes NUM_EXPERT_PARTITIONS as an upper bound."""
  for asked, fits in ((3, 2), (6, 4), (16, 8)):
    with pytest.raises(ConfigError, match=f'no upper bound, as in t5x; here {fits} fits'):
      partitioning.mesh_shape(MeshConfig(asked), 8)
  with pytest.raises(ConfigError, match='must divide the devices.$'):
    partitioning.mesh_shape(MeshConfig(4, 3), 8)


def test_additional_cache_dirs_are_searched(tmp_path):
  bound(f'--seqio_additional_cache_dirs={tmp_path}')
  assert str(tmp_path) in seqio.get_global_cache_dirs()


def test_a_folder_of_data_sets_must_be_there(tmp_path):
  assert f'{tmp_path}/no' in refused(*NAMED, f'--tfds_data_dir={tmp_path}/no')


def test_gin_files_of_a_bucket_are_read(tmp_path, monkeypatch):
  (tmp_path / 'mine.gin').write_text('TRAIN_STEPS = 5\n')
  real = files.epath.Path
  there = lambda *name: real(*(str(n).replace('gs://bucket', str(tmp_path)) for n in name))
  monkeypatch.setattr(files.epath, 'Path', there)
  assert bound('--gin_file=gs://bucket/mine.gin')['run'].total_steps == 5
  gin.clear_config()
  assert 'gs://bucket/no.gin' in refused(*FILES, '--gin_file=gs://bucket/no.gin')


@pytest.mark.parametrize('flag', ['multiprocess', 'multiprocess_gpu'])
def test_processes_join_by_either_name(flag, monkeypatch):
  asked = {}

  def initialize(*place, **more):
    asked.update(place=place, **more)

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  monkeypatch.setattr(rollcall, 'meet', lambda *_: [])
  monkeypatch.setattr(jax.config, 'update', lambda *_: None)
  monkeypatch.setenv('XLA_FLAGS', '')
  given = ['--coordinator_address=a:1', '--process_count=2', '--process_index=1']
  flags.FLAGS(['train', f'--{flag}', *given, '--initialization_timeout=30'])
  with processes.joined(dict, 'runs/x'):
    assert asked['place'] == ('a:1', 2, 1)
    assert asked['initialization_timeout'] == 30


@pytest.mark.parametrize(
  ('flag', 'words'),
  [
    ('fdl_config=base', 'give gin files'),
    ('fdl_config_file=a.py', 'give gin files'),
    ('run_mode=train', 'scripts.train'),
    ('gin_flie=a.gin', 'gin_file'),
  ],
)
def test_other_flags_are_usage_errors(flag, words, monkeypatch, capsys):
  monkeypatch.setattr('sys.argv', ['train', f'--{flag}'])
  with pytest.raises(SystemExit) as ended:
    gin_flags.run(lambda: 0)
  assert ended.value.code == 64
  assert words in capsys.readouterr().err


@pytest.mark.parametrize('name', hints.RUN_FILES)
def test_run_files_of_the_original_are_answered_without_a_checkout(name):
  said = refused(f'--gin_file=t5x/examples/{name}.gin')
  assert f'gin/experiments/{hints.RUN_FILES[name]}.gin' in said


@pytest.mark.parametrize('name', hints.RUN_FILES)
def test_run_files_of_the_original_are_answered_before_their_includes(name, tmp_path):
  path = tmp_path / f'{name}.gin'
  path.write_text("from t5x import utils\n\ninclude 'flaxformer/none.gin'\n")
  said = refused(f'--gin_file={path}')
  assert f'gin/experiments/{hints.RUN_FILES[name]}.gin' in said
  assert f'scripts.import_gin {path}' in said
