"""Every published run's gin file parses, with its model, to what was published."""

from __future__ import annotations

import pathlib
import re

import gin
import pytest

from openmoe.config import DataConfig, OptimizerConfig, TrainConfig
from openmoe.data.shard import find_provider
from tasks import pretraining, sft  # noqa: F401 (registers)

ROOT = pathlib.Path(__file__).parents[2]
UL2, LM = {'inputs': 1024, 'targets': 1024}, {'targets': 2048}
# experiment: (mixture, lengths, batch, steps); of a programme the last stage, and all its steps
PUBLISHED = {
  'openmoe_base': ('mix_ul2', UL2, 128, 500_000),
  'openmoe_base_stage2': ('mix_ul2_stage2', UL2, 128, 600_000),
  'openmoe_base_wo_code': ('mix_lesscode_ul2', UL2, 128, 500_000),
  'openmoe_base_wo_moe': ('mix_ul2', UL2, 128, 500_000),
  'openmoe_base_wo_ul2': ('mix_full_lm', LM, 128, 500_000),
  'openllama_base': ('mix_full_lm', LM, 128, 500_000),
  'openllama_large': ('mix_ul2', UL2, 1024, 500_000),
  'openmoe_8b': ('mix_full_lm_stage2', LM, 1024, 524_500),
  'openmoe_34b': ('mix_full_lm_v2', LM, 1024, 100_000),
  'jetmoe_8b': ('jetmoe_phase2', {'targets': 4096}, 1024, 298_024),
  'openmoe_8b_orca_sft': ('orca_sft', {'inputs': 1536, 'targets': 512}, 64, 700_000),
  'openmoe_8b_wildchat_sft': ('wildchat_gpt4_sft', UL2, 128, 553_000),
}
# experiment: (mixture, steps) of every stage
PROGRAMMES = {
  'openmoe_8b': [('mix_ul2', 390_000), ('mix_full_lm_stage2', 134_500)],
  'openmoe_34b': [('mix_ul2_v2', 25_000), ('mix_full_lm_v2', 75_000)],
  'jetmoe_8b': [('jetmoe_phase1', 238_419), ('jetmoe_phase2', 59_605)],
}


def model_of(experiment: str) -> str:
  text = (ROOT / 'gin/experiments' / f'{experiment}.gin').read_text()
  return re.search(r'MODEL=(\w+)', text).group(1)


@pytest.mark.parametrize('experiment', PUBLISHED)
def test_experiment(experiment):
  mixture, lengths, batch, steps = PUBLISHED[experiment]
  model = ROOT / 'gin/models' / f'{model_of(experiment)}.gin'
  overlay = ROOT / f'gin/experiments/{experiment}.gin'
  for path in (model, ROOT / 'gin/runs/pretrain.gin', overlay):
    gin.parse_config_file(str(path))
  bindings = ["MODEL_DIR = 'x'"]
  brings_tasks = 'JETMOE_TASKS' in overlay.read_text()  # nothing registers them beforehand
  if brings_tasks:
    bindings.append("JETMOE_TASKS = {'refinedweb': 'redpajama_c4_full_lm'}")
  gin.parse_config(bindings)
  gin.finalize()
  with gin.config_scope('train'):
    data = gin.get_configurable(DataConfig)()
  assert (data.mixture_or_task_name, dict(data.task_feature_lengths)) == (mixture, lengths)
  assert data.batch_size == batch
  assert gin.get_configurable(TrainConfig)().total_steps == steps
  assert gin.get_configurable(OptimizerConfig)() is not None
  if not brings_tasks:
    find_provider(mixture)


@pytest.mark.parametrize('experiment', PROGRAMMES)
def test_programme(experiment):
  """The stages of a run are one file, as long in all as the run."""
  for path in (f'models/{experiment}', 'runs/pretrain', f'experiments/{experiment}'):
    gin.parse_config_file(str(ROOT / f'gin/{path}.gin'))
  gin.parse_config("MODEL_DIR = 'x'")
  with gin.unlock_config():
    gin.parse_config('train.train.sources = []')
  arguments = gin.get_bindings('train.train')
  stages = arguments['data'].stages
  assert [(s.data.mixture_or_task_name, s.steps) for s in stages] == PROGRAMMES[experiment]
  assert sum(s.steps for s in stages) == arguments['run'].total_steps
  assert [s.data.num_shards for s in stages] == [128, 128]


def test_every_experiment_is_listed():
  found = {path.stem for path in (ROOT / 'gin/experiments').glob('*.gin')}
  assert set(PUBLISHED) <= found
