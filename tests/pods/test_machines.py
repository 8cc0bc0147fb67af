"""Every overlay of gin/machines is a run that its machine can take."""

import pathlib

import gin
import pytest

from openmoe.pods import memory, run
from openmoe.pods.request import Effort
from openmoe.pods.target import Target
from scripts import gin_flags

ROOT = pathlib.Path(__file__).parent.parent.parent
MACHINES = {
  'openmoe_8b_v5e': 'v5e:16x16',
  'openmoe_8b_v5p': 'v5p:4x8x8',
  'openmoe_34b_v5p': 'v5p:8x8x8',
  'jetmoe_8b_v5p': 'v5p:4x8x8',
}


def test_every_overlay_is_tried():
  assert set(MACHINES) == {path.stem for path in (ROOT / 'gin' / 'machines').glob('*.gin')}


@pytest.mark.parametrize('name', MACHINES)
def test_a_machine_takes_the_published_run(name, monkeypatch):
  monkeypatch.chdir(ROOT)
  model = name.rpartition('_')[0]
  files = (
    f'gin/models/{model}',
    'gin/runs/pretrain',
    f'gin/experiments/{model}',
    f'gin/machines/{name}',
  )
  bindings = ["MODEL_DIR='planned'", 'JETMOE_TASKS={}']
  with gin.unlock_config():
    gin.clear_config()
    gin.parse_config_files_and_bindings(
      [f'{file}.gin' for file in files], bindings, finalize_config=False
    )
    arguments = gin_flags.bindings('train.train')
    gin.clear_config()
  target = Target(MACHINES[name])
  wanted = run.requests(arguments, target, Effort.FULL)
  assert {request.num_microbatches for request in wanted} == {1}
  state = memory.state_of(wanted[0])
  assert state.params_bytes + state.optimizer_bytes < target.device.hbm_bytes / 8
