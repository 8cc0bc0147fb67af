"""Prints the files that one training step of OpenMoE runs through, and how long they are.

  python -m tests.reading_path

Counted is every file of openmoe/ of which a function runs while the step of openmoe_tiny is built
(configurations, mesh, state, optimizer, model) and traced on a mesh with an expert axis, and
train.py, the loop around it. The README's reading order is this list.
"""

from __future__ import annotations

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')

import functools
import pathlib
import sys
from collections.abc import Callable

import jax

from openmoe import partitioning, train
from openmoe.config import MeshConfig, ModelConfig, MoEConfig, OptimizerConfig
from openmoe.models import build_model, empty_batch
from openmoe.optimizer import learning_rate, make_optimizer
from openmoe.train_step import abstract_state, init_state, state_shardings, train_step

ROOT = pathlib.Path(__file__).parent.parent


def trace_a_step() -> None:
  """Builds the default training step as train() does, and traces it; nothing is compiled."""
  moe = MoEConfig(num_experts=4, group_size=64)
  sizes = {'vocab_size': 512, 'num_layers': 4, 'embed_dim': 32, 'mlp_dim': 64}
  heads = {'num_heads': 2, 'head_dim': 16}
  model = ModelConfig('path', **sizes, **heads, num_sparse_layers=2, moe=moe)
  optimizer, mesh_config = OptimizerConfig(), MeshConfig(num_expert_partitions=2)
  mesh = partitioning.make_mesh(mesh_config)
  abstract, axes = abstract_state(model, optimizer)
  shardings = state_shardings(mesh, optimizer, abstract, axes, mesh_config.fsdp)
  module, schedule = build_model(model), learning_rate(optimizer, 100)
  transform = make_optimizer(optimizer, axes, schedule)
  step = functools.partial(
    train_step,
    model=module,
    config=model,
    optimizer=transform,
    schedule=schedule,
    num_microbatches=1,
    seed=0,
  )
  with jax.set_mesh(mesh):
    state = jax.eval_shape(functools.partial(init_state, module, transform, 0))
    batch = jax.eval_shape(lambda: empty_batch(8, 64))
    jax.jit(step, out_shardings=(shardings, None)).trace(state, batch)


def files_of(run: Callable[[], None]) -> set[pathlib.Path]:
  """Files of openmoe/ of which a function runs in `run`; methods that dataclasses make count."""
  names: set[str] = set()

  def note(frame, event, argument) -> None:
    if event == 'call' and frame.f_code.co_name != '<module>':
      names.add(frame.f_globals.get('__name__', ''))

  before = sys.getprofile()
  sys.setprofile(note)
  try:
    run()
  finally:
    sys.setprofile(before)
  return {
    pathlib.Path(sys.modules[name].__file__) for name in names if name.split('.')[0] == 'openmoe'
  }


def reading_path() -> dict[str, int]:
  """Path -> lines of the files of a training step."""
  files = files_of(trace_a_step) | {pathlib.Path(train.__file__)}
  lines = lambda file: len(file.read_text(encoding='utf-8').splitlines())
  return {str(file.relative_to(ROOT)): lines(file) for file in sorted(files)}


if __name__ == '__main__':
  path = reading_path()
  for name, count in path.items():
    print(f'{count:6}  {name}')
  print(f'{sum(path.values()):6}  lines in {len(path)} files')
