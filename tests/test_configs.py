"""Every gin file parses and builds; every size has exactly the published number of parameters."""

import dataclasses
import pathlib
import re

import gin
import jax
import jax.numpy as jnp
import pytest

from openmoe.config import (
  ConfigError,
  DataConfig,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  TrainConfig,
)
from openmoe.models import abstract_params, build_model, empty_batch
from openmoe.plan import (
  abstract_mesh,
  active_params,
  check,
  count_params,
  flops_per_token,
  make_plan,
)
from openmoe.programme import as_programme
from scripts import gin_flags

ROOT = pathlib.Path(__file__).parent.parent
# Totals and activated parameters in blocks: the released checkpoints' own (docs/PARITY.md).
SIZES = {
  'openmoe_base': (799_663_104, 141_616_128),
  'openmoe_8b': (11_855_046_656, 2_751_834_112),
  'openmoe_34b': (46_270_737_408, 8_456_727_552),
  'openllama_base': (497_634_048, 103_828_224),
  'openllama_large': (3_264_841_728, 2_214_692_864),
}
SPARSE = {
  'openmoe_base': (3, 7, 11),
  'openmoe_8b': (5, 11, 17, 23),
  'openmoe_34b': (3, 7, 11, 15, 19, 23, 27, 31),
}


def model_of(name: str) -> ModelConfig:
  gin.parse_config_file(str(ROOT / 'gin' / 'models' / f'{name}.gin'))
  gin.parse_config('from __gin__ import dynamic_registration\nfrom openmoe import config\n')
  return gin.get_configurable(ModelConfig)()


@pytest.mark.parametrize('name', SIZES)
def test_parameter_counts(name):
  model = model_of(name)
  assert count_params(abstract_params(model)[0]) == SIZES[name][0]
  assert active_params(model) == SIZES[name][1]
  assert model.sparse_layers == SPARSE.get(name, ())


@pytest.mark.parametrize('name', [*SIZES, 'openmoe_tiny'])
def test_every_size_runs_abstractly(name):
  model = model_of(name)
  module = build_model(model)
  shapes = abstract_params(model)[0]
  run = lambda p: module.apply({'params': p}, empty_batch(2, 64), train=True).hidden_btd
  out = jax.eval_shape(run, shapes)
  assert out.shape == (2, 64, model.embed_dim)
  assert out.dtype == jnp.dtype(model.dtype)


def test_model_flops_of_the_8b():
  # 6 x (activated in blocks + output layer) = 19.66 G, and 24 layers of causal attention.
  assert flops_per_token(model_of('openmoe_8b'), 2048) == pytest.approx(20.5e9, rel=0.01)


def test_plan_of_a_pod_without_one():
  model = model_of('openmoe_8b')
  mesh_config = MeshConfig(num_expert_partitions=32, num_model_partitions=8, fsdp=True)
  mesh = abstract_mesh(mesh_config, 512)
  plan = make_plan(model, OptimizerConfig(), mesh_config, mesh, 1024, 2048)
  assert plan.total_params == SIZES['openmoe_8b'][0]
  experts = [row for row in plan.rows if row.path.endswith('experts/wi_0/kernel')]
  assert experts[0].device_bytes == 4 * 4 * 32 * 2048 * 2 * 8192 // 512


def _run_config(**changes):
  moe = MoEConfig(changes.pop('num_experts', 8), group_size=changes.pop('group_size', 256))
  sizes = {'vocab_size': 2048, 'num_layers': 4, 'embed_dim': 128, 'mlp_dim': 256}
  sizes |= {'num_heads': 4, 'head_dim': 32, 'num_sparse_layers': 2, 'moe': moe}
  model = ModelConfig('m', **{k: changes.pop(k, v) for k, v in sizes.items()})
  data = DataConfig('x', {'inputs': 128, 'targets': 128}, changes.pop('batch_size', 16))
  partitions = changes.pop('partitions', (4, 1))
  assert not changes
  return model, data, MeshConfig(*partitions)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'batch_size': 24, 'partitions': (1, 1), 'group_size': 100}, ['group_size=100', '768', '96']),
    ({'partitions': (3, 1)}, ['8 devices', 'NUM_EXPERT_PARTITIONS=3']),
    ({'num_experts': 6}, ['num_experts=6', 'NUM_EXPERT_PARTITIONS=4', '[1, 2, 3, 6]']),
    ({'vocab_size': 2049, 'partitions': (1, 2)}, ['vocab_size=2049', '[1]']),
    ({'num_heads': 3, 'partitions': (1, 8)}, ['num_heads=3']),
  ],
)
def test_what_the_mesh_cannot_split_is_refused(changes, words):
  model, data, mesh = _run_config(**changes)
  run = TrainConfig('somewhere', total_steps=1)
  with pytest.raises(ConfigError) as error:
    check(run, model, OptimizerConfig(), as_programme(data, 1), None, abstract_mesh(mesh, 8))
  assert all(word in str(error.value) for word in words), error.value


def test_what_fsdp_cannot_split_is_refused():
  """FSDP splits the embedding axis of all weights over the data partitions."""
  model, data, _ = _run_config(embed_dim=36, num_heads=4)
  run, mesh = TrainConfig('somewhere', total_steps=1), abstract_mesh(MeshConfig(), 8)
  asked = (run, model, OptimizerConfig(), as_programme(data, 1), None, mesh)
  check(*asked)
  with pytest.raises(ConfigError, match=r'embed_dim=36 .* FSDP=8; choose one of \[1, 2, 3, 4, 6\]'):
    check(*asked, True)


