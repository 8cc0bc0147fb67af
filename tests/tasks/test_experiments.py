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
# experiment: (mixture, lengths, batch, steps)
PUBLISHED = {
  'openmoe_base': ('mix_ul2', UL2, 128, 500_000),
  'openmoe_base_stage2': ('mix_ul2_stage2', UL2, 128, 600_000),
  'openmoe_base_wo_code': ('mix_lesscode_ul2', UL2, 128, 500_000),
  'openmoe_base_wo_moe': ('mix_ul2', UL2, 128, 500_000),
  'openmoe_base_wo_ul2': ('mix_full_lm', LM, 128, 500_000),
  'openllama_base': ('mix_full_lm', LM, 128, 500_000),
  'openllama_large': ('mix_ul2', UL2, 1024, 500_000),
  'openmoe_8b_stage1': ('mix_ul2', UL2, 1024, 390_000),
  'openmoe_8b_stage2': ('mix_full_lm_stage2', LM, 1024, 524_500),
  'openmoe_34b_stage1': ('mix_ul2_v2', UL2, 1024, 25_000),
  'openmoe_34b_stage2': ('mix_full_lm_v2', LM, 1024, 100_000),
  'openmoe_8b_orca_sft': ('orca_sft', {'inputs': 1536, 'targets': 512}, 64, 700_000),
  'openmoe_8b_wildchat_sft': ('wildchat_gpt4_sft', UL2, 128, 553_000),
  'jetmoe_8b_phase1': ('jetmoe_phase1', {'targets': 4096}, 1024, 238_419),
  'jetmoe_8b_phase2': ('jetmoe_phase2', {'targets': 4096}, 1024, 298_024),
}


@pytest.fixture(autouse=True)
def _fresh_gin():
  gin.clear_config()
  yield
  gin.clear_config()


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


def test_every_experiment_is_listed():
  found = {path.stem for path in (ROOT / 'gin/experiments').glob('*.gin')}
  assert set(PUBLISHED) <= found