def _tiny(**changes) -> ModelConfig:
  return ModelConfig('m', **{**dict.fromkeys(COUNTS, 2), **changes})


COUNTS = ('vocab_size', 'num_layers', 'embed_dim', 'mlp_dim', 'num_heads', 'head_dim')


@pytest.mark.parametrize('value', [4.0, 1e2, True, '4', None, -2])
@pytest.mark.parametrize(
  ('make', 'name'),
  [
    *[(lambda v, n=name: _tiny(**{n: v}), name) for name in COUNTS],
    (lambda v: MoEConfig(v), 'num_experts'),
    (lambda v: MoEConfig(4, group_size=v), 'group_size'),
    (lambda v: DataConfig('x', {'targets': 8}, v, num_shards=1), 'batch_size'),
    (lambda v: DataConfig('x', {'targets': v}, 8), 'task_feature_lengths'),
    (lambda v: TrainConfig('d', v), 'total_steps'),
    (lambda v: TrainConfig('d', 1, eval_period=v), 'eval_period'),
    (lambda v: MeshConfig(v), 'num_expert_partitions'),
    (lambda v: OptimizerConfig(warmup_steps=v), 'warmup_steps'),
  ],
)
def test_counts_are_whole_numbers(make, name, value):
  with pytest.raises(ConfigError, match=f'{name}=.*whole number'):
    make(value)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -1.0, True, '1'])
@pytest.mark.parametrize(
  ('make', 'name'),
  [
    (lambda v: MoEConfig(4, capacity_factor=v), 'capacity_factor'),
    (lambda v: MoEConfig(4, load_balance_weight=v), 'load_balance_weight'),
    (lambda v: _tiny(dropout_rate=v), 'dropout_rate'),
    (lambda v: _tiny(norm_epsilon=v), 'norm_epsilon'),
    (lambda v: _tiny(final_norm_epsilon=v), 'final_norm_epsilon'),
    (lambda v: _tiny(logit_z_weight=v), 'logit_z_weight'),
    (lambda v: OptimizerConfig(learning_rate=v), 'learning_rate'),
    (lambda v: OptimizerConfig(clip_global_norm=v), 'clip_global_norm'),
    (lambda v: OptimizerConfig(b2=v), 'b2'),
  ],
)
def test_rates_and_factors_are_finite_numbers(make, name, value):
  with pytest.raises(ConfigError, match=rf'{name}={re.escape(repr(value))} must be'):
    make(value)


def test_a_float_that_means_a_count_is_told_how_to_write_it():
  with pytest.raises(ConfigError, match=r'total_steps=100.0 .* at least 1; write 100\.'):
    TrainConfig('d', 1e2)


def test_text_is_no_switch():
  with pytest.raises(ConfigError, match=r"DataConfig.pack='False' must be True or False"):
    DataConfig('x', {'targets': 8}, 8, pack='False')


def test_configurations_are_equal_and_hashed_by_what_they_say():
  one, same = (DataConfig('x', {'inputs': 4, 'targets': 8}, 8) for _ in range(2))
  assert (one, hash(one)) == (same, hash(same))
  assert one != dataclasses.replace(one, task_feature_lengths={'inputs': 8, 'targets': 4})


def test_batch_must_divide():
  model, data, mesh = _run_config(batch_size=24)
  run = TrainConfig('somewhere', total_steps=1, num_microbatches=2)
  with pytest.raises(ConfigError, match=r'batch_size=24 .* 16; the next that fits is 32'):
    check(run, model, OptimizerConfig(), as_programme(data, 1), None, abstract_mesh(mesh, 8))


@pytest.mark.parametrize(
  ('make', 'words'),
  [
    (lambda: MoEConfig(4, top_k=5), ['top_k=5', 'num_experts=4']),
    (lambda: MoEConfig(4, dispatch='scater'), ['scater', "Did you mean 'scatter'"]),
    (lambda: DataConfig('x', {'inputs': 4}, 8), ['targets']),
    (lambda: DataConfig('x', {'targets': 4}, 12), ['num_shards=8', '16']),
    (lambda: OptimizerConfig(schedule='rsqrt', warmup_steps=0), ['rsqrt']),
  ],
)
def test_configs_refuse_nonsense(make, words):
  with pytest.raises(ConfigError) as error:
    make()
  assert all(word in str(error.value) for word in words)


FILES = tuple(
  f'--gin_file=gin/{name}.gin'
  for name in ('models/openmoe_tiny', 'runs/pretrain', 'experiments/demo')
)


@pytest.mark.parametrize(
  ('args', 'words'),
  [
    (FILES, ['MODEL_DIR must be set']),
    ((*FILES, '--gin.BATCHSIZE=3'), ['BATCHSIZE', 'BATCH_SIZE']),
    ((*FILES, "--gin.MODEL_DIR='x'", '--gin.config.MoEConfig.num_expert=3'), ['num_experts']),
    (('--gin_file=gin/models/openmoe_8.gin',), ['gin/models/openmoe_8b.gin']),
    ((*FILES, "--gin.MODEL_DIR='x'", '--tfds_data_dir=/no/such'), ['/no/such', 'does not exist']),
  ],
)
def test_wrong_input_is_refused_with_the_nearest_names(args, words):
  done = _refused(args)
  assert all(word in done for word in words), done


def _refused(args) -> str:
  """The error of configure(), in process: what the command prints."""
  from absl import flags

  from scripts import train

  flags.FLAGS(['train', *gin_flags.rewrite(args)])
  with pytest.raises(ConfigError) as error:
    train.configure()
  return str(error.value)
